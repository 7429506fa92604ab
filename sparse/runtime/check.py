"""All rules that a graph must obey so that the runtime can compute it.

A graph is checked when it is traced and when it is read from a file: first on its own, then against
the shapes of its weights. It is checked against the size of images when the images come.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction

from torch import Tensor

from . import memory
from .graph import (
    ACTIVATIONS,
    INPUT,
    KERNELS,
    OPS,
    POSITION_BIAS,
    VECTORS,
    Node,
    entries,
    folds,
    index_entry,
    vectors,
)
from .layout import out_size

MAX_NODES = 10_000
MAX_EXTENT = 1024
"""Limit, in pixels, of the extent of a window, of its stride and of its padding."""
MAX_SCALE = 1e30
MAX_SIDE = 2**16
MAX_CHANNELS = 2**16
"""Limit of the channels of the images, and of those that are concatenated."""
MAX_WINDOWS = 2**24
"""Limit of the weights that lowering adds for average-pools and lone BatchNorms, sums and
activations, and of the numbers of position biases."""

Shape = tuple[int, ...]
Size = tuple[int, int]

_WINDOWS = ("conv", "max_pool", "avg_pool")
_FIXED = ("prepend", "embedding")
"""Operations that take maps of one size only. Those which read the images may do so, too."""
_INPUTS = {**dict.fromkeys(OPS, 1), "add": 2, "mul": 2}
_NORM = ("weight", "bias", "running_mean", "running_var")


def check(nodes: Sequence[Node]) -> None:
    """Check a graph on its own.

    Raises:
        ValueError: Names the node that the runtime cannot compute, and why.
    """
    if not 1 <= len(nodes) <= MAX_NODES:
        raise ValueError(f"the graph must have 1 to {MAX_NODES} operations, it has {len(nodes)}")
    readers = Counter(name for node in nodes for name in node.inputs)
    flat = vectors(nodes)
    known = {INPUT}
    for node in nodes:
        where = f"operation {node.name!r} ({node.op})"
        if node.name in known:
            raise ValueError(f"{where} has the name of another value")
        fits = len(node.inputs) > 1 if node.op == "concat" else len(node.inputs) == _INPUTS[node.op]
        if not fits or not known.issuperset(node.inputs):
            raise ValueError(f"{where} reads {node.inputs!r}, which was not computed before")
        _check_geometry(node, where)
        _check_kind(node, where, flat)
        known.add(node.name)
    unread = known - readers.keys() - {INPUT, nodes[-1].name}
    if unread:
        raise ValueError(f"no operation reads the value of {min(unread)!r}")


def _check_geometry(node: Node, where: str) -> None:
    plain = Node(name="", op="", inputs=())
    allowed = {"parameters": bool(entries(node))}
    allowed["eps"] = node.op in ("batch_norm", "layer_norm")
    attention = ("heads", "cosine", "position_bias", "window")
    allowed |= dict.fromkeys(attention, node.op == "attention")
    allowed |= dict.fromkeys(("shift", "spread"), node.window != (0, 0))
    allowed |= {"score_scale": node.op == "attention" and not node.cosine}
    allowed |= {"start": node.op == "slice", "key_bias": node.op == "pixel_linear"}
    allowed |= {"size": node.op in _FIXED or INPUT in node.inputs, "tokens": node.op == "prepend"}
    allowed |= {"ceil_mode": node.op == "max_pool"}
    allowed |= {"output": node.op in ("adaptive_avg_pool", "slice")}
    allowed |= {"index": node.op in ("chunk", "token")}
    allowed |= {"dilation": node.op == "conv", "groups": node.op in ("conv", "chunk", "shuffle")}
    allowed |= dict.fromkeys(("kernel", "padding"), node.op in _WINDOWS)
    allowed |= {"stride": node.op in (*_WINDOWS, "slice")}
    for name, has_effect in allowed.items():
        if not has_effect and getattr(node, name) != getattr(plain, name):
            raise ValueError(f"{where} has no {name}, the graph says {getattr(node, name)!r}")
    for name in ("kernel", "stride", "dilation", "output"):
        if min(getattr(node, name)) < 1:
            raise ValueError(f"{where}: {name} must be at least 1, got {getattr(node, name)}")
    if min(node.start) < 0 or max(node.start) > MAX_SIDE:
        raise ValueError(f"{where}: start {node.start} out of range")
    if min(node.padding) < 0 or node.groups < 1 or not 0 <= node.eps < 1:
        raise ValueError(
            f"{where}: padding {node.padding}, groups {node.groups} or eps {node.eps} out of range"
        )
    if node.op == "attention":
        _check_attention(node, where)
    needs_size = node.op in _FIXED or node.size != (0, 0)
    if needs_size and not 1 <= min(node.size) <= max(node.size) <= MAX_SIDE:
        raise ValueError(f"{where}: size {node.size} out of range")
    if node.op == "chunk" and not 0 <= node.index < node.groups:
        raise ValueError(f"{where}: there is no part {node.index} of {node.groups}")
    if node.index < 0 or (node.op == "prepend" and node.tokens < 1):
        raise ValueError(f"{where}: index {node.index} or tokens {node.tokens} out of range")
    extents = [d * (k - 1) + 1 for k, d in zip(node.kernel, node.dilation, strict=True)]
    if max(*extents, *node.stride, *node.padding, *node.output) > MAX_EXTENT:
        raise ValueError(
            f"{where}: kernel {node.kernel}, stride {node.stride}, padding {node.padding}, "
            f"dilation {node.dilation} or output {node.output} spans more than {MAX_EXTENT} pixels"
        )
    if node.op in ("max_pool", "avg_pool") and any(
        2 * p > k for k, p in zip(node.kernel, node.padding, strict=True)
    ):
        raise ValueError(
            f"{where}: padding {node.padding} is more than half of the kernel {node.kernel}"
        )


def _check_attention(node: Node, where: str) -> None:
    is_scaled = node.cosine or 0 < node.score_scale < MAX_SCALE
    if not (1 <= node.heads <= MAX_CHANNELS and is_scaled):
        raise ValueError(
            f"{where}: heads {node.heads} or score_scale {node.score_scale} out of range"
        )
    is_whole = node.window == (0, 0)
    if not is_whole and not 1 <= min(node.window) <= max(node.window) <= MAX_EXTENT:
        raise ValueError(f"{where}: window {node.window} out of range")
    if node.position_bias and is_whole:
        raise ValueError(f"{where}: a position bias needs a window")
    is_inside = all(0 <= s < max(1, w) for s, w in zip(node.shift, node.window, strict=True))
    if not is_inside or (node.spread and node.shift != (0, 0)):
        raise ValueError(f"{where}: shift {node.shift} of windows {node.window} out of range")


def _check_kind(node: Node, where: str, flat: set[str]) -> None:
    """Check that a node reads maps and vectors as its operation does."""
    read = flat.intersection(node.inputs)
    if node.op == "mul":
        if len(read) != 1 or len(set(node.inputs)) != 2:
            raise ValueError(f"the runtime multiplies maps by vectors only ({where})")
        return
    plain = (node.kernel, node.stride, node.padding, node.groups) == ((1, 1), (1, 1), (0, 0), 1)
    if read and node.op == "conv" and not plain:
        raise ValueError(f"the runtime has only plain 1x1 convolutions of vectors ({where})")
    if read and node.op not in ("conv", "batch_norm", "linear", "layer_norm", *ACTIVATIONS):
        raise ValueError(f"the runtime has no {node.op} of vectors ({where})")


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Return the shapes of a state dict."""
    return {name: tuple(value.shape) for name, value in state.items()}


