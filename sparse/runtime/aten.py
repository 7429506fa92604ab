"""What the operations of torch.export become in a graph.

Reshapes and transpositions only give other views. An operation of another kind, or with options
that the runtime does not have, is a ValueError that says why.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .graph import gelu, pair
from .interpreter import BATCH_SIZE, Handler, Interpreter
from .layout import out_size
from .views import BATCH, CHANNELS, PIXELS, REPEATED, WEIGHT, Dim, Part, View, axis_of, merged

aten = torch.ops.aten

_WEIGHTS = {1: "weight", 2: "bias"}


def _same(made: Interpreter, node: fx.Node) -> View:
    return made.view(node)


def _reshape(made: Interpreter, node: fx.Node) -> View:
    return made.view(node).reshaped(made.shape(node))


def _permute(made: Interpreter, node: fx.Node) -> View:
    view, order = made.view(node), made.argument(node, 1, "dims")
    return view.permuted([i % len(view.dims) for i in order])


def _transpose(made: Interpreter, node: fx.Node) -> View:
    view = made.view(node)
    order = list(range(len(view.dims)))
    a, b = (made.argument(node, i) % len(order) for i in (1, 2))
    order[a], order[b] = b, a
    return view.permuted(order)


def _expand(made: Interpreter, node: fx.Node) -> View:
    return made.view(node).expanded(made.shape(node))


def _select(made: Interpreter, node: fx.Node) -> View:
    view = made.view(node)
    dim = made.argument(node, 1, "dim") % len(view.dims)
    index = made.argument(node, 2, "index") % view.sizes()[dim]
    return view.taken(dim, index, index + 1).reshaped(made.shape(node))


def _slice(made: Interpreter, node: fx.Node) -> View:
    view = made.view(node)
    dim = made.argument(node, 1, "dim", 0) % len(view.dims)
    size = view.sizes()[dim]
    if made.argument(node, 4, "step", 1) != 1:
        raise ValueError("it takes other parts than ranges of channels or pixels")
    begin, end, _ = slice(made.argument(node, 2, "start"), made.argument(node, 3, "end")).indices(
        size
    )
    return view.taken(dim, begin, end)


def _cut(made: Interpreter, node: fx.Node) -> list[View]:
    """Return the views of split, chunk and unbind."""
    view = made.view(node)
    shapes = [tuple(value.shape) for value in node.meta["val"]]
    is_unbound = len(shapes[0]) < len(view.dims)
    dim = made.argument(node, 1 if is_unbound else 2, "dim", 0) % len(view.dims)
    found, begin = [], 0
    for shape in shapes:
        end = begin + (1 if is_unbound else shape[dim])
        found.append(view.taken(dim, begin, end).reshaped(shape))
        begin = end
    return found


def _item(made: Interpreter, node: fx.Node) -> Any:
    return made.views_of(node, made.argument(node, 0))[made.argument(node, 1)]


def _linear(made: Interpreter, node: fx.Node) -> View:
    view = made.read(node)
    pixels = made.size_of(view)
    channels = made.shape(node)[-1]
    prefix = made.prefix(node, _WEIGHTS)
    if made.ends_with_channels(view):
        dims = (*view.dims[:-1], axis_of(CHANNELS, channels))
        op = "linear" if pixels is None else "pixel_linear"
        return made.add_alike(node, op, view, channels=channels, dims=dims, parameters=prefix)
    if pixels is None or view.dims != made.flat(view):
        raise ValueError("it mixes pixels")
    return made.add(node, "linear", view, channels=channels, parameters=prefix)


def _layer_norm(made: Interpreter, node: fx.Node) -> View:
    view = made.read(node)
    if len(made.argument(node, 1)) != 1 or not made.ends_with_channels(view):
        raise ValueError("it normalizes other numbers than the channels of a pixel")
    weights = {2: "weight", 3: "bias"}
    eps = made.argument(node, 4, "eps", 1e-5)
    return made.add_alike(node, "layer_norm", view, parameters=made.prefix(node, weights), eps=eps)


def _attention(made: Interpreter, node: fx.Node) -> View:
    views = [made.view(node, i) for i in range(3)]
    query = views[0]
    heads, width = query.sizes()[1], query.sizes()[3]
    size, channels = made.size_of(query), heads * width
    options = [made.argument(node, i, name) for i, name in enumerate(_ATTENTION, 3)]
    if any(options[:3]) or options[4]:
        raise ValueError("it has a mask, dropout, an order of tokens or groups of heads")
    dims = None
    if size is not None:
        tokens = axis_of(PIXELS, size[0] * size[1])
        split = merged([Part(CHANNELS, heads, width)]), tokens, axis_of(CHANNELS, width)
        dims = (axis_of(BATCH, BATCH_SIZE), *split)
    wanted = [View(query.name, dims or (), i * channels) for i in range(3)]
    if dims is None or views != wanted or made.channels_of(query) != 3 * channels:
        raise ValueError("its queries, keys and values are not the thirds of one layer")
    scale = options[3]
    values: dict[str, Any] = {
        "heads": heads,
        "score_scale": width**-0.5 if scale is None else float(scale),
    }
    found = made.add(node, "attention", query, channels=channels, pixels=size, **values)
    return replace(found, dims=dims)


_ATTENTION = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def _multiply(made: Interpreter, node: fx.Node) -> View:
    views = [made.view(node, i) for i in (0, 1)]
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
    views = [made.view(node, i) for i in (0, 1)]
    if made.argument(node, 2, "alpha", 1) != 1:
        raise ValueError("it has an alpha")
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
    if first.dims != second.dims or made.size_of(first) != made.size_of(second):
        raise ValueError("it adds values of different shapes")
    return made.add_alike(node, "add", first, second)


def _expect(weight: View, value: View, by_axis: Mapping[str, Part]) -> None:
    """Check that a weight has numbers for whole axes of a value, and is the same along others."""
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
    sizes = {made.size_of(view) for view in maps}
    are_maps = all(made.is_plain(view) for view in maps) and None not in sizes
    if not are_maps or len(sizes) > 1 or made.argument(node, 1, "dim", 0) not in (1, -3):
        raise ValueError("it joins other values than the channels of maps")
    shape = made.shape(node)
    return made.add(node, "concat", *maps, channels=shape[1], pixels=shape[2:])


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
        if size is None or value.dims != (order[0], pixels, order[2]):
            raise ValueError("it concatenates other values than tokens before a map")
        count = weight.sizes()[1]
        repeated = (Part(REPEATED, BATCH_SIZE, 0),)
        rows = merged([Part(WEIGHT, count, channels)]), merged([Part(WEIGHT, channels, 1)])
        if weight.dims != (repeated, *rows) or made.argument(node, 1, "dim", 0) not in (1, -2):
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
    found = made.add(
        node,
        "conv",
        view,
        channels=shape[1],
        pixels=shape[2:] if is_map else None,
        parameters=made.prefix(node, _WEIGHTS),
        kernel=tuple(made.shape(kernel)[2:]),
        stride=pair(stride),
        padding=pair(padding),
        dilation=pair(dilation),
        groups=groups,
    )
    return found if is_map else replace(found, dims=(*found.dims, (), ()))


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
    return lambda made, node: made.add_alike(node, op, made.read(node))


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
    known: dict[Any, Handler] = dict.fromkeys(_SAME, _same)
    known |= dict.fromkeys(_RESHAPES, _reshape)
    known |= dict.fromkeys(_CUTS, _cut)
    known |= {function: _activation(name) for name, function in _ACTIVATIONS.items()}
    return known | {
        aten.permute.default: _permute,
        aten.transpose.int: _transpose,
        aten.expand.default: _expand,
        aten.select.int: _select,
        aten.slice.Tensor: _slice,
        operator.getitem: _item,
        aten.linear.default: _linear,
        aten.layer_norm.default: _layer_norm,
        aten.scaled_dot_product_attention.default: _attention,
        aten.mul.Tensor: _multiply,
        aten.add.Tensor: _sum,
        aten.cat.default: _concatenate,
        aten.conv2d.default: _convolve,
        aten.batch_norm.default: _batch_norm,
        aten._native_batch_norm_legit_no_training.default: _first_of(_batch_norm),
        aten.mean.dim: _mean,
        aten.adaptive_avg_pool2d.default: _adaptive_pool,
        aten.max_pool2d.default: _pool,
        aten.avg_pool2d.default: _pool,
        aten.gelu.default: _gelu,
        aten.hardtanh.default: _clamp,
    }


_SAME = (
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
)
_RESHAPES = (
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.view.default,
    aten._unsafe_view.default,
)
_CUTS = (
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
)
_ACTIVATIONS: dict[str, Any] = {
    "relu": aten.relu.default,
    "relu6": aten.relu6.default,
    "silu": aten.silu.default,
    "hardswish": aten.hardswish.default,
    "hardsigmoid": aten.hardsigmoid.default,
    "sigmoid": aten.sigmoid.default,
}
OPERATIONS = _operations()
"""What each operation of torch becomes."""
