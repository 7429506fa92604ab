"""The graph of a network as plain data, which a file stores and torch can run.

A graph is a list of nodes in the order of execution. It names the entries of a state dict instead
of holding tensors, and it does not depend on the resolution. The header of a file can thus hold it.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .windows import Windows

INPUT = "input"

ACTIVATIONS = (
    *("relu", "relu6", "silu", "hardswish", "hardsigmoid", "sigmoid", "gelu"),
    "gelu_tanh",  # the GELU that nn.GELU(approximate="tanh") computes
    "tanh",
)

OPS = (
    *("conv", "batch_norm", "add", "mul", "max_pool", "avg_pool", "mean_pool", "linear"),
    *("pixel_linear", "layer_norm", "scale", "prepend", "embedding", "attention", "token"),
    *("adaptive_avg_pool", "concat", "chunk", "shuffle", "slice"),
    *ACTIVATIONS,
)


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operation of the graph. The node's value has the node's name."""

    name: str
    op: str
    """One of `OPS`. Values are maps (C, H, W), or one vector (C) per image.

    Tokens are a map of height 1, or the pixels of any map, row by row. `mean_pool` averages whole
    planes, and `token` takes one pixel: each gives a vector. `layer_norm` normalizes the channels
    of every pixel, and `pixel_linear` is a linear layer of them. `prepend` puts tokens before the
    pixels of a map. `attention` reads queries, keys and values as three equal ranges of channels.
    Convolutions of 1x1 compute with vectors, too. `mul` multiplies each channel of a map by an
    element of a vector, `scale` by a parameter. A linear layer that reads a map reads all of its
    pixels, channel by channel. `concat` joins the channels of maps, and `chunk` takes part `index`
    of `groups` equal parts of them. `shuffle` takes the first channels of all `groups`, then the
    second ones, and so on. `slice` takes the pixels at `start`, `start + stride` and so on; there
    are zeros where the map has no pixel.
    """
    inputs: tuple[str, ...]
    """Names of earlier nodes, or `INPUT`."""
    parameters: str = ""
    """Prefix of the entries in the state dict (see `entries`)."""
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    eps: float = 0.0
    ceil_mode: bool = False
    """Whether the last window of a max_pool may reach beyond the image."""
    output: tuple[int, int] = (1, 1)
    """Height and width of the value of an adaptive_avg_pool or a slice."""
    start: tuple[int, int] = (0, 0)
    """Row and column of the first pixel that a slice takes."""
    heads: int = 0
    """Of an attention, whose scores are multiplied by `score_scale` before the softmax."""
    score_scale: float = 0.0
    cosine: bool = False
    """Whether queries and keys are divided by their lengths. The scores are then multiplied by
    the exponential of an entry per head, and not by `score_scale`."""
    position_bias: str = ""
    """What is added to the scores: one of `POSITION_BIAS`, or nothing."""
    window: tuple[int, int] = (0, 0)
    """Height and width of the windows in which pixels attend to each other; (0, 0) for all pixels.

    windows.py describes the windows, the mask that a `shift` adds, and `spread`.
    """
    shift: tuple[int, int] = (0, 0)
    spread: bool = False
    key_bias: bool = True
    """Of a pixel_linear: whether the middle third of the bias, that of keys, counts."""
    size: tuple[int, int] = (0, 0)
    """Height and width of the map that a prepend or an embedding takes: it takes no other.

    Operations that read the images have it if the network takes images of one size.
    """
    tokens: int = 0
    """Number of tokens that are put before others."""
    index: int = 0
    """The part that a chunk takes, or the pixel that a token takes, counted row by row."""


POSITION_BIAS = {
    "table": ("relative_position_bias_table", "relative_position_index"),
    "continuous": (
        "relative_coords_table",
        "relative_position_index",
        *("cpb_mlp.0.weight", "cpb_mlp.0.bias", "cpb_mlp.2.weight"),
    ),
}
"""Kind of a position bias -> the ends of its entries' names, as Swin, Swin v2 and MaxViT have them.

A table has a row of numbers, one per head, for every index. The index has a number for every pair
of pixels of a window: queries, then keys. The continuous one computes the table from coordinates.
"""

