"""Pick exactly k entries of every layer by magnitude, without a full sort or a device sync.

The rule is the same everywhere. Entries are ranked by |score|. NaN ranks above every number. Of
equal scores the one with the lower flat index (row-major, whatever the memory layout) ranks higher.

Layers that are spread over processes are handled together, by all of them (`sharded`). On a device
all layers are handled together, too (`radix`). On a CPU every layer is handled by itself: a
bound is estimated from a sample. One pass collects the entries beyond the bound, and the k entries
are selected among these few. If fewer than k are beyond the bound, the pass is repeated without it.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import radix, sharded
from .flat import apart, batched, join, layout_for, vector
from .rng import CHUNK, Draw
from .shards import Ranks, local, locals_of, part_like, spread_as

Scores = Tensor | Draw
Counts = Mapping[str, int] | Mapping[str, Tensor] | Mapping[str, int | Tensor]

_ONLY = ""  # the name of a layer that is alone

# Integers of a float's size, and the bits of infinity.
_INFINITY = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}

_SAMPLE = 1 << 12  # entries sampled in a layer
_SIGMAS = 4.0  # safety margin of the bound, in standard deviations of the estimate


def largest(scores: Scores, k: int | Tensor, among: Tensor) -> Tensor:
    """Mark the k entries of largest magnitude; among equals the lower flat index wins.

    Args:
        scores: Tensor of any float type, of non-negative integers, or a `Draw`.
        k: Number of entries. If there are fewer candidates, all are marked. A 0-dim integer tensor
            may hold a number that only the device knows.
        among: The candidates, a bool tensor of the same shape.

    Returns:
        bool tensor of the shape of `among`, contiguous, with k entries (or all candidates) True.
    """
    return largest_in_layers({_ONLY: scores}, {_ONLY: k}, {_ONLY: among})[_ONLY]


def smallest(scores: Scores, k: int | Tensor, among: Tensor) -> Tensor:
    """Mark the k entries of smallest magnitude; among equals the higher flat index wins.

    The result is the complement of `largest` among the candidates. Arguments and result are those
    of `largest`, but k is at most the number of candidates.
    """
    return among ^ replace({_ONLY: among}, drop={_ONLY: scores}, num_dropped={_ONLY: k})[_ONLY]


def largest_in_layers(
    scores: Mapping[str, Scores], counts: Counts, among: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Mark the entries of largest magnitude in every layer; see `largest`.

    Args:
        scores: Layer name -> scores.
        counts: Layer name -> how many.
        among: Layer name -> candidates.
    """
    if _on_cpu(among):
        return {name: _largest_cpu(scores[name], counts[name], among[name]) for name in among}
    new: dict[str, Tensor] = {}
    for names in _groups(among, scores):
        layers = _Layers({name: among[name] for name in names})
        wanted = [counts[name] for name in names]
        new |= layers.by_layer(layers.select(scores, wanted, layers.flat, want_largest=True))
    return {name: new[name] for name in among}


