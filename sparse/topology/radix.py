"""Pick exactly k entries of every layer of a device at once, in a fixed number of operations.

The rule is that of `selection`. Magnitudes are compared 16 bits at a time, from the highest. A
histogram of all layers says which entries are surely among the smallest, which surely are not, and
how many have to come from those still open. Open entries of equal magnitude are chosen by a running
count. Integers alone are added up, so that the result is exact and always the same.

The largest are the candidates without the smallest.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .flat import ROW, Layout, counts_of_rows, vector
from .rng import Draw, first_half, second_half, words

_BINS = 1 << 16  # of a layer, one for each digit
_LOWEST = -(1 << 15)  # the lowest digit
_ZERO = 1 - _LOWEST  # the bin of the digit 0
# Integers of a float's size, and the rank of NaN: above infinity whatever its sign and payload.
_FLOATS = {
    torch.float32: (torch.int32, 0x7F800001),
    torch.float64: (torch.int64, 0x7FF0000000000001),
}


def kind(scores: Tensor | Draw) -> torch.dtype | None:
    """Say how scores are ranked: as which type of number, None for a draw.

    Only layers of the same kind are ranked together. 16-bit floats are widened, which is exact.
    """
    if isinstance(scores, Draw):
        return None
    if scores.is_floating_point():
        return torch.float64 if scores.dtype == torch.float64 else torch.float32
    return torch.int64 if scores.dtype == torch.int64 else torch.int32


class Selector:
    """Selects entries of the layers of a device, in pools: each layer, or all of them together."""

    def __init__(self, layout: Layout, device: torch.device, *, together: bool = False) -> None:
        """Prepare for layers that lie in a flat tensor; `together` they are ranked as float32."""
        self._layout, self._device, self._together = layout, device, together
        # Of every row the pool and the bin of the digit 0, and of every pool the last row.
        pools = [0 if together else layer for layer in range(len(layout.sizes))]
        last = layout.last_rows[-1:] if together else layout.last_rows
        self._pool = layout.spread(pools, device, over_rows=True)
        self._bin = (self._pool * _BINS).add_(_ZERO)
        self._last, used = vector(last, device), len(last) * _BINS
        # Entries that are decided are counted behind all pools, spread over many bins: adding to
        # a single one would take turns.
        self._lanes = torch.arange(used + 2, used + 2 + ROW, dtype=torch.int32, device=device)
        self._one = torch.ones(1, dtype=torch.int32, device=device)

    def select(
        self,
        scores: Sequence[Tensor | Draw],
        counts: Tensor,
        candidates: Tensor,
        want_largest: bool,
    ) -> Tensor:
        """Mark the entries of largest or smallest magnitude in every pool.

        Args:
            scores: Of each layer, all of one kind.
            counts: int32 tensor, how many to pick in each pool.
            candidates: Flat bool tensor, False where there is no layer.
            want_largest: Among equals the lower index is picked first; otherwise the higher one.

        Returns:
            Flat bool tensor.
        """
        chosen, undecided = None, candidates.view(-1, ROW)
        digits = _digits(scores, self._layout, self._device, self._together)
        while digits:
            bins = digits.pop().view(-1, ROW) + self._bin[:, None]
            torch.where(undecided, bins, self._lanes, out=bins)
            from_end = want_largest and chosen is None
            limits, counts = self._limits(bins.view(-1), counts, from_end)
            limits = limits.index_select(0, self._pool)[:, None]
            below, undecided = bins < limits, bins == limits
            chosen = below if chosen is None else chosen.logical_or_(below)
            del bins, below  # the next digit needs the memory
        assert chosen is not None
        chosen |= undecided.logical_and_(self._are_late(undecided, counts))
        chosen = chosen.view(-1)
        return chosen.logical_xor_(candidates) if want_largest else chosen

    def _limits(self, bins: Tensor, counts: Tensor, from_end: bool) -> tuple[Tensor, Tensor]:
        """Find the bins before which entries are chosen, because their digits are the smallest.

        Args:
            bins: Of every entry, from 1 on. Every pool has `_BINS`; those behind do not count.
            counts: How many to choose in each pool; if `from_end`, how many not to choose.

        Returns:
            Of every pool the bin, and how many of its own entries remain to be chosen: less than
            all of them.
        """
        used = len(counts) * _BINS
        found = torch.zeros(used + 3 + ROW, dtype=torch.int32, device=bins.device)
        found[1:].index_add_(0, bins, self._one.expand(len(bins)))
        before = found[: used + 2].cumsum(0, dtype=torch.int32)
        until = before[1:]
        begins, ends = until[:-1:_BINS], until[_BINS::_BINS]
        wanted = torch.maximum(ends - counts, begins) if from_end else begins + counts
        limits = torch.searchsorted(until, wanted, right=True, out_int32=True)
        return limits, wanted - before.index_select(0, limits)

    def _are_late(self, tied: Tensor, counts: Tensor) -> Tensor:
        """Mark the end of each pool, from where on there are `counts` of those that are tied.

        Args:
            tied: bool tensor [rows, ROW].
            counts: How many in each pool.
        """
        found = counts_of_rows(tied)
        until = found.cumsum(0, dtype=torch.int32)
        skipped = until.index_select(0, self._last).sub_(counts).index_select(0, self._pool)
        skipped -= until.sub_(found)
        return tied.to(torch.int16).cumsum_(1) > skipped[:, None]


def _digits(
    scores: Sequence[Tensor | Draw], layout: Layout, device: torch.device, together: bool
) -> list[Tensor]:
    """Give the digits of magnitudes, the lowest first: flat int16 tensors, ordered as numbers."""
    dtype = torch.float32 if together else kind(scores[0])
    if dtype in _FLOATS:
        values = layout.flatten([s for s in scores if isinstance(s, Tensor)], dtype, clear=False)
        values.nan_to_num_(torch.nan, torch.inf, -torch.inf)  # all NaN become the same
    else:
        values = ranks_of(scores, layout, device, want_largest=False)
    digits = values.view(torch.int16).view(layout.numel, -1).unbind(1)
    # Lower digits have no sign: flipping the bit that is taken for one orders them.
    return [digit ^ _LOWEST for digit in digits[:-1]] + [digits[-1] & ~_LOWEST]


def ranks_of(
    scores: Sequence[Tensor | Draw],
    layout: Layout,
    device: torch.device,
    want_largest: bool,
    index: Tensor | None = None,
) -> Tensor:
    """Make the ranks of all entries: int32 or int64, not negative. `index` is that of `drawn`."""
    draws = [found for found in scores if isinstance(found, Draw)]
    tensors = [found for found in scores if isinstance(found, Tensor)]
    if draws:
        ranks = drawn(draws, layout, device, index)
    elif (dtype := kind(tensors[0])) in _FLOATS:
        integer, nan = _FLOATS[dtype]
        ranks = layout.flatten(tensors, dtype).view(integer)
        ranks.bitwise_and_(torch.iinfo(integer).max).clamp_(max=nan)
    else:
        assert dtype is not None
        ranks = layout.flatten(tensors, dtype)
    return ranks.bitwise_xor_(torch.iinfo(ranks.dtype).max) if want_largest else ranks


def drawn(
    draws: Sequence[Draw], layout: Layout, device: torch.device, index: Tensor | None = None
) -> Tensor:
    """Compute elements of draws: flat int32 tensor.

    Args:
        draws: A draw per layer.
        layout: The layers.
        device: Where to compute.
        index: Flat int32 tensor, which elements; by default all of every draw, in order.
    """
    keys = [words(draw.key) for draw in draws]
    index = indices(layout, [0] * len(keys), device) if index is None else index.clone()
    rows = index.view(-1, ROW)
    rows ^= layout.spread([first for first, _ in keys], device, over_rows=True)[:, None]
    first_half(rows)
    rows ^= layout.spread([second for _, second in keys], device, over_rows=True)[:, None]
    second_half(rows)
    return index


def indices(layout: Layout, begins: Sequence[int], device: torch.device) -> Tensor:
    """Number the entries of each layer from a number on: flat int32 tensor."""
    first = torch.arange(0, layout.numel, ROW, dtype=torch.int32, device=device)
    first = layout.add(first, [b - s for b, s in zip(begins, layout.starts, strict=True)])
    return (first[:, None] + torch.arange(ROW, dtype=torch.int32, device=device)).view(-1)