def check_shapes(
    nodes: Sequence[Node], shapes: Mapping[str, Shape], *, in_channels: int, folded: bool
) -> dict[str, int]:
    """Check the shapes of a state dict against a graph; return the channels of every value.

    Args:
        nodes: A graph that `check` accepts.
        shapes: Shapes of the entries of the state dict.
        in_channels: Channels of the images.
        folded: Whether BatchNorm is folded into the convolutions (format.py).

    Raises:
        ValueError: Names the entry that is missing or does not fit.
    """
    only_bias = {norm.name for _, norm in folds(nodes)} if folded else set[str]()
    channels = {INPUT: in_channels}
    flat = vectors(nodes)
    derived = 0
    for node in nodes:
        read = [channels[name] for name in node.inputs]
        if len(set(read)) > 1 and node.op != "concat":
            raise ValueError(
                f"{node.op} {node.name!r} reads values of {read[0]} and {read[1]} channels"
            )
        channels[node.name] = read[0]
        if node.op in KERNELS:
            reads_map = node.op == "linear" and node.inputs[0] not in flat
            channels[node.name] = _check_weight(node, read[0], shapes, reads_map=reads_map)
        elif node.op in ("layer_norm", "scale", *_FIXED):
            _check_per_channel(node, read[0], shapes)
        elif node.op == "attention":
            if read[0] % (3 * node.heads):
                raise ValueError(
                    f"the attention {node.name!r} of {node.heads} heads reads {read[0]} channels"
                )
            channels[node.name] = read[0] // 3
            derived += _check_bias(node, shapes)
        elif node.op in ("concat", "chunk", "shuffle"):
            channels[node.name] = _regrouped(node, sum(read))
        elif node.op == "batch_norm":
            for name in _NORM:
                if name == "bias" or node.name not in only_bias:
                    _expect(shapes, node.parameters + name, (read[0],))
                elif node.parameters + name in shapes:
                    raise ValueError(f"{node.parameters + name!r} should have been folded")
        if node.op in ("batch_norm", "add", "avg_pool", "scale", *ACTIVATIONS):
            derived += read[0] * node.kernel[0] * node.kernel[1]
    if derived > MAX_WINDOWS:
        raise ValueError(
            f"the windows of average-pools and sums, and position biases, would take {derived} "
            f"weights, more than {MAX_WINDOWS}"
        )
    return channels


