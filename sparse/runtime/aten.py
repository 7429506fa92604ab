"""What the operations of torch.export become in a graph.

An operation of another kind, or with options that the runtime does not have, is a ValueError that
says why.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from . import aten_attention as attention
from . import aten_views
from .graph import gelu, pair
from .interpreter import BATCH_SIZE, Handler, Interpreter
from .layout import out_size
from .views import BATCH, CHANNELS, PIXELS, REPEATED, WEIGHT, Dim, Part, View, axis_of, merged

aten = torch.ops.aten

_WEIGHTS = {1: "weight", 2: "bias"}


def _linear(made: Interpreter, node: fx.Node) -> View:
    if made.view(node).is_weight:
        return _computed(made, node, "linear", made.entry(node, 1), made.entry(node, 2))
    view = made.read(node)
    pixels = made.size_of(view)
    channels = made.shape(node)[-1]
    values: dict[str, Any] = {}
    steps: tuple[tuple[Any, ...], ...] = ()
    if pixels is not None and _has_no_key_bias(made, node, channels):
        values["key_bias"], steps = False, (_without_keys(channels),)
    prefix = made.prefix(node, _WEIGHTS, *steps)
    if made.ends_with_channels(view):
        dims = (*view.dims[:-1], axis_of(CHANNELS, channels))
        op = "linear" if pixels is None else "pixel_linear"
        values |= {"parameters": prefix, "channels": channels, "dims": dims}
        return made.add_alike(node, op, view, **values)
    if pixels is None or view.dims != made.flat(view) or view.shift != (0, 0) or values:
        raise ValueError("it mixes pixels")
    return made.add(node, "linear", view, channels=channels, parameters=prefix)


def _without_keys(channels: int) -> tuple[Any, ...]:
    """Return the step that sets the middle third of a bias to 0."""
    return "zeroed", channels // 3, channels // 3 * 2


def _has_no_key_bias(made: Interpreter, node: fx.Node, channels: int) -> bool:
    if made.argument(node, 2) is None:
        return False
    return channels % 3 == 0 and made.view(node, 2).steps == (_without_keys(channels),)


def _computed(made: Interpreter, node: fx.Node, *step: Any) -> View:
    """Return what an operation computes from an entry."""
    view = made.view(node)
    if view != made.weights(view.name, view.sizes(), *view.steps):
        raise ValueError("it computes with weights in another order")
    return made.weights(view.name, made.shape(node), *view.steps, step)


def _index(made: Interpreter, node: fx.Node) -> View:
    """Follow a table of weights by rows, as of relative positions."""
    indices: Any = made.argument(node, 1)
    table = made.view(node)
    if not table.is_weight or len(table.dims) != 2 or len(indices) != 1:
        raise ValueError("it takes numbers by their index")
    index = made.view_of(node, indices[0])
    if index != made.weights(index.name, index.sizes()):
        raise ValueError("it takes numbers by their index")
    return _computed(made, node, "index", index.name)


def _scatter(made: Interpreter, node: fx.Node) -> View:
    """Set a range of a bias to 0."""
    view, zeros = made.view(node), made.constant(node, 1)
    is_whole = view == made.weights(view.name, view.sizes())
    if not is_whole or len(view.dims) != 1 or zeros is None or bool(zeros.any()):
        raise ValueError("it writes to other numbers than a range of a bias")
    options = (made.argument(node, i, name) for i, name in enumerate(("start", "end", "step"), 3))
    begin, end, step = slice(*options).indices(view.sizes()[0])
    if step != 1:
        raise ValueError("it writes to other numbers than a range of a bias")
    return replace(view, steps=(("zeroed", begin, end),))


def _zeros(made: Interpreter, node: fx.Node) -> torch.Tensor:
    return torch.zeros(made.shape(node), dtype=node.meta["val"].dtype, device="cpu")


def _layer_norm(made: Interpreter, node: fx.Node) -> View:
    view = made.read(node)
    if len(made.argument(node, 1)) != 1 or not made.ends_with_channels(view):
        raise ValueError("it normalizes other numbers than the channels of a pixel")
    weights = {2: "weight", 3: "bias"}
    eps = made.argument(node, 4, "eps", 1e-5)
    return made.add_alike(node, "layer_norm", view, parameters=made.prefix(node, weights), eps=eps)


def _multiply(made: Interpreter, node: fx.Node) -> View:
    if not isinstance(made.argument(node, 1), fx.Node):
        return attention.scaled(made, node, made.view(node), made.argument(node, 1))
    views = [made.view(node, i) for i in (0, 1)]
    if attention.scores_of(made, views[0]) and views[1].is_weight:
        return attention.multiplied(made, node, *views)
    if not any(view.is_weight for view in views):
        return _excite(made, node)
    weight, value = sorted(views, key=lambda view: not view.is_weight)
    value = made.whole(node, value)
    _expect(weight, value, {CHANNELS: Part(WEIGHT, made.channels_of(value), 1)})
    if made.size_of(value) is None:
        raise ValueError("it scales a vector")
    return made.add_alike(node, "scale", value, parameters=weight.name)


def _excite(made: Interpreter, node: fx.Node) -> View:
    """Multiply each channel of a map by an element of a vector, as in squeeze-and-excitation."""
    views = [made.read(node, i) for i in (0, 1)]
    factor, value = sorted(views, key=lambda view: made.size_of(view) is not None)
    if made.size_of(factor) is not None or made.size_of(value) is None:
        raise ValueError("it multiplies two maps or two vectors")
    if not made.is_plain(value) or not made.is_plain(factor):
        raise ValueError("it reads no map (N, C, H, W)")
    return made.add_alike(node, "mul", value, factor)


def _sum(made: Interpreter, node: fx.Node) -> View:
    if made.argument(node, 2, "alpha", 1) != 1:
        raise ValueError("it has an alpha")
    mask = made.constant(node, 1)
    if mask is not None and attention.scores_of(made, made.view(node)):
        return attention.masked(made, node, made.view(node), mask)
    views = [made.view(node, i) for i in (0, 1)]
    if attention.scores_of(made, views[0]) and views[1].is_weight:
        return attention.biased(made, node, *views)
    if any(view.is_weight for view in views):
        weight, value = sorted(views, key=lambda view: not view.is_weight)
        value = made.whole(node, value)
        size, channels = made.size_of(value), made.channels_of(value)
        if size is None:
            raise ValueError("it adds weights to a vector")
        wanted = Part(PIXELS, size[0] * size[1], 1)
        by_axis = {CHANNELS: Part(WEIGHT, channels, 1)}
        by_axis[PIXELS] = Part(WEIGHT, wanted.size, channels)
        _expect(weight, value, by_axis)
        return made.add_alike(node, "embedding", value, parameters=weight.name, size=size)
    first, second = (made.read(node, i) for i in (0, 1))
    if not made.are_alike(first, second):
        raise ValueError("it adds values of different shapes")
    return made.add_alike(node, "add", first, second)


def _expect(weight: View, value: View, by_axis: Mapping[str, Part]) -> None:
    """Check that a weight has numbers for whole axes of a value, and is the same along others."""
    if weight.steps or (PIXELS in by_axis and value.shift != (0, 0)):
        raise ValueError("the order of its weights is not known")
    missing = len(value.dims) - len(weight.dims)
    own = [*[()] * missing, *weight.dims]
    for dim, numbers in zip(value.dims, own, strict=True):
        wanted: Dim = ()
        if len(dim) == 1 and dim[0].axis in by_axis:
            wanted = merged([by_axis[dim[0].axis]])
        if numbers != wanted:
            raise ValueError("the order of its weights is not known")


def _join(made: Interpreter, node: fx.Node, views: Sequence[View]) -> View:
    """Return maps with their channels joined."""
    maps = [made.whole(node, view) for view in views]
    dim = made.argument(node, 1, "dim", 0) % len(maps[0].dims)
    whole = [axis_of(CHANNELS, made.channels_of(view)) for view in maps]
    shown = [view.dims[dim] for view in maps]
    if shown != whole or made.size_of(maps[0]) is None:
        raise ValueError("it joins other values than the channels of maps")
    if () in shown and not (dim == 1 and all(made.is_plain(view) for view in maps)):
        raise ValueError("it joins maps of one channel that are no maps (N, C, H, W)")
    channels = sum(made.channels_of(view) for view in maps)
    dims = (*maps[0].dims[:dim], axis_of(CHANNELS, channels), *maps[0].dims[dim + 1 :])
    joined = [replace(view, dims=dims) for view in maps]
    if not all(made.are_alike(joined[0], view) for view in joined):
        raise ValueError("it joins other values than the channels of maps")
    return made.add_alike(node, "concat", *maps, channels=channels, dims=dims)


def _concatenate(made: Interpreter, node: fx.Node) -> View:
    sources: Any = node.args[0]
    *tokens, last = views = [made.view_of(node, source) for source in sources]
    if not tokens:
        return last
    if not any(view.is_weight for view in views):
        return _join(made, node, views)
    if not all(view.is_weight for view in tokens) or last.is_weight:
        raise ValueError("it concatenates other values than tokens before a map")
    value = made.whole(node, last)
    channels = made.channels_of(value)
    order = (axis_of(BATCH, BATCH_SIZE), (), axis_of(CHANNELS, channels))
    for i, weight in reversed(list(enumerate(tokens))):
        size = made.size_of(value)
        pixels = () if size is None else axis_of(PIXELS, size[0] * size[1])
        if size is None or value.dims != (order[0], pixels, order[2]) or value.shift != (0, 0):
            raise ValueError("it concatenates other values than tokens before a map")
        count = weight.sizes()[1]
        repeated = (Part(REPEATED, BATCH_SIZE, 0),)
        rows = merged([Part(WEIGHT, count, channels)]), merged([Part(WEIGHT, channels, 1)])
        if (
            weight.dims != (repeated, *rows)
            or weight.steps
            or made.argument(node, 1, "dim", 0) not in (1, -2)
        ):
            raise ValueError("it concatenates other values than tokens before a map")
        total = count + size[0] * size[1]
        suffix = f"_{i}" if i else ""
        values: dict[str, Any] = {"parameters": weight.name, "size": size, "tokens": count}
        value = made.add(node, "prepend", value, pixels=(1, total), suffix=suffix, **values)
        value = value.permuted([0, 3, 1, 2]).reshaped([BATCH_SIZE, total, channels])
    return value


def _convolve(made: Interpreter, node: fx.Node) -> View:
    view = made.read_plain(node)
    stride, padding, dilation, groups = (made.argument(node, i, n, d) for i, n, d in _CONVOLUTION)
    kernel: Any = made.argument(node, 1)
    shape = made.shape(node)
    is_map = made.size_of(view) is not None
    size = tuple(made.shape(kernel)[2:])
    if isinstance(padding, str):
        padding = _padding_of_name(padding, size, pair(dilation))
    found = made.add(
        node,
        "conv",
        view,
        channels=shape[1],
        pixels=shape[2:] if is_map else None,
        parameters=made.prefix(node, _WEIGHTS),
        kernel=size,
        stride=pair(stride),
        padding=pair(padding),
        dilation=pair(dilation),
        groups=groups,
    )
    return found if is_map else replace(found, dims=(*found.dims, (), ()))


def _padding_of_name(name: str, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Return as numbers what nn.Conv2d calls "valid" and "same"."""
    if name == "valid":
        return 0, 0
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if any(pixels % 2 for pixels in reach):
        raise ValueError("it pads more on one side than on the other")
    return tuple(pixels // 2 for pixels in reach)


_CONVOLUTION = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1), (6, "groups", 1))


