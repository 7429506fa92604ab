"""What the operations of an attention become, however it is written.

An attention is one node of the graph. Where it is written out, its scores are followed from the
product of queries and keys to the product with the values, as a view of their own.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from .graph import POSITION_BIAS
from .interpreter import BATCH_SIZE, Interpreter
from .views import BATCH, CHANNELS, PIXELS, REPEATED, WEIGHT, Dim, Part, View, merged, places
from .windows import Windows, found_windows

_WINDOWS, _HEADS, _QUERIES, _KEYS = "windows", "heads", "queries", "keys"

_FLOOR = 1e-12  # of the length by which F.normalize divides
_MOST = math.log(100)  # of the logarithm of a cosine attention's scale

_EXPRESSIONS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "table": (("index", "relative_position_index"),),
    "continuous": (
        ("linear", "cpb_mlp.0.weight", "cpb_mlp.0.bias"),
        ("relu",),
        ("linear", "cpb_mlp.2.weight", None),
        ("index", "relative_position_index"),
        ("sigmoid",),
        ("mul", 16),
    ),
}
"""Kind of a position bias -> what is computed from the first of its entries."""


@dataclass(frozen=True)
class _Length:
    """The lengths of queries or keys."""

    of: View
    floor: float = 0.0


@dataclass(frozen=True)
class _Scores:
    """Scores of an attention, or the shares that they become by a softmax."""

    query: View
    heads: int
    windows: Windows
    scale: float
    is_cosine: bool
    has_logit_scale: bool = False
    prefix: str = ""
    position_bias: str = ""
    is_masked: bool = False
    are_shares: bool = False


def attention(made: Interpreter, node: fx.Node) -> View:
    """Add an attention of torch's own."""
    query, key, value = (made.view(node, i) for i in range(3))
    options = [made.argument(node, i, name) for i, name in enumerate(_OPTIONS, 3)]
    if any(options[:3]) or options[4]:
        raise ValueError("it has a mask, dropout, an order of tokens or groups of heads")
    width = query.sizes()[-1]
    scale = width**-0.5 if options[3] is None else float(options[3])
    scores = _scores(made, query, key)
    return _attend(made, node, replace(scores, scale=scores.scale * scale), value)


_OPTIONS = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def product(made: Interpreter, node: fx.Node) -> View:
    return _product(made, node, made.view(node), made.view(node, 1))


def einsum(made: Interpreter, node: fx.Node) -> View:
    """Add a product of matrices, whose letters say which dimensions they are."""
    operands: Any = made.argument(node, 1)
    inputs, _, result = str(made.argument(node, 0)).replace(" ", "").partition("->")
    letters = inputs.split(",")
    if len(letters) == 2 and "." not in inputs and len(operands) == 2:
        first, second = (made.view_of(node, operand) for operand in operands)
        left, right = letters
        lead, row, inner, column = left[:-2], left[-2:-1], left[-1:], result[-1:]
        if result == lead + row + column and right == lead + inner + column:
            return _product(made, node, first, second)
        if result == lead + row + column and right == lead + column + inner:
            return _product(made, node, first, _turned(second))
    raise ValueError("it is another sum of products than an attention's")


def _turned(view: View) -> View:
    """Return a view with its last two dimensions exchanged."""
    return view.permuted([*range(len(view.dims) - 2), len(view.dims) - 1, len(view.dims) - 2])


def _product(made: Interpreter, node: fx.Node, first: View, second: View) -> View:
    scores = made.pending.get(first.name)
    if isinstance(scores, _Scores):
        if not scores.are_shares or _joined(first) != _dims(scores):
            raise ValueError("it multiplies by other numbers than the shares of a softmax")
        return _attend(made, node, scores, second)
    made.pending[node.name] = scores = _scores(made, first, _turned(second))
    return View(node.name, (_dims(scores),)).reshaped(made.shape(node))


def _dims(scores: _Scores) -> Dim:
    """Return what scores count, from the outermost to the innermost."""
    tokens = scores.windows.tokens
    sizes = {_WINDOWS: len(scores.windows), _HEADS: scores.heads, _QUERIES: tokens, _KEYS: tokens}
    counted = [Part(axis, size, 1) for axis, size in sizes.items()]
    return merged([Part(BATCH, BATCH_SIZE, 1), *counted])


def _joined(view: View) -> Dim:
    return merged([part for dim in view.dims for part in dim])