def _check_per_channel(node: Node, channels: int, shapes: Mapping[str, Shape]) -> None:
    """Check entries that have numbers for every channel: of a LayerNorm, a scale, or of tokens."""
    if node.op == "layer_norm":
        for name in entries(node):
            if name in shapes:
                _expect(shapes, name, (channels,))
        return
    name = node.parameters
    numbers = {"scale": 1, "prepend": node.tokens, "embedding": node.size[0] * node.size[1]}
    wanted = numbers[node.op] * channels
    found = shapes.get(name)
    if found is None or math.prod(found) != wanted:
        raise ValueError(
            f"{name!r} is {'missing' if found is None else found}, {node.name!r} needs {wanted} "
            f"numbers: {numbers[node.op]} for each of {channels} channels"
        )


def _check_bias(node: Node, shapes: Mapping[str, Shape]) -> int:
    """Check the entries of an attention; return how many numbers are computed from them."""
    prefix, pairs = node.parameters, (node.window[0] * node.window[1]) ** 2
    numbers = {prefix + "logit_scale": node.heads} if node.cosine else {}
    index = index_entry(node)
    if index is not None:
        numbers[index] = pairs
    for name, wanted in numbers.items():
        if name not in shapes or math.prod(shapes[name]) != wanted:
            raise ValueError(
                f"{name!r} is {shapes.get(name, 'missing')}, {node.name!r} needs {wanted} numbers"
            )
    if not node.position_bias:
        return 0
    first = prefix + POSITION_BIAS[node.position_bias][0]
    rows = shapes.get(first, ())[:-1]
    if node.position_bias == "table":
        _expect(shapes, first, (*rows[:1], node.heads))
        return node.heads * pairs
    hidden = shapes.get(prefix + "cpb_mlp.0.weight", ())[:1]
    _expect(shapes, first, (*rows, 2))
    _expect(shapes, prefix + "cpb_mlp.0.weight", (*hidden, 2))
    _expect(shapes, prefix + "cpb_mlp.0.bias", hidden)
    _expect(shapes, prefix + "cpb_mlp.2.weight", (node.heads, *hidden))
    return node.heads * pairs + math.prod((*rows, *hidden))


