"""Rows of layers: the weights that lead to one output, along the first dimension.

A row lies whole in a layer. Layers may be spread over processes by rows, each row lying in one
of them. What is known of rows is known of all of them, in all processes. Entries are ranked as in
`selection`. On a device the rows of all layers are handled together, in a fixed number of
operations. On a CPU every layer is handled by itself, without a full sort: the threshold of a row
is found among its largest entries.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from . import radix
from .flat import apart, batched, join, layout_for
from .radix import indices
from .rng import Draw
from .selection import order_keys
from .shards import Ranks, any_sharded, local, locals_of, part_of, spread_all

Tensors = Mapping[str, Tensor]


def per_row(numbers: Sequence[int], like: Tensors) -> Tensor:
    """Give every row the number of its layer: int64, the rows of all layers one after the other."""
    rows = [tensor.shape[0] for tensor in like.values()]
    device = next(iter(like.values())).device
    made = torch.zeros(sum(rows), dtype=torch.int64, device=device)
    torch._foreach_add_(list(torch.split(made, rows)), list(numbers))
    return made


def by_layer(numbers: Tensor, like: Tensors) -> dict[str, Tensor]:
    """Take numbers of all rows apart: name -> 1-dim tensor, an entry per row."""
    rows = [tensor.shape[0] for tensor in like.values()]
    return dict(zip(like, torch.split(numbers, rows), strict=True))


def count_in_rows(masks: Tensors, others: Tensors) -> Tensor:
    """Count the entries of every row that are in one of two masks, or in both.

    Returns:
        int64 tensor, of all layers one after the other.
    """
    if any_sharded(masks.values()):
        ranks, counts = Ranks.of(masks), per_row([0] * len(masks), masks)
        places = _rows_here(counts, masks)
        here = count_in_rows(locals_of(masks), locals_of(others))
        pieces = torch.split(here, [len(place) for place in places])
        if mine := [n for n, is_mine in enumerate(ranks.owned) if is_mine]:
            torch._foreach_copy_([places[n] for n in mine], [pieces[n] for n in mine])
        return ranks.sum(counts)
    if not _together(masks):
        either = (mask | others[name] for name, mask in masks.items())
        return torch.cat([_count(mask.flatten(1)) for mask in either])
    row_of, num_rows, _ = _rows(masks)
    counts = torch.zeros(num_rows, dtype=torch.int32, device=row_of.device)
    found = _join(masks) | _join(others, masks)
    return counts.index_add_(0, row_of, found.to(torch.int32)).long()


def fill_rows(
    masks: Tensors, counts: Tensor, keep: Tensors | None, grow: Tensors | Mapping[str, Draw]
) -> dict[str, Tensor]:
    """Bring every row to its number of entries.

    Of its entries a row keeps those of largest |keep score|, up to its number. If it has fewer, it
    gets as many as are missing of those that it did not keep, by |grow score|.

    Args:
        masks: Name -> bool mask.
        counts: Entries that a row shall have, of all rows one after the other.
        keep: Name -> scores of what is kept; None: nothing is.
        grow: Name -> scores of what is added.

    Returns:
        New masks.
    """
    grow = _drawn(grow, masks)
    if any_sharded(masks.values()):
        here = torch.cat(_rows_here(counts, masks))
        keep = None if keep is None else locals_of(keep)
        return spread_all(fill_rows(locals_of(masks), here, keep, locals_of(grow)), masks)
    if not _together(masks):
        limits = by_layer(counts, masks)
        new = {}
        for name, mask in masks.items():
            kept = torch.zeros_like(mask.flatten(1))
            if keep is not None:
                kept = _largest_of_rows(keep[name], limits[name], mask.flatten(1))
            missing = limits[name] - _count(kept)
            new[name] = (kept | _largest_of_rows(grow[name], missing, ~kept)).view(mask.shape)
        return new
    flat, (row_of, num_rows, starts) = _join(masks), _rows(masks)
    kept = torch.zeros_like(flat)
    if keep is not None:
        kept = _largest_joined(_join(keep, masks), counts, flat, row_of, starts)
    taken = torch.zeros(num_rows, dtype=torch.int32, device=flat.device)
    missing = counts - taken.index_add_(0, row_of, kept.to(torch.int32))
    grown = _largest_joined(_join(grow, masks), missing, ~kept, row_of, starts)
    return apart(kept | grown, masks)


def within_rows(masks: Tensors, rows: Tensor) -> dict[str, Tensor]:
    """Leave of masks what lies in the rows that are marked, of all rows one after the other.

    On a CPU the mask itself is returned where all rows are marked.
    """
    if not _together(locals_of(masks)):
        whole = [name for name, marks in by_layer(rows, masks).items() if bool(marks.all())]
        changed = {name: mask for name, mask in masks.items() if name not in whole}
        parts = dict(zip(masks, _rows_here(rows, masks), strict=True))
        left = {
            name: local(mask) & parts[name].view(-1, *[1] * (mask.dim() - 1))
            for name, mask in changed.items()
        }
        return {**masks, **spread_all(left, masks)}
    if any_sharded(masks.values()):
        here = torch.cat(_rows_here(rows, masks))
        return spread_all(within_rows(locals_of(masks), here), masks)
    return apart(_join(masks) & rows.index_select(0, _rows(masks)[0]), masks)


def _rows_here(numbers: Tensor, like: Tensors) -> list[Tensor]:
    """Give the numbers of the rows that lie here, views of them layer by layer."""
    parts = [part_of(tensor) for tensor in like.values()]
    layers = by_layer(numbers, like).values()
    return [n.narrow(0, p.offset[0], p.size[0]) for n, p in zip(layers, parts, strict=True)]


def _together(masks: Tensors) -> bool:
    return any(map(batched, masks.values()))


def _join(tensors: Tensors, names: Tensors | None = None) -> Tensor:
    return join([tensors[name] for name in names or tensors])


def _rows(masks: Tensors) -> tuple[Tensor, int, Tensor]:
    """Give the row of every entry of all layers, the number of rows, and where each begins."""
    lengths = per_row([mask.shape[1:].numel() for mask in masks.values()], masks)
    numel, num_rows = sum(mask.numel() for mask in masks.values()), len(lengths)
    index = torch.arange(num_rows, dtype=torch.int32, device=lengths.device)
    row_of = torch.repeat_interleave(index, lengths, output_size=numel)
    return row_of, num_rows, (lengths.cumsum(0) - lengths).to(torch.int32)


def _keys(scores: Tensor, among: Tensor) -> Tensor:
    """Rank candidates by magnitude, and everything else below them."""
    keys = order_keys(scores)
    others = among.logical_not()
    return keys.masked_fill(others, -1) if keys is scores else keys.masked_fill_(others, -1)


def _count(rows: Tensor) -> Tensor:
    """Count the True entries of every row of a matrix on the CPU: int64."""
    return rows.view(torch.uint8).sum(1, dtype=torch.int32).long()  # sums of bools are slow


def _largest_of_rows(scores: Tensor, counts: Tensor, among: Tensor) -> Tensor:
    """Mark so many entries of every row of a matrix on the CPU, or all candidates of a row."""
    some = ((counts > 0) & (counts < _count(among))).nonzero().flatten()  # rows with a choice
    scores = scores.detach().reshape(among.shape)
    if 0 < len(some) == len(among):
        return torch.from_numpy(_largest_keys(_keys(scores, among).numpy(), counts.numpy()))
    chosen = among & (counts > 0)[:, None]
    if len(some):
        keys = _keys(scores[some], among[some]).numpy()
        chosen[some] = torch.from_numpy(_largest_keys(keys, counts[some].numpy()))
    return chosen


def _largest_keys(keys: Any, counts: Any) -> Any:
    """Mark the largest keys of every row, NumPy arrays, of which there are more than asked for."""
    most = int(counts.max())
    top = keys
    if most < keys.shape[1]:
        top = numpy.partition(keys, keys.shape[1] - most, axis=1)[:, keys.shape[1] - most :]
    top = numpy.sort(top, axis=1)
    threshold = top[numpy.arange(len(top)), most - counts]
    chosen = keys >= threshold[:, None]
    excess = _count(torch.from_numpy(chosen)).numpy() - counts
    for row in excess.nonzero()[0]:  # of equal keys, the last ones are too many
        ties = (keys[row] == threshold[row]).nonzero()[0]
        chosen[row, ties[len(ties) - excess[row] :]] = False
    return chosen


def _largest_joined(
    scores: Tensor, counts: Tensor, among: Tensor, row_of: Tensor, starts: Tensor
) -> Tensor:
    order = _keys(scores, among).sort(descending=True, stable=True).indices
    # By rows, and in each as before. The entries of the rows are as many as they were.
    order = order[row_of[order].sort(stable=True).indices]
    place = torch.arange(len(order), dtype=torch.int32, device=order.device)
    chosen = place.sub_(starts.index_select(0, row_of)) < counts.int().index_select(0, row_of)
    return torch.zeros_like(among).scatter_(0, order, chosen).logical_and_(among)


def _drawn(scores: Tensors | Mapping[str, Draw], like: Tensors) -> Tensors:
    """Compute the elements of draws."""
    draws = {name: score for name, score in scores.items() if isinstance(score, Draw)}
    tensors = {name: score for name, score in scores.items() if isinstance(score, Tensor)}
    if not draws:
        return tensors
    if any_sharded(like.values()):
        ranks, parts = Ranks.of({name: like[name] for name in draws}), locals_of(like)
        layout = layout_for(parts[name] for name in draws)
        device = next(iter(parts.values())).device
        index = indices(layout, [part.start for part in ranks.parts.values()], device)
        flat = radix.drawn(list(draws.values()), layout, device, index)
        return layout.by_layer(flat, draws, parts)
    if not _together(like):
        return {name: draw.tensor() for name, draw in draws.items()}
    layout = layout_for(like[name] for name in draws)
    device = next(iter(like.values())).device
    return layout.by_layer(radix.drawn(list(draws.values()), layout, device), draws, like)