def _scores(made: Interpreter, query: View, key: View) -> _Scores:
    """Return the scores of queries and keys (.., tokens, channels of a head)."""
    size = made.size_of(query)
    if size is None or len(query.dims) < 3:
        raise ValueError("its queries are no tokens of a map")
    lead = _joined(replace(query, dims=query.dims[:-2]))
    width, channels = query.sizes()[-1], made.channels_of(query) // 3
    heads = channels // max(width, 1)
    inner = merged([Part(CHANNELS, heads, width)])
    windows = lead[1 : len(lead) - len(inner)]
    wanted = (*merged([Part(BATCH, BATCH_SIZE, 1)]), *windows, *inner)
    tokens = query.dims[-2]
    is_whole = query.dims[-1] == merged([Part(CHANNELS, width, 1)]) and lead == wanted
    if not is_whole or any(part.axis != PIXELS for part in (*windows, *tokens)):
        raise ValueError("its queries are no tokens of a map")
    if _plain(key) != replace(_plain(query), channel=channels) or query.channel:
        raise ValueError(_NO_THIRDS)
    if 3 * heads * width != made.channels_of(query):
        raise ValueError(_NO_THIRDS)
    if query.unit != key.unit or query.unit not in (None, query.dims[-1]):
        raise ValueError("its queries and keys are normalized otherwise than by head")
    numbers = places(windows)[:, None] + places(tokens)
    if numbers.size != size[0] * size[1]:
        raise ValueError("its queries are no tokens of a map")
    found = found_windows(size, numbers, query.shift)
    if found is None:
        raise ValueError("it attends to other pixels than those of a window or of a spread grid")
    scale = query.scale * key.scale
    return _Scores(_plain(query), heads, found, scale, is_cosine=query.unit is not None)


_NO_THIRDS = "its queries, keys and values are not the thirds of one layer"


def _plain(view: View) -> View:
    return replace(view, scale=1.0, unit=None)


def _attend(made: Interpreter, node: fx.Node, scores: _Scores, value: View) -> View:
    """Add the attention whose scores and values are known."""
    query, windows = scores.query, scores.windows
    channels = made.channels_of(query) // 3
    if value != replace(query, channel=2 * channels):
        raise ValueError(_NO_THIRDS)
    if scores.is_cosine != scores.has_logit_scale or (scores.is_cosine and scores.scale != 1):
        raise ValueError("the scale of its cosines is no logit_scale")
    if scores.is_masked != (windows.shift != (0, 0)):
        raise ValueError("its windows are shifted, and pixels from opposite borders not masked")
    values: dict[str, Any] = {"heads": scores.heads, "parameters": scores.prefix}
    values |= {"position_bias": scores.position_bias, "cosine": scores.is_cosine}
    if not scores.is_cosine:
        values["score_scale"] = scores.scale
    if scores.position_bias or len(windows) > 1 or windows.spread:
        values |= {"window": windows.window, "shift": windows.shift, "spread": windows.spread}
    found = made.add(node, "attention", query, channels=channels, pixels=windows.size, **values)
    return replace(found, dims=query.dims, shift=query.shift)


def length(made: Interpreter, node: fx.Node) -> View:
    """Follow the length of queries and keys, by which F.normalize divides them."""
    view, dim = made.view(node), made.argument(node, 2, "dim")
    if made.argument(node, 1, "ord", 2) != 2 or dim not in ([-1], [len(view.dims) - 1]):
        raise ValueError("it is the length of other numbers than the last dimension's")
    if not made.argument(node, 3, "keepdim", False) or view.scale != 1 or view.unit is not None:
        raise ValueError("it is the length of other numbers than queries or keys")
    made.pending[node.name] = _Length(view)
    return View(node.name, (*view.dims[:-1], ()))


def at_least(made: Interpreter, node: fx.Node) -> View:
    view = made.view(node)
    found = made.pending.get(view.name)
    if not isinstance(found, _Length):
        raise ValueError("it limits other numbers than lengths")
    made.pending[node.name] = replace(found, floor=made.argument(node, 1, "min"))
    return replace(view, name=node.name)


def quotient(made: Interpreter, node: fx.Node) -> View:
    """Follow a division of queries or keys by their lengths."""
    view, divisor = made.view(node), made.view(node, 1)
    found = made.pending.get(divisor.name)
    dims = (*view.dims[:-1], (Part(REPEATED, view.sizes()[-1], 0),))
    if not isinstance(found, _Length) or found != _Length(view, _FLOOR):
        raise ValueError("it divides by other numbers than the lengths of queries or keys")
    if divisor.dims not in (dims, (*view.dims[:-1], ())):
        raise ValueError("it divides by other numbers than the lengths of queries or keys")
    return replace(view, unit=view.dims[-1])


def softmax(made: Interpreter, node: fx.Node) -> View:
    view, dim = made.view(node), made.argument(node, 1, "dim")
    scores = made.pending.get(view.name)
    last = view.dims[-1] if view.dims else ()
    if not isinstance(scores, _Scores) or scores.are_shares:
        raise ValueError("it is no softmax of an attention's scores")
    keys = merged([Part(_KEYS, scores.windows.tokens, 1)])
    if dim not in (-1, len(view.dims) - 1) or last != keys or made.argument(node, 2):
        raise ValueError("it is no softmax of an attention's scores")
    made.pending[node.name] = replace(scores, are_shares=True)
    return replace(view, name=node.name)