_WEIGHTS = ("weight", "bias")
_ENTRIES = {
    "conv": _WEIGHTS,
    "linear": _WEIGHTS,
    "pixel_linear": _WEIGHTS,
    "layer_norm": _WEIGHTS,
    "batch_norm": (*_WEIGHTS, "running_mean", "running_var"),
    "scale": ("",),
    "prepend": ("",),
    "embedding": ("",),
}

VECTORS = ("mean_pool", "linear", "token")
"""Operations whose value is a vector, whatever they read."""

KERNELS = ("conv", "linear", "pixel_linear")
"""Operations whose weight is (out, in, ...) and may be sparse."""


def entries(node: Node) -> tuple[str, ...]:
    """Return the names of the entries of the state dict that a node may read.

    The entry of a scale has one number per channel. Those of a prepend and of an embedding have
    (tokens, channels) as their last dimensions.
    """
    names = _ENTRIES.get(node.op, ())
    if node.op == "attention":
        cosine = ("logit_scale",) if node.cosine else ()
        names = (*POSITION_BIAS.get(node.position_bias, ()), *cosine)
    return tuple(node.parameters + name for name in names)


def index_entry(node: Node) -> str | None:
    """Return the name of the entry of whole numbers that a node reads; None if it reads none."""
    return node.parameters + "relative_position_index" if node.position_bias else None


def to_json(nodes: Sequence[Node]) -> list[dict[str, Any]]:
    """Return the nodes as mappings, without the fields that have their default."""
    defaults = {f.name: f.default for f in fields(Node)}
    return [{k: v for k, v in asdict(n).items() if defaults[k] != v} for n in nodes]


def from_json(rows: Any) -> list[Node]:
    """Return the nodes that `to_json` described. Only types are checked; check.py does the rest.

    Raises:
        ValueError: The rows are not a list of nodes.
    """
    if not isinstance(rows, list):
        raise ValueError("the graph is no list of nodes")
    return [_node(row) for row in rows]


def _node(row: Any) -> Node:
    known = {field.name: field for field in fields(Node)}
    required = {"name", "op", "inputs"}
    if not isinstance(row, dict) or not required <= row.keys() <= known.keys():
        raise ValueError(f"the graph has a node that is none: {_brief(row)}")
    for name, value in row.items():
        if not _IS_TYPED[name](value):
            raise ValueError(f"the graph has a node whose {name} is {_brief(value)}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    return Node(**values)


def is_text(value: Any) -> bool:
    """Tell whether a value is a string that is printable as one line."""
    return isinstance(value, str) and value.isprintable()


def vectors(nodes: Sequence[Node]) -> set[str]:
    """Return the names of the values that are one vector per image; the other values are maps."""
    found = set[str]()
    for node in nodes:
        if node.op in VECTORS or (node.op != "mul" and found.issuperset(node.inputs)):
            found.add(node.name)
    return found


def needed(nodes: Sequence[Node], name: str) -> list[Node]:
    """Return the nodes on which a value depends."""
    names = {name}
    for node in reversed(nodes):
        if node.name in names:
            names.update(node.inputs)
    return [node for node in nodes if node.name in names]


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Return a number for height and width as two, however torch has it: one number, or a list."""
    numbers = [value] if isinstance(value, int) else list(value)
    return int(numbers[0]), int(numbers[-1])


def gelu(approximate: str) -> str:
    """Return the activation that nn.GELU(approximate) computes."""
    return "gelu" if approximate == "none" else "gelu_tanh"


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:76]} ..."


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


_IS_TYPED: dict[str, Callable[[Any], bool]] = {
    "name": is_text,
    "op": lambda value: is_text(value) and value in OPS,
    "inputs": _are_names,
    "parameters": is_text,
    "kernel": _is_pair,
    "stride": _is_pair,
    "padding": _is_pair,
    "dilation": _is_pair,
    "groups": lambda value: type(value) is int,
    "eps": lambda value: type(value) in (int, float),
    "ceil_mode": lambda value: type(value) is bool,
    "output": _is_pair,
    "heads": lambda value: type(value) is int,
    "score_scale": lambda value: type(value) in (int, float),
    "size": _is_pair,
    "tokens": lambda value: type(value) is int,
    "index": lambda value: type(value) is int,
    "start": _is_pair,
    "cosine": lambda value: type(value) is bool,
    "position_bias": lambda value: is_text(value) and value in ("", *POSITION_BIAS),
    "window": _is_pair,
    "shift": _is_pair,
    "spread": lambda value: type(value) is bool,
    "key_bias": lambda value: type(value) is bool,
}


def folds(nodes: Sequence[Node]) -> list[tuple[Node, Node]]:
    """Return the pairs of a convolution and the BatchNorm that can be folded into its weights.

    Only the BatchNorm reads the convolution, and no other node has the parameters of either node.
    """
    by_name = {node.name: node for node in nodes}
    readers = Counter(name for node in nodes for name in node.inputs)
    owners = Counter(name for node in nodes for name in entries(node))
    pairs = []
    for node in nodes:
        conv = by_name.get(node.inputs[0]) if node.op == "batch_norm" else None
        if conv is None or conv.op != "conv" or readers[conv.name] > 1:
            continue
        if all(owners[name] == 1 for name in (*entries(conv), *entries(node))):
            pairs.append((conv, node))
    return pairs


def run(nodes: Sequence[Node], state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Return the logits (N, K) of images (N, C, H, W), computed by torch."""
    ((_, logits),) = deque(values(nodes, state, images), maxlen=1)
    return logits


def tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state dict: modules may add entries of any kind (extra state)."""
    return {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}


def float32(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state dict; those of floats become float32, as the runtime has it."""
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in tensors(state).items()
    }


