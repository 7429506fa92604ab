"""Pick exactly k entries of a tensor by magnitude, without a full sort and without a device sync.

The rule is the same everywhere. Entries are ranked by |score|. NaN ranks above every number. Of
equal scores the one with the lower flat index (row-major, whatever the memory layout) ranks higher.

On a device the k-th magnitude comes from topk, and a running count resolves ties, all on the
device. On a CPU a bound is estimated from a sample. One pass collects the entries beyond the bound,
and the k entries are selected among these few. If fewer than k are beyond the bound, the pass is
repeated without it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse.topology.rng import CHUNK, Draw, is_fake

Scores = Tensor | Draw

_SAMPLE = 1 << 12  # entries sampled in a layer
_SIGMAS = 4.0  # safety margin of the bound, in standard deviations of the estimate


def largest(scores: Scores, k: int | Tensor, among: Tensor) -> Tensor:
    """Mark the k entries of largest magnitude; among equals the lower flat index wins.

    Args:
        scores: Tensor of any float type, of non-negative int32, or a `Draw`.
        k: Number of entries. If there are fewer candidates, all are marked. A 0-dim integer tensor
            may hold a number that only the device knows.
        among: The candidates, a bool tensor of the same shape.

    Returns:
        bool tensor of the shape of `among`, contiguous, with k entries (or all candidates) True.
    """
    flat = among.reshape(-1)
    if _on_cpu(flat):
        chosen, k = torch.zeros_like(flat).numpy(), min(int(k), int(torch.count_nonzero(flat)))
        chosen[_select_cpu(scores, k, flat.numpy(), True)] = True
        return torch.from_numpy(chosen).view(among.shape)
    return _select_device(_keys(scores, flat), k, flat, True).view(among.shape)


def smallest(scores: Scores, k: int | Tensor, among: Tensor) -> Tensor:
    """Mark the k entries of smallest magnitude; among equals the higher flat index wins.

    The result is the complement of `largest` among the candidates. Arguments and result are those
    of `largest`, but k is at most the number of candidates.
    """
    return among ^ remove_smallest(among, scores, k)


def remove_smallest(mask: Tensor, scores: Scores, k: int | Tensor) -> Tensor:
    """Remove the k entries of smallest magnitude from a mask, as `smallest` picks them."""
    flat = mask.reshape(-1)
    if _on_cpu(flat):
        kept = flat.numpy().copy()
        kept[_select_cpu(scores, int(k), kept, False)] = False
        return torch.from_numpy(kept).view(mask.shape)
    return (flat ^ _select_device(_keys(scores, flat), k, flat, False)).view(mask.shape)


def add_largest(mask: Tensor, scores: Scores, k: int | Tensor) -> Tensor:
    """Add to a mask the k entries of largest magnitude outside of it, as `largest` picks them."""
    flat = mask.reshape(-1)
    if _on_cpu(flat):
        grown = flat.numpy().copy()
        grown[_select_cpu(scores, int(k), grown, True, outside=True)] = True
        return torch.from_numpy(grown).view(mask.shape)
    return (flat | _select_device(_keys(scores, flat), k, ~flat, True)).view(mask.shape)


def _on_cpu(flat: Tensor) -> bool:
    return flat.device.type == "cpu" and not is_fake(flat)


def _keys(scores: Scores, like: Tensor) -> Tensor:
    tensor = scores.tensor(like.device) if isinstance(scores, Draw) else scores
    return _order_keys(tensor.reshape(-1))


def _order_keys(scores: Tensor) -> Tensor:
    """Map scores to non-negative integers that are ordered as their magnitudes, with NaN on top."""
    if not scores.is_floating_point():
        return scores
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[scores.element_size()]
    # NaN has many bit patterns, which all rank the same.
    return scores.abs().view(integer).masked_fill_(scores.isnan(), torch.iinfo(integer).max)


def _select_device(keys: Tensor, k: int | Tensor, among: Tensor, want_largest: bool) -> Tensor:
    if isinstance(k, int) and k == 0:
        return torch.zeros_like(among)
    if not want_largest:  # reverse the order of the keys; flipping reverses the order of ties
        keys = torch.iinfo(keys.dtype).max - keys.flip(0)
        return _select_device(keys, k, among.flip(0), want_largest=True).flip(0)
    keys = keys.masked_fill(~among, -1)
    threshold = _kth_largest(keys, k)
    above = keys > threshold
    equal = (keys == threshold) & among
    missing = k - above.sum()
    return above | (equal & (equal.cumsum(0, dtype=torch.int32) <= missing))


def _kth_largest(keys: Tensor, k: int | Tensor) -> Tensor:
    if isinstance(k, int):
        return torch.topk(keys, k, sorted=False).values.amin()
    # The host does not know k, so sort and index. k = 0 reads the largest key: no key is above it,
    # and the number of missing ties is then zero.
    return keys.sort(descending=True).values.gather(0, (k - 1).clamp(min=0).view(1))


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
    keys = _order_keys(values).numpy()
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