def largest_together(
    scores: Mapping[str, Tensor], k: int | Tensor, among: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Mark the k entries of largest magnitude in all layers together; see `largest`.

    16-bit floats are ranked as float32. Among equals the earlier layer wins, then the lower index.

    Args:
        scores: Layer name -> scores, tensors of float type.
        k: How many entries in all.
        among: Layer name -> candidates.
    """
    if _on_cpu(among):
        flat = join([scores[name] for name in among]).float()
        return apart(largest(flat, k, join(list(among.values()))), among)
    layers = _Layers(among, together=True)
    return layers.by_layer(layers.select(scores, [k], layers.flat, want_largest=True))


def replace(
    masks: Mapping[str, Tensor],
    *,
    drop: Mapping[str, Scores] | None = None,
    num_dropped: Counts | None = None,
    grow: Mapping[str, Scores] | None = None,
    num_grown: Counts | None = None,
) -> dict[str, Tensor]:
    """Take the entries of smallest magnitude out of masks, then add those of largest outside.

    Args:
        masks: Layer name -> bool mask.
        drop: Layer name -> scores of what is dropped, as `smallest` picks it; None: nothing is.
        num_dropped: Layer name -> how many.
        grow: Layer name -> scores of what is grown, as `largest` picks it; None: nothing is. What
            was dropped a moment ago is a candidate, too.
        num_grown: Layer name -> how many.

    Returns:
        New masks, contiguous.
    """
    if _on_cpu(masks):
        new = {name: mask.reshape(-1).numpy().copy() for name, mask in masks.items()}
        for name, array in new.items():
            if drop is not None and num_dropped is not None:
                array[_select_cpu(drop[name], int(num_dropped[name]), array, False)] = False
            if grow is not None and num_grown is not None:
                array[_select_cpu(grow[name], int(num_grown[name]), array, True, True)] = True
        return {name: torch.from_numpy(new[name]).view(mask.shape) for name, mask in masks.items()}
    made: dict[str, Tensor] = {}
    for names in _groups(masks, *(scores for scores in (drop, grow) if scores is not None)):
        layers = _Layers({name: masks[name] for name in names})
        flat = layers.flat
        if drop is not None and num_dropped is not None:
            wanted = [num_dropped[name] for name in names]
            flat ^= layers.select(drop, wanted, flat, want_largest=False)
        if grow is not None and num_grown is not None:
            free = layers.layout.clear_gaps(flat.logical_not())
            wanted = [num_grown[name] for name in names]
            flat |= layers.select(grow, wanted, free, want_largest=True)
        made |= layers.by_layer(flat)
    return {name: made[name] for name in masks}


def _on_cpu(masks: Mapping[str, Tensor]) -> bool:
    return not any(map(batched, masks.values()))


def _groups(masks: Mapping[str, Tensor], *scores: Mapping[str, Scores]) -> list[list[str]]:
    """Group layers by device and kinds of scores: those that are ranked together."""
    groups = defaultdict(list)
    for name, mask in masks.items():
        groups[mask.device, *(radix.kind(found[name]) for found in scores)].append(name)
    return list(groups.values())


class _Layers:
    """Layers that are ranked at once, each by itself or all of them together.

    Of layers that are spread over processes it holds what lies here.

    Attributes:
        flat: Their masks in a flat tensor.
        layout: Where they lie in a flat tensor.
        ranks: The processes over which they are spread.
    """

    def __init__(self, masks: Mapping[str, Tensor], *, together: bool = False) -> None:
        self._masks, self._together = masks, together
        parts = list(map(local, masks.values()))
        self.layout = layout_for(parts)
        self.flat = self.layout.flatten(parts, torch.bool)
        self.ranks = Ranks.of(masks)

    @functools.cached_property
    def _selector(self) -> radix.Selector:
        return radix.Selector(self.layout, self.flat.device, together=self._together)

    def select(
        self,
        scores: Mapping[str, Scores],
        counts: Sequence[int | Tensor],
        among: Tensor,
        *,
        want_largest: bool,
    ) -> Tensor:
        """Mark so many of the candidates in every layer, or in all together.

        Args:
            scores: Layer name -> scores.
            counts: How many, a number for each layer, or one for all together.
            among: The candidates, flat as the result is.
            want_largest: As in `radix.Selector.select`.
        """
        given = [_part(scores[name], mask) for name, mask in self._masks.items()]
        wanted = _vector(counts, among.device)
        if not self.ranks.groups:
            return self._selector.select(given, wanted, among, want_largest)
        if self._together:
            given = [score.float() for score in given if isinstance(score, Tensor)]
        return sharded.select(
            given,
            wanted,
            among,
            self.layout,
            self.ranks,
            want_largest=want_largest,
            together=self._together,
        )

    def by_layer(self, flat: Tensor) -> dict[str, Tensor]:
        """Take a flat tensor apart, into layers that are spread as the masks are."""
        parts = self.layout.by_layer(flat, self._masks, locals_of(self._masks))
        return {name: spread_as(part, self._masks[name]) for name, part in parts.items()}


def _part(scores: Scores, mask: Tensor) -> Scores:
    return scores if isinstance(scores, Draw) else local(part_like(scores, mask))


def _vector(counts: Sequence[int | Tensor], device: torch.device) -> Tensor:
    """Join counts that the host knows, or that only a device knows."""
    known = [count for count in counts if isinstance(count, int)]
    if len(known) == len(counts):
        return vector(known, device)
    return torch.stack([torch.as_tensor(count).to(device) for count in counts]).to(torch.int32)


def _largest_cpu(scores: Scores, k: int | Tensor, among: Tensor) -> Tensor:
    flat = among.reshape(-1)
    chosen, k = torch.zeros_like(flat).numpy(), min(int(k), int(torch.count_nonzero(flat)))
    chosen[_select_cpu(scores, k, flat.numpy(), True)] = True
    return torch.from_numpy(chosen).view(among.shape)


def order_keys(scores: Tensor) -> Tensor:
    """Map scores to non-negative integers that are ordered as their magnitudes, with NaN on top."""
    if not scores.is_floating_point():
        return scores
    integer, infinity = _INFINITY[scores.dtype]
    # NaN has many bit patterns above that of infinity, which all rank the same.
    return scores.view(integer).bitwise_and(torch.iinfo(integer).max).clamp_(max=infinity + 1)


def _select_cpu(
    scores: Scores, k: int, mask: Any, want_largest: bool, outside: bool = False
) -> Any:
    """Find the flat indices of the selection among the entries in, or outside of, a mask."""
    if k == 0:
        return slice(0)
    read = _reader(scores)
    bound = None
    if len(mask) > 8 * _SAMPLE:
        step = _stride(len(mask))
        picked = mask[::step] != outside
        bound = _bound(abs(read(0, len(mask), step)[picked]), k / step, want_largest)
    index, values = _collect(read, mask, outside, bound, want_largest)
    if bound is not None and len(index) < k:
        index, values = _collect(read, mask, outside, None, want_largest)
    if k > len(index):
        raise ValueError(f"asked for {k} of {len(index)} candidates")
    return index[_exact(values, k, want_largest)]


def _stride(numel: int) -> int:
    """Choose a stride without small factors, which does not keep step with rows or channels."""
    step = numel // _SAMPLE
    while math.gcd(step, 2 * 3 * 5 * 7) > 1:
        step += 1
    return step


def _reader(scores: Scores) -> Callable[[int, int, int], Any]:
    """Give a function that reads entries start, start + step, ... < stop into a NumPy array."""
    if isinstance(scores, Draw):
        return scores.reader()
    flat = scores.detach().reshape(-1)
    if flat.dtype in (
        torch.float16,
        torch.bfloat16,
    ):  # NumPy is slow with the first and lacks the second
        return lambda start, stop, step: flat[start:stop:step].float().numpy()
    array = flat.numpy()
    return lambda start, stop, step: array[start:stop:step]


def _bound(sample: Any, wanted: float, want_largest: bool) -> Any:
    """Estimate a magnitude beyond which the wanted number of entries lies; None for no bound."""
    size = len(sample)
    share = wanted / max(size, 1)
    if share >= 1.0:
        return None
    rank = int(wanted + _SIGMAS * math.sqrt(wanted * (1.0 - share))) + 2
    if rank >= size:
        return None
    place = size - rank if want_largest else rank - 1
    sample.partition(place)
    return sample[place]


def _collect(
    read: Callable[[int, int, int], Any], mask: Any, outside: bool, bound: Any, above: bool
) -> Any:
    """List index and score of the candidates beyond the bound, chunk by chunk."""
    indices, values = [], []
    for start in range(0, len(mask), CHUNK):
        candidate = mask[start : start + CHUNK]
        score = read(start, start + len(candidate), 1)
        if outside:
            candidate = ~candidate
        if bound is not None:
            # Two comparisons are cheaper than |score|. The upper side is the complement of the
            # entries that are surely below the bound, because every comparison with NaN is false.
            inside = score < bound if above else score <= bound
            inside &= score > -bound if above else score >= -bound
            candidate = candidate > inside if above else candidate & inside
        hit = candidate.nonzero()[0]
        values.append(torch.from_numpy(score.take(hit)))
        hit += start
        indices.append(torch.from_numpy(hit))
    return torch.cat(indices).numpy(), torch.cat(values)


def _exact(values: Tensor, k: int, want_largest: bool) -> Any:
    """Find the places of the k largest or smallest magnitudes, with ties as documented above."""
    keys = order_keys(values).numpy()
    size = len(keys)
    place = size - k if want_largest else k - 1
    ordered = keys.copy()
    ordered.partition(place)
    threshold = ordered[place]
    chosen = keys > threshold if want_largest else keys < threshold
    ties = (keys == threshold).nonzero()[0]
    missing = k - int(chosen.sum())
    chosen[ties[:missing] if want_largest else ties[len(ties) - missing :]] = True
    return chosen