def values(
    nodes: Sequence[Node], state: Mapping[str, Tensor], images: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the value of every node for images (N, C, H, W), computed by torch.

    Values of nodes are kept only as long as later nodes read them.
    """
    last_use = {name: i for i, node in enumerate(nodes) for name in node.inputs}
    known = {INPUT: images}
    for i, node in enumerate(nodes):
        known[node.name] = value(node, state, *(known[name] for name in node.inputs))
        yield node.name, known[node.name]
        for name in set(node.inputs):
            if last_use[name] == i:
                del known[name]


def value(node: Node, state: Mapping[str, Tensor], *inputs: Tensor) -> Tensor:
    """Return the value of a node from those that it reads, computed by torch."""
    return _TORCH[node.op](node, state, *inputs)


def _run_conv(node: Node, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    weight, bias = state[node.parameters + "weight"], state.get(node.parameters + "bias")
    if x.dim() == 2:
        return F.linear(x, weight.flatten(1), bias)
    return F.conv2d(x, weight, bias, node.stride, node.padding, node.dilation, node.groups)


def _run_batch_norm(node: Node, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    names = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (state[node.parameters + name] for name in names)
    return F.batch_norm(x, mean, var, weight, bias, eps=node.eps)


def _spread(x: Tensor) -> Tensor:
    """Return a vector as a map of one pixel; maps stay as they are."""
    return x[:, :, None, None] if x.dim() == 2 else x


def _run_linear(node: Node, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    weight, bias = state[node.parameters + "weight"], state.get(node.parameters + "bias")
    return F.linear(x.flatten(1), weight, bias)


def _run_pixel_linear(node: Node, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    weight, bias = state[node.parameters + "weight"], state.get(node.parameters + "bias")
    if bias is not None and not node.key_bias:
        bias = without_key_bias(bias)
    return F.conv2d(x, weight[:, :, None, None], bias)


def without_key_bias(bias: Tensor) -> Tensor:
    """Return a copy of a bias of queries, keys and values, with zeros for the keys."""
    query, key, value = bias.chunk(3)
    return torch.cat([query, torch.zeros_like(key), value])


def _run_layer_norm(node: Node, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    weight, bias = (state.get(node.parameters + name) for name in _WEIGHTS)
    normalized = F.layer_norm(x.movedim(1, -1), (x.shape[1],), weight, bias, node.eps)
    return normalized.movedim(-1, 1)


def _run_scale(node: Node, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return x * state[node.parameters].reshape(1, -1, 1, 1)


def _run_prepend(node: Node, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    first = state[node.parameters].reshape(1, node.tokens, x.shape[1]).mT
    return torch.cat([first.expand(len(x), -1, -1), x.flatten(2)], 2)[:, :, None]


def _run_embedding(node: Node, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return x + state[node.parameters].reshape(-1, x.shape[1]).T.reshape(x.shape[1:])


def windows_of(node: Node, size: tuple[int, int]) -> Windows:
    """Return the windows of an attention that reads a map of a size."""
    window = size if node.window == (0, 0) else node.window
    return Windows(size, window, node.shift, node.spread)


def position_bias(node: Node, state: Mapping[str, Tensor]) -> Tensor | None:
    """Return what an attention adds to the scores (heads, queries, keys) of each window."""
    if not node.position_bias:
        return None
    first, index, *mlp = (state[name] for name in entries(node)[: _NUM_BIAS[node.position_bias]])
    table = first
    if node.position_bias == "continuous":
        hidden = F.linear(first, *mlp[:2]).relu()
        table = 16 * torch.sigmoid(F.linear(hidden, mlp[2]))
    tokens = math.isqrt(index.numel())
    return table.reshape(-1, node.heads)[index.flatten()].T.reshape(-1, tokens, tokens)


_NUM_BIAS = {kind: len(names) for kind, names in POSITION_BIAS.items()}


def cosine_scale(node: Node, state: Mapping[str, Tensor]) -> Tensor:
    """Return by what a cosine attention multiplies the scores of each head."""
    return state[node.parameters + "logit_scale"].flatten().clamp(max=math.log(100)).exp()


def _run_attention(node: Node, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    num_images, _, height, width = x.shape
    windows = windows_of(node, (height, width))
    row, column = map(torch.from_numpy, windows.pixels())
    tokens = x[:, :, row, column].reshape(num_images, 3, node.heads, -1, *row.shape)
    query, key, value = tokens.permute(1, 0, 4, 2, 5, 3)  # (images, windows, heads, tokens, depth)
    scale = node.score_scale
    if node.cosine:
        scale, factor = 1.0, cosine_scale(node, state)[:, None, None]
        query, key = factor * F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    added = position_bias(node, state)
    if windows.shift != (0, 0):
        masks = torch.from_numpy(windows.masks())[:, None].to(x.dtype)
        added = masks if added is None else added + masks
    shares = F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scale)
    found = torch.empty_like(x[:, : x.shape[1] // 3])
    mixed = shares.permute(0, 2, 4, 1, 3)
    found[:, :, row, column] = mixed.reshape(num_images, -1, *row.shape)
    return found


def _run_slice(node: Node, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    size = tuple(x.shape[2:])
    steps = zip(node.start, node.stride, node.output, strict=True)
    rows, columns = (first + step * torch.arange(count) for first, step, count in steps)
    inside = (rows < size[0])[:, None] & (columns < size[1])
    taken = x[:, :, rows.clamp(max=size[0] - 1)[:, None], columns.clamp(max=size[1] - 1)]
    return taken.where(inside, 0)


_TORCH: dict[str, Callable[..., Tensor]] = {
    "pixel_linear": _run_pixel_linear,
    "layer_norm": _run_layer_norm,
    "scale": _run_scale,
    "prepend": _run_prepend,
    "embedding": _run_embedding,
    "attention": _run_attention,
    "slice": _run_slice,
    "tanh": lambda node, state, x: torch.tanh(x),
    "token": lambda node, state, x: x.flatten(2)[:, :, node.index],
    "conv": _run_conv,
    "batch_norm": _run_batch_norm,
    "linear": _run_linear,
    "add": lambda node, state, x, y: x + y,
    "mul": lambda node, state, x, y: _spread(x) * _spread(y),
    "max_pool": lambda node, state, x: F.max_pool2d(
        x, node.kernel, node.stride, node.padding, ceil_mode=node.ceil_mode
    ),
    "avg_pool": lambda node, state, x: F.avg_pool2d(x, node.kernel, node.stride, node.padding),
    "mean_pool": lambda node, state, x: x.mean((2, 3)),
    "adaptive_avg_pool": lambda node, state, x: F.adaptive_avg_pool2d(x, node.output),
    "concat": lambda node, state, *x: torch.cat(x, 1),
    "chunk": lambda node, state, x: x.chunk(node.groups, 1)[node.index],
    "shuffle": lambda node, state, x: F.channel_shuffle(x, node.groups),
    "relu": lambda node, state, x: F.relu(x),
    "relu6": lambda node, state, x: F.relu6(x),
    "silu": lambda node, state, x: F.silu(x),
    "hardswish": lambda node, state, x: F.hardswish(x),
    "hardsigmoid": lambda node, state, x: F.hardsigmoid(x),
    "sigmoid": lambda node, state, x: torch.sigmoid(x),
    "gelu": lambda node, state, x: F.gelu(x),
    "gelu_tanh": lambda node, state, x: F.gelu(x, approximate="tanh"),
}
