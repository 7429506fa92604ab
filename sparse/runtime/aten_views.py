"""What the operations of torch.export become that only give other views: they compute nothing."""

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .interpreter import Handler, Interpreter
from .views import PIXELS, View, axis_of

aten = torch.ops.aten


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
    options = (made.argument(node, i, name) for i, name in enumerate(("start", "end", "step"), 2))
    return view.taken(dim, *slice(*options).indices(size))


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


def _pad(made: Interpreter, node: fx.Node) -> View:
    """Put zeros below a map and on its right."""
    pads: Any = made.argument(node, 1)
    if not any(pads):
        return made.view(node)
    view = made.read(node)
    size, count = made.size_of(view), len(view.dims)
    ends = [0] * (count - len(pads) // 2) + list(pads[1::2][::-1])
    plain = made.pixel_dims(view)
    rows = [i for i in range(count - 1) if view.dims[i : i + 2] == plain]
    rows = [i for i in rows if not any(ends[:i] + ends[i + 2 :])]
    fill = made.argument(node, 3, "value", 0) or 0
    is_known = made.argument(node, 2, "mode", "constant") == "constant" and fill == 0
    if size is None or not rows or any(pads[::2]) or min(ends) < 0 or not is_known:
        raise ValueError("it pads otherwise than with zeros below a map and on its right")
    if view.shift != (0, 0):
        raise ValueError("it pads a map that was shifted")
    row = rows[0]
    padded = size[0] + ends[row], size[1] + ends[row + 1]
    wide = [axis_of(PIXELS, side) for side in padded]
    dims = (*view.dims[:row], *wide, *view.dims[row + 2 :])
    return made.sliced(replace(view, dims=dims), (0, 0), (1, 1), padded)


def _roll(made: Interpreter, node: fx.Node) -> View:
    view = made.read(node)
    size, plain = made.size_of(view), made.pixel_dims(view)
    if size is None:
        raise ValueError("it moves other numbers than the pixels of a map")
    shift = list(view.shift)
    by, dims = (_numbers(made.argument(node, i, "", [])) for i in (1, 2))
    if len(by) != len(dims):
        raise ValueError("it moves other numbers than the pixels of a map")
    for amount, dim in zip(by, dims, strict=True):
        if view.dims[dim] == ():
            continue
        if view.dims[dim] not in plain:
            raise ValueError("it moves other numbers than the pixels of a map")
        axis = plain.index(view.dims[dim])
        shift[axis] = (shift[axis] - amount) % size[axis]
    return replace(view, shift=(shift[0], shift[1]))


def _numbers(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


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
OPERATIONS: dict[Any, Handler] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(_CUTS, _cut),
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.expand.default: _expand,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    operator.getitem: _item,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.roll.default: _roll,
}
"""What each of these operations of torch becomes."""