def _batch_norm(made: Interpreter, node: fx.Node) -> View:
    view = made.read_plain(node)
    entries = {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"}
    eps = node.args[_EPS[node.target]]
    return made.add_alike(node, "batch_norm", view, parameters=made.prefix(node, entries), eps=eps)


_EPS: dict[Any, int] = {
    aten.batch_norm.default: 7,
    aten._native_batch_norm_legit_no_training.default: 6,
}


def _first_of(handler: Handler) -> Handler:
    """Return the handler of an operation that returns several values, of which one is used."""
    return lambda made, node: [handler(made, node)]


def _mean(made: Interpreter, node: fx.Node) -> View:
    view = made.read(node)
    size = made.size_of(view)
    axes = {i % len(view.dims) for i in made.argument(node, 1, "dim")}
    left = [dim for i, dim in enumerate(view.dims) if i not in axes]
    seen = [part.axis for i in axes for part in view.dims[i]]
    if (
        size is None
        or any(axis != PIXELS for axis in seen)
        or any(part.axis == PIXELS for dim in left for part in dim)
    ):
        raise ValueError("it averages other numbers than the pixels of a map")
    made.add(node, "mean_pool", view)
    dims = [() if i in axes else dim for i, dim in enumerate(view.dims)]
    if not made.argument(node, 2, "keepdim", False):
        dims = left
    return View(node.name, tuple(dims))


def _adaptive_pool(made: Interpreter, node: fx.Node) -> View:
    (view, _), size = made.read_map(node), made.shape(node)[2:]
    if size != (1, 1):
        return made.add(node, "adaptive_avg_pool", view, pixels=size, output=size)
    made.add(node, "mean_pool", view)
    return View(node.name, (*view.dims[:2], (), ()))


def _pool(made: Interpreter, node: fx.Node) -> View:
    view, size = made.read_map(node)
    kernel = pair(made.argument(node, 1))
    stride, padding = (made.argument(node, i, n) for i, n in ((2, "stride"), (3, "padding")))
    values: dict[str, Any] = {"kernel": kernel, "stride": pair(stride) if stride else kernel}
    values["padding"] = pair(padding) if padding else (0, 0)
    op = "max_pool"
    if node.target is aten.max_pool2d.default:
        if set(pair(made.argument(node, 4, "dilation", 1))) != {1}:
            raise ValueError("it has a dilation")
        values["ceil_mode"] = bool(made.argument(node, 5, "ceil_mode", False))
    else:
        op = "avg_pool"
        ceil_mode, counts_pad, divisor = (
            made.argument(node, i, n, d) for i, n, d in _AVERAGE_OPTIONS
        )
        if divisor or (not counts_pad and values["padding"] != (0, 0)):
            raise ValueError("average-pooling with options")
        sides = zip(size, kernel, values["stride"], values["padding"], strict=True)
        if ceil_mode and tuple(out_size(*side, 1) for side in sides) != made.shape(node)[2:]:
            raise ValueError("its last window reaches beyond the image")
    return made.add(node, op, view, pixels=made.shape(node)[2:], **values)


_AVERAGE_OPTIONS = (
    (4, "ceil_mode", False),
    (5, "count_include_pad", True),
    (6, "divisor_override", None),
)


def _activation(op: str) -> Handler:
    def add(made: Interpreter, node: fx.Node) -> View:
        view = made.view(node)
        if view.is_weight:
            return replace(view, steps=(*view.steps, (op,)))
        return made.add_alike(node, op, made.read(node))

    return add


def _of_weights(op: str, *arguments: str) -> Handler:
    """Return the handler of an operation that is known for weights only."""

    def follow(made: Interpreter, node: fx.Node) -> View:
        view = made.view(node)
        if not view.is_weight:
            raise ValueError("it computes with other numbers than weights")
        found = (made.argument(node, i, name) for i, name in enumerate(arguments, 1))
        return replace(view, steps=(*view.steps, (op, *found)))

    return follow


def _clamp(made: Interpreter, node: fx.Node) -> View:
    """Add a ReLU6, which torch.export writes so."""
    if [made.argument(node, i, n, d) for i, n, d in _CLAMP] != [0, 6]:
        raise ValueError("its limits are others than 0 and 6")
    return made.add_alike(node, "relu6", made.read(node))


_CLAMP = ((1, "min_val", -1), (2, "max_val", 1))


def _gelu(made: Interpreter, node: fx.Node) -> View:
    op = gelu(str(node.kwargs.get("approximate", "none")))
    return made.add_alike(node, op, made.read(node))


def _operations() -> dict[Any, Handler]:
    known = {function: _activation(name) for name, function in _ACTIVATIONS.items()}
    return (
        aten_views.OPERATIONS
        | known
        | {
            aten.linear.default: _linear,
            aten.layer_norm.default: _layer_norm,
            aten.scaled_dot_product_attention.default: attention.attention,
            aten.matmul.default: attention.product,
            aten.bmm.default: attention.product,
            aten.einsum.default: attention.einsum,
            aten.softmax.int: attention.softmax,
            aten._softmax.default: attention.softmax,
            aten.linalg_vector_norm.default: attention.length,
            aten.clamp_min.default: attention.at_least,
            aten.div.Tensor: attention.quotient,
            aten.clamp.default: _of_weights("clamp", "min", "max"),
            aten.exp.default: _of_weights("exp"),
            aten.index.Tensor: _index,
            aten.slice_scatter.default: _scatter,
            aten.zero.default: _zeros,
            aten.new_zeros.default: _zeros,
            aten.mul.Tensor: _multiply,
            aten.add.Tensor: _sum,
            aten.cat.default: _concatenate,
            aten.conv2d.default: _convolve,
            aten.conv2d.padding: _convolve,
            aten.batch_norm.default: _batch_norm,
            aten._native_batch_norm_legit_no_training.default: _first_of(_batch_norm),
            aten.mean.dim: _mean,
            aten.adaptive_avg_pool2d.default: _adaptive_pool,
            aten.max_pool2d.default: _pool,
            aten.avg_pool2d.default: _pool,
            aten.gelu.default: _gelu,
            aten.hardtanh.default: _clamp,
        }
    )


_ACTIVATIONS: dict[str, Any] = {
    "relu": aten.relu.default,
    "relu6": aten.relu6.default,
    "silu": aten.silu.default,
    "hardswish": aten.hardswish.default,
    "hardsigmoid": aten.hardsigmoid.default,
    "sigmoid": aten.sigmoid.default,
    "tanh": aten.tanh.default,
}
OPERATIONS = _operations()
"""What each operation of torch becomes."""
