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

from .flat import Layout, batched, layout_of, vector
from .radix import indices, ranks_of
from .rng import Draw
from .shards import Part, Ranks, Tensors, local

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
    device, parts = candidates.device, list(ranks.parts.values())
    search = _Search(candidates, layout, ranks, together)
    values: Tensor | list[Tensor]
    if batched(candidates):
        values = _ranks_of(scores, parts, layout, device, want_largest)
        bits = torch.iinfo(values.dtype).bits - 1
    else:  # in pieces that stay in the cache
        values = [
            _ranks_of([score], [part], layout_of((size,)), device, want_largest)[:size]
            for score, part, size in zip(scores, parts, layout.sizes, strict=True)
        ]
        bits = torch.iinfo(values[0].dtype).bits - 1
    counts = search.narrow(values, bits, counts)
    if ranks.line_up:
        search.pick_ties(counts, want_largest)
        return search.chosen
    index, bits = _indices(parts, layout, device), 31
    order = index if want_largest else index ^ torch.iinfo(torch.int32).max
    if together:
        order = order.long() + (layout.spread(range(len(parts)), device).long() << bits)
        bits += len(parts).bit_length()
    search.pick_all(search.narrow(search.of_entries(order), bits, counts))
    return search.chosen


def _ranks_of(
    scores: Sequence[Tensor | Draw],
    parts: Sequence[Part],
    layout: Layout,
    device: torch.device,
    want_largest: bool,
) -> Tensor:
    index = _indices(parts, layout, device) if isinstance(scores[0], Draw) else None
    return ranks_of(scores, layout, device, want_largest, index)


def _indices(parts: Sequence[Part], layout: Layout, device: torch.device) -> Tensor:
    """List the indices that all entries have in the whole: flat int32 tensor."""
    if all(part.has_whole_rows for part in parts):
        return indices(layout, [part.start for part in parts], device)
    return layout.flatten([part.index(device) for part in parts], torch.int32)


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
        if batched(candidates):
            self._layer = layout.spread(range(self._num_layers), candidates.device)

    def of_entries(self, flat: Tensor) -> Tensor:
        """Give what a flat tensor has at the entries that are looked at."""
        return flat if self._at is None else flat[self._at]

    def narrow(self, values: Tensor | list[Tensor], bits: int, counts: Tensor) -> Tensor:
        """Choose the entries below a threshold, and close those above it.

        Args:
            values: Integers of the entries that are looked at, not negative; the smallest are
                chosen. A list with those of every layer if none is listed yet.
            bits: How many of their bits can be set.
            counts: int32, how many to choose in each pool: in each layer, or in all together.

        Returns:
            How many remain to be chosen of the open entries of each pool, which are all equal.
        """
        while bits > 0:
            bits = max(bits - _WIDTH, 0)
            if isinstance(values, list):
                values, counts = self._compare_layers(values, bits, counts)
            else:
                values, counts = self._compare(values, bits, counts)
        return counts

    def _compare(self, values: Tensor, bits: int, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Compare a digit of the entries; give the values of those still looked at, and counts."""
        digits = (values >> bits).bitwise_and_(_BINS - 1)
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
            keep = self._open
            self._at, self._layer, values = self._at[keep], self._layer[keep], values[keep]
            self._open = torch.ones_like(self._at, dtype=torch.bool)
        return values, counts

    def _compare_layers(
        self, values: list[Tensor], bits: int, counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Do the same layer by layer, with all entries, and list those that stay open."""
        digits, tallies = [], []
        for value, candidate in zip(values, self._layout.entries(self._open), strict=True):
            digit = (value >> bits).to(torch.int16).bitwise_and_(_BINS - 1)
            digits.append(digit.masked_fill_(~candidate, _BINS))
            tallies.append(torch.bincount(digit, minlength=_BINS + 1)[:_BINS])
        found = torch.stack(tallies).int() * self._owned[:, None]
        if self._together:
            found = found.sum(0, keepdim=True, dtype=torch.int32)
        limits, counts = self._threshold(found, counts)
        limit_of = limits.expand(self._num_layers).tolist()
        places = []
        for limit, digit, chosen in zip(
            limit_of, digits, self._layout.entries(self.chosen), strict=True
        ):
            torch.lt(digit, limit, out=chosen)
            tied = digit == limit if limit < _BINS else digit < 0  # else there are too few
            places.append(tied.nonzero().flatten())
        sizes = torch.tensor(list(map(len, places)))
        self._at = torch.cat([p + s for p, s in zip(places, self._layout.starts, strict=True)])
        self._layer = torch.arange(self._num_layers, dtype=torch.int32).repeat_interleave(sizes)
        self._open = torch.ones_like(self._at, dtype=torch.bool)
        return torch.cat([v[p] for v, p in zip(values, places, strict=True)]), counts

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