def _regrouped(node: Node, channels: int) -> int:
    """Return the channels of a concat, a chunk or a shuffle of so many channels."""
    if channels % node.groups or channels > MAX_CHANNELS:
        raise ValueError(
            f"{node.op} {node.name!r} reads {channels} channels, which are more than "
            f"{MAX_CHANNELS} or not {node.groups} equal groups"
        )
    return channels // node.groups if node.op == "chunk" else channels


def _check_weight(
    node: Node, channels: int, shapes: Mapping[str, Shape], *, reads_map: bool
) -> int:
    """Check weight and bias of a convolution or a linear layer; return its output channels."""
    weight = node.parameters + "weight"
    if weight not in shapes:
        raise ValueError(f"there is no {weight!r}, which {node.name!r} needs")
    out = shapes[weight][0] if shapes[weight] else 0
    if out < 1 or out % node.groups or channels % node.groups:
        raise ValueError(
            f"{node.groups} groups do not divide {channels} input and {out} output channels "
            f"of {weight!r}"
        )
    window = node.kernel if node.op == "conv" else ()
    columns = channels // node.groups
    if reads_map and len(shapes[weight]) == 2:  # as many pixels as images of a later size have
        columns *= max(1, shapes[weight][1] // columns)
    _expect(shapes, weight, (out, columns, *window))
    if node.parameters + "bias" in shapes:
        _expect(shapes, node.parameters + "bias", (out,))
    return out


def _expect(shapes: Mapping[str, Shape], name: str, wanted: Shape) -> None:
    if shapes.get(name) != wanted:
        raise ValueError(f"{name!r} is {shapes.get(name, 'missing')}, the graph needs {wanted}")


def linear_columns(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Return the numbers that linear layers read, by the names of their weights."""
    return {name: shape[1] for name, shape in shapes.items() if len(shape) == 2}


def check_images(
    nodes: Sequence[Node],
    channels: Mapping[str, int],
    columns: Mapping[str, int],
    height: int,
    width: int,
) -> None:
    """Check that a network can compute images of a size.

    Args:
        nodes: A graph that `check` accepts.
        channels: Result of `check_shapes`.
        columns: Result of `linear_columns`.
        height: Rows of the images.
        width: Columns of the images.

    Raises:
        ValueError: Names the size, and the operation for which it is too small or too large.
    """
    images = f"images of {height}x{width}"
    sizes = {INPUT: (height, width)}
    windows = 0
    if min(height, width) < 1:
        raise ValueError(f"{images} have no pixels")
    for node in nodes:
        read = [sizes[name] for name in node.inputs]
        first = max(read) if node.op == "mul" else read[0]  # the map, and not the vector
        if misfit := _misfit(node, first, read, channels, columns):
            raise ValueError(f"{images} do not fit this network{misfit}")
        size = made_size(node, first)
        if node.op == "adaptive_avg_pool":
            windows += channels[node.name] * first[0] * first[1] // (size[0] * size[1])
        if windows > MAX_WINDOWS:
            raise ValueError(
                f"{images} are too large for this network: the windows of adaptive pools would "
                f"take {windows} weights, more than {MAX_WINDOWS}"
            )
        if min(size) < 1:
            raise ValueError(
                f"{images} are too small for this network: nothing is left after {node.name!r}"
            )
        num_bytes = 4 * max(channels[node.name] * size[0] * size[1], _num_scores(node, first))
        if num_bytes > memory.limit():
            raise too_large(height, width, num_bytes)
        sizes[node.name] = size


def _num_scores(node: Node, size: Size) -> int:
    """Return the scores of an attention in windows; each may have another bias."""
    return node.heads * size[0] * size[1] * node.window[0] * node.window[1]


def _misfit(
    node: Node,
    first: Size,
    read: Sequence[Size],
    channels: Mapping[str, int],
    columns: Mapping[str, int],
) -> str:
    """Say why a node cannot read maps of some sizes; "" if it can."""
    shown = f"{first[0]}x{first[1]}"
    if node.op in _ALIKE:
        for other in read:
            if other != first:
                return f": {_ALIKE[node.op]} {shown} and {other[0]}x{other[1]} ({node.name!r})"
    if node.size not in ((0, 0), first):
        fixed = node.parameters if node.op in _FIXED else node.name
        return (
            f", which takes one size: {fixed!r} is made for {_pixels(node.size)}, and these images "
            f"give {_pixels(first)}"
        )
    if max(node.window) and any(s % w for s, w in zip(first, node.window, strict=True)):
        window = f"{node.window[0]}x{node.window[1]}"
        return f": {node.name!r} has windows of {window}, which do not divide {shown}"
    if node.op == "token" and node.index >= first[0] * first[1]:
        return f": {node.name!r} takes token {node.index}"
    if node.op == "linear":
        own, wanted = channels[node.inputs[0]], columns[node.parameters + "weight"]
        if first[0] * first[1] * own != wanted:
            return (
                f": the linear layer {node.name!r} reads {wanted // own} pixels per channel, and "
                f"{shown} are left"
            )
    if node.op == "adaptive_avg_pool":
        size = node.output
        if any(s % out for s, out in zip(first, size, strict=True)):
            return (
                f": {node.name!r} averages {shown} to {size[0]}x{size[1]}, which must be divisors"
            )
    return ""


def made_size(node: Node, first: Size) -> Size:
    """Return height and width of a node's value; a vector has 1x1."""
    if node.op in VECTORS:
        return 1, 1
    if node.op == "prepend":
        return 1, node.tokens + first[0] * first[1]
    if node.op in ("adaptive_avg_pool", "slice"):
        return node.output
    window = zip(node.kernel, node.stride, node.padding, node.dilation, strict=True)
    down, right = (
        out_size(s, *w, ceil_mode=node.ceil_mode) for s, w in zip(first, window, strict=True)
    )
    return down, right


_ALIKE = {"add": "the sum adds", "concat": "there are joined"}


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[1]} tokens" if size[0] == 1 else f"a map of {size[0]}x{size[1]}"


def too_large(height: int, width: int, num_bytes: int) -> ValueError:
    """Return the error for images whose activations do not fit into memory."""
    return ValueError(
        f"images of {height}x{width} are too large for this network: it would take "
        f"{num_bytes / 2**30:.1f} GiB, and half of the memory is {memory.limit() / 2**30:.1f}"
    )


def in_channels(nodes: Sequence[Node], shapes: Mapping[str, Shape]) -> int:
    """Return the channels of the images that a graph reads.

    If many numbers fit the graph, one of them is returned.
    """
    flat = vectors(nodes)
    # Of values that are computed channel by channel: channels per channel of the images, and more
    terms = {INPUT: (Fraction(1), Fraction(0))}
    for node in nodes:
        read = [terms.get(name, (Fraction(0), Fraction(0))) for name in node.inputs]
        slope, offset = (sum((term[i] for term in read), Fraction(0)) for i in (0, 1))
        if node.op == "chunk":
            slope, offset = slope / node.groups, offset / node.groups
        elif node.op == "attention":
            slope, offset = slope / 3, offset / 3
        elif node.op in (*KERNELS, "batch_norm", "layer_norm"):
            shape = shapes.get(node.parameters + "weight", ())
            axis = 1 if node.op in KERNELS else 0
            if slope and len(shape) > axis and (node.op != "linear" or node.inputs[0] in flat):
                return max(1, int((shape[axis] * node.groups - offset) / slope))
            if node.op in KERNELS:
                slope, offset = Fraction(0), Fraction(shape[0] if shape else 0)
        elif node.op != "concat":
            slope, offset = read[0]
        terms[node.name] = slope, offset
    return math.prod(node.groups for node in nodes if node.op in ("chunk", "shuffle"))