def scaled(made: Interpreter, node: fx.Node, view: View, factor: object) -> View:
    """Multiply by a number: queries, keys, scores, or what is computed from weights."""
    if not isinstance(factor, int | float):
        raise ValueError("it multiplies by what is no number")
    scores = made.pending.get(view.name)
    if view.is_weight:
        return replace(view, steps=(*view.steps, ("mul", factor)))
    if not isinstance(scores, _Scores):
        return replace(view, scale=view.scale * factor)
    if scores.are_shares or scores.position_bias or scores.is_masked or scores.has_logit_scale:
        raise ValueError("it multiplies more than the product of queries and keys")
    made.pending[node.name] = replace(scores, scale=scores.scale * factor)
    return replace(view, name=node.name)


def scores_of(made: Interpreter, view: View) -> bool:
    """Tell whether a view shows the scores of an attention."""
    return not view.is_weight and isinstance(made.pending.get(view.name), _Scores)


def multiplied(made: Interpreter, node: fx.Node, view: View, weight: View) -> View:
    """Multiply the scores of a cosine attention by the exponential of its logit_scale."""
    scores = made.pending[view.name]
    numbers = {_HEADS: Part(WEIGHT, scores.heads, 1)}
    clamped = ("clamp", None, _MOST), ("exp",)
    prefix = weight.name.removesuffix("logit_scale")
    is_known = weight.steps == clamped and prefix != weight.name and _fits(weight, view, numbers)
    is_first = scores.is_cosine and not (scores.has_logit_scale or scores.position_bias)
    if not is_known or not is_first or scores.is_masked or scores.are_shares:
        raise ValueError("it multiplies scores by other weights than a logit_scale")
    found = replace(scores, has_logit_scale=True, prefix=prefix)
    made.pending[node.name] = found
    return replace(view, name=node.name)


def biased(made: Interpreter, node: fx.Node, view: View, weight: View) -> View:
    """Add a relative position bias to the scores of an attention."""
    scores = made.pending[view.name]
    tokens, heads = scores.windows.tokens, scores.heads
    numbers = {_HEADS: Part(WEIGHT, heads, 1), _QUERIES: Part(WEIGHT, tokens, tokens * heads)}
    numbers[_KEYS] = Part(WEIGHT, tokens, heads)
    kind, prefix = _bias_kind(weight)
    known = scores.prefix if scores.has_logit_scale else prefix
    if not kind or known != prefix or not _fits(weight, view, numbers):
        raise ValueError("the position bias that it adds is not known")
    if scores.position_bias or scores.are_shares or scores.is_cosine != scores.has_logit_scale:
        raise ValueError("the position bias that it adds is not known")
    made.pending[node.name] = replace(scores, position_bias=kind, prefix=prefix)
    return replace(view, name=node.name)


def _bias_kind(weight: View) -> tuple[str, str]:
    """Return which of `_EXPRESSIONS` was computed, and the prefix of its entries; "" if none."""
    for kind, steps in _EXPRESSIONS.items():
        first = POSITION_BIAS[kind][0]
        prefix = weight.name.removesuffix(first)
        named = tuple(
            tuple(prefix + x if isinstance(x, str) and i else x for i, x in enumerate(step))
            for step in steps
        )
        if weight.name == prefix + first and weight.steps == named:
            return kind, prefix
    return "", ""


def _fits(weight: View, view: View, numbers: dict[str, Part]) -> bool:
    """Tell whether a weight has numbers for whole axes of scores, and is the same along others."""
    dims = [()] * (len(view.dims) - len(weight.dims)) + list(weight.dims)
    wanted: list[Dim] = []
    for dim in view.dims:
        part = numbers.get(dim[0].axis) if len(dim) == 1 else None
        wanted.append(() if part is None else merged([part]))
    return dims == wanted


def masked(made: Interpreter, node: fx.Node, view: View, mask: Tensor) -> View:
    """Add the mask of shifted windows to the scores of an attention."""
    scores = made.pending[view.name]
    windows = scores.windows
    wanted = torch.from_numpy(windows.masks())[:, None]
    axes = [part.axis for dim in view.dims for part in dim]
    own = [axis for axis in (BATCH, _WINDOWS, _HEADS, _QUERIES, _KEYS) if axis in axes]
    is_plain = len(view.dims) == 5 and all(len(dim) < 2 for dim in view.dims) and axes == own
    if not is_plain or scores.is_masked or scores.are_shares:
        raise ValueError("the mask that it adds is not known")
    if windows.shift == (0, 0) or mask.shape[:-4] != (1,) or not torch.equal(mask[0], wanted):
        raise ValueError("the mask that it adds is no mask of shifted windows")
    made.pending[node.name] = replace(scores, is_masked=True)
    return replace(view, name=node.name)
