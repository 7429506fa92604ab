"""Pick exactly k entries of every layer whose entries are spread over processes.

The rule is that of `selection`. No tensor is gathered. Ranks are compared 8 bits at a time, from
the highest: every process counts the digits of its candidates, and one all-reduce adds up the
counts of all layers. Ties are picked by their order in the whole, for which one all-gather collects
how many each process has. Where the parts are not in the order of the processes, the indices in the
whole are compared digit by digit instead. Integers alone travel, a fixed number of bytes per layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .flat import Layout, batched, vector
from .radix import indices, ranks_of
from .rng import Draw
from .shards import Ranks, Tensors, local

_WIDTH = 8  # bits of a digit
_BINS = 1 << _WIDTH


def select(
    scores: Sequence[Tensor | Draw],
    counts: Tensor,
    candidates: Tensor,
    layout: Layout,
    ranks: Ranks,
    *,
    want_largest: bool,
    together: bool = False,
) -> Tensor:
    """Mark the entries of largest or smallest magnitude in every layer, or in all together.

    All processes call this function with the same layers.

    Args:
        scores: Of each layer the part that lies here, or the draw of the whole; all of one kind.
        counts: int32 tensor, how many to pick in each layer, or one number for all together.
        candidates: Flat bool tensor of the parts, False where there is no layer.
        layout: The parts of the layers.
        ranks: The processes, which know the layers in this order.
        want_largest: Among equals the lower index is picked first; otherwise the higher one.
        together: Whether to rank the entries of all layers together, the earlier layer first.

    Returns:
        Flat bool tensor of the parts.
    """
    device, index = candidates.device, None
    if isinstance(scores[0], Draw) or not ranks.line_up:
        index = _indices(layout, ranks, device)
    search = _Search(candidates, layout, ranks, together)
    values = ranks_of(scores, layout, device, want_largest, index)
    counts = search.narrow(values, torch.iinfo(values.dtype).bits - 1, counts)
    if ranks.line_up:
        search.pick_ties(counts, want_largest)
    else:
        assert index is not None
        order, bits = index if want_largest else index ^ torch.iinfo(torch.int32).max, 31
        if together:
            order = order.long() + (layout.spread(range(len(layout.sizes)), device).long() << bits)
            bits += len(layout.sizes).bit_length()
        search.pick_all(search.narrow(order, bits, counts))
    return search.chosen


def sums_of_magnitudes(tensors: Tensors) -> Tensor:
    """Add up the magnitudes of each tensor: float64, the same however the tensors are spread.

    Numbers of more than 32 bits are rounded to float32. The mantissas of float32 are integers, and
    those of the same exponent are added up exactly. With an infinity or NaN the sum is NaN.
    """
    ranks = Ranks.of(tensors)
    device = next(iter(tensors.values())).device
    totals = torch.zeros(len(tensors), 256, dtype=torch.int64, device=device)
    for total, owned, tensor in zip(totals, ranks.owned, tensors.values(), strict=True):
        if owned:
            bits = local(tensor).float().reshape(-1).view(torch.int32) & 0x7FFFFFFF
            exponents = bits >> 23
            mantissas = (bits & 0x7FFFFF) + (exponents > 0).int() * (1 << 23)
            total.index_add_(0, exponents, mantissas.long())
    totals = ranks.sum(totals)
    powers = torch.arange(256, dtype=torch.float64, device=device).clamp(min=1.0) - 150.0
    sums = (totals[:, :255] * powers.exp2()[:255]).sum(1)
    return sums.masked_fill(totals[:, 255] != 0, torch.nan)


def _indices(layout: Layout, ranks: Ranks, device: torch.device) -> Tensor:
    """List the indices that all entries have in the whole: flat int32 tensor."""
    parts = list(ranks.parts.values())
    if all(part.has_whole_rows for part in parts):
        return indices(layout, [part.start for part in parts], device)
    return layout.flatten([part.index(device) for part in parts], torch.int32)


class _Search:
    """The entries that are open: neither chosen nor out.

    On a device all entries are looked at, because the host does not know how many are open. On a
    CPU, from the second digit on, the open ones are listed.

    Attributes:
        chosen: Flat bool tensor.
    """

    def __init__(self, candidates: Tensor, layout: Layout, ranks: Ranks, together: bool) -> None:
        self.chosen = torch.zeros_like(candidates)
        self._layout, self._ranks, self._together = layout, ranks, together
        self._num_layers = len(layout.sizes)
        self._owned = vector(ranks.owned, candidates.device)
        self._open = candidates
        # Of each entry that is looked at the layer, and the place if these are not all.
        self._layer, self._at = torch.empty(0), None  # type: Tensor, Tensor | None
        self._listed = batched(candidates)
        if self._listed:
            self._layer = layout.spread(range(self._num_layers), candidates.device)

    def narrow(self, values: Tensor, bits: int, counts: Tensor) -> Tensor:
        """Choose the entries below a threshold, and close those above it.

        Args:
            values: Flat integer tensor, not negative; the smallest are chosen.
            bits: How many of their bits can be set.
            counts: int32, how many to choose in each pool: in each layer, or in all together.

        Returns:
            How many remain to be chosen of the open entries of each pool, which are all equal.
        """
        while bits > 0:
            bits = max(bits - _WIDTH, 0)
            seen = values if self._at is None else values[self._at]
            digits = (seen >> bits).bitwise_and_(_BINS - 1)
            counts = (self._compare if self._listed else self._compare_layers)(digits, counts)
        return counts

    def _compare(self, digits: Tensor, counts: Tensor) -> Tensor:
        bins = digits.int()
        if not self._together:
            bins = self._layer * _BINS + bins
        pools = 1 if self._together else self._num_layers
        if not all(self._ranks.owned):
            owned = self._owned.index_select(0, self._layer)
            bins = torch.where(owned > 0, bins, pools * _BINS)
        limits, counts = self._threshold(
            self._tally(bins, pools * _BINS).view(pools, _BINS), counts
        )
        limit = self._of_pool(limits.int())
        self._choose(digits < limit)
        self._open = self._open & (digits == limit)
        if self._at is not None:
            self._at, self._layer = self._at[self._open], self._layer[self._open]
            self._open = torch.ones_like(self._at, dtype=torch.bool)
        return counts

    def _compare_layers(self, digits: Tensor, counts: Tensor) -> Tensor:
        """Do the same layer by layer, with all entries, and list those that stay open."""
        small, flats = digits.to(torch.uint8), (self._open, self.chosen)
        layers = list(zip(*map(self._layout.entries, (small, *flats)), strict=True))
        tallies = [torch.bincount(digit[open_], minlength=_BINS) for digit, open_, _ in layers]
        found = torch.stack(tallies).int() * self._owned[:, None]
        if self._together:
            found = found.sum(0, keepdim=True, dtype=torch.int32)
        limits, counts = self._threshold(found, counts)
        places = []
        for layer, (digit, open_, chosen) in enumerate(layers):
            limit = int(limits[0 if self._together else layer])
            if limit == _BINS:  # fewer than wanted
                chosen.copy_(open_)
            else:
                torch.logical_and(open_, digit < limit, out=chosen)
            tied = (open_ & (digit == min(limit, _BINS - 1)) & (limit < _BINS)).nonzero()
            places.append(tied.flatten() + self._layout.starts[layer])
        sizes = torch.tensor(list(map(len, places)))
        self._at, self._listed = torch.cat(places), True
        self._layer = torch.arange(self._num_layers, dtype=torch.int32).repeat_interleave(sizes)
        self._open = torch.ones_like(self._at, dtype=torch.bool)
        return counts

    def _threshold(self, found: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Find the digit up to which entries are chosen.

        Args:
            found: int32 [pools, digits], how often each digit occurs here.
            counts: int32, how many to choose in each pool.

        Returns:
            The digit in each pool, and how many of those with this digit remain to be chosen.
        """
        until = self._ranks.sum(found).cumsum(1, dtype=torch.int32)
        limits = (until < counts[:, None]).sum(1)
        below = torch.nn.functional.pad(until, (1, 0)).gather(1, limits[:, None])
        return limits, counts - below[:, 0]

    def pick_ties(self, counts: Tensor, first: bool) -> None:
        """Choose so many of the open entries of each pool, in their order or from its end."""
        found = self._tally(self._layer, self._num_layers)
        everyone = self._ranks.gather(found * self._owned).T
        before = everyone.reshape(-1).cumsum(0).view_as(everyone) - everyone
        totals = everyone.sum(1)
        if self._together:
            totals = totals.sum(0, keepdim=True)
        else:
            before = before - before[:, :1]
        # What all processes hold is counted by the first of them.
        holders = [self._ranks.rank if p.groups else 0 for p in self._ranks.parts.values()]
        mine = before.gather(1, vector(holders, found.device).long()[:, None])[:, 0]
        shift = mine - (found.cumsum(0) - found)
        place = self._open.cumsum(0) - 1 + shift.index_select(0, self._layer)
        if first:
            self._choose(place < self._of_pool(counts))
        else:
            self._choose(place >= self._of_pool(totals - counts))

    def pick_all(self, counts: Tensor) -> None:
        """Choose the one open entry of each pool that lacks one."""
        self._choose(self._of_pool(counts) > 0)

    def _tally(self, bins: Tensor, size: int) -> Tensor:
        """Count the open entries in every bin: int32."""
        bins = torch.where(self._open, bins, size)
        one = torch.ones(1, dtype=torch.int32, device=bins.device)
        found = torch.zeros(size + 1, dtype=torch.int32, device=bins.device)
        return found.index_add_(0, bins, one.expand(len(bins)))[:size]

    def _of_pool(self, numbers: Tensor) -> Tensor:
        """Give every entry the number of its pool."""
        return numbers if self._together else numbers.index_select(0, self._layer)

    def _choose(self, marks: Tensor) -> None:
        picked = self._open & marks
        if self._at is None:
            self.chosen |= picked
        else:
            self.chosen[self._at[picked]] = True
