"""Pick exactly k entries of every layer of a device at once, in a fixed number of operations.

The rule is that of `selection`. Every entry has a rank: the bits of its magnitude, complemented
where the largest are wanted, so that the smallest ranks are chosen. Ranks are compared 16 bits at a
time, from the highest: a histogram per layer says which entries are surely chosen, which surely are
not, and how many have to come from those still open. Open entries of equal rank are chosen by a
running count. Integers alone are added up, so that the result is exact and always the same.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .flat import LANES, Layout, each
from .rng import Draw, first_half, second_half, words

_BINS = 1 << 16
_OPEN, _CHOSEN = 1, 2  # what is decided of an entry; 0: it is not chosen
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


def select(
    scores: Sequence[Tensor | Draw],
    counts: Tensor,
    candidates: Tensor,
    layout: Layout,
    want_largest: bool,
) -> Tensor:
    """Mark the entries of largest or smallest magnitude in every layer.

    Args:
        scores: Of each layer, all of one kind.
        counts: int32 tensor, how many to pick in each layer.
        candidates: Flat bool tensor, False where there is no layer.
        layout: The layers.
        want_largest: Among equals the lower index is picked first; otherwise the higher one.

    Returns:
        Flat bool tensor.
    """
    device, ties, size = candidates.device, counts, layout.numel
    undecided, state = candidates, candidates.view(torch.int8)
    bases = [layer * _BINS for layer in range(len(layout.sizes))]
    used = len(bases) * _BINS
    lanes = torch.arange(used, used + LANES, dtype=torch.int32, device=device)
    for digit in _digits(ranks_of(scores, layout, device, want_largest)):
        # Entries that are decided are counted behind all layers, spread over many bins: adding to
        # a single one would take turns.
        bins = layout.add(digit, bases).view(-1, LANES)
        torch.where(undecided.view(-1, LANES), bins, lanes, out=bins)
        verdict, counts, ties = _judge(bins.view(size), counts)
        found = verdict.index_select(0, bins.view(size))
        del digit, bins, verdict  # the next digit needs the memory
        state = torch.where(undecided, found, state, out=found)
        undecided = state == _OPEN
    if not want_largest:
        counts = ties - counts
    running = _running(undecided, counts, ties, layout)
    undecided &= running <= 0 if want_largest else running > 0
    return undecided.logical_or_(state == _CHOSEN)


def _judge(bins: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decide by a digit.

    Args:
        bins: Of every entry, the layer times `_BINS` plus the digit, or the bin of one decided.
        counts: How many to pick in each layer.

    Returns:
        What is decided of the entries of every bin, how many of the open ones remain to be picked
        in each layer, and how many there are.
    """
    used = len(counts) * _BINS
    one = torch.ones(1, dtype=torch.int32, device=bins.device)
    found = torch.zeros(used + LANES, dtype=torch.int32, device=bins.device)
    found = found.index_add_(0, bins, one.expand(len(bins)))[:used].view(-1, _BINS)
    until, wanted = found.cumsum(1, dtype=torch.int32), counts[:, None]
    begun = (until - found) < wanted
    whole = until <= wanted
    verdict = torch.zeros(used + LANES, dtype=torch.int8, device=bins.device)
    marks = verdict[:used].view(-1, _BINS)
    torch.add(begun.view(torch.int8), whole.view(torch.int8), out=marks)
    ties = found.mul_(marks == _OPEN).sum(1, dtype=torch.int32)
    return verdict, counts - until.mul_(whole).amax(1), ties


def _running(tied: Tensor, limits: Tensor, totals: Tensor, layout: Layout) -> Tensor:
    """Count the ties of each layer up to every entry, less the limit of the layer: int32."""
    running = tied.to(torch.int32)
    # The first entry of a layer takes back what the count of the layers before comes to.
    corrections = limits.neg()
    corrections[1:] -= (totals - limits)[:-1]
    firsts = [part[:1] for part in layout.split(running)]
    torch._foreach_add_(firsts, each(corrections))
    return running.cumsum_(0)


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
    index ^= layout.spread([first for first, _ in keys], device)
    index = first_half(index)
    index ^= layout.spread([second for _, second in keys], device)
    return second_half(index)


def indices(layout: Layout, begins: Sequence[int], device: torch.device) -> Tensor:
    """Number the entries of each layer from a number on: flat int32 tensor."""
    index = torch.arange(layout.numel, dtype=torch.int32, device=device)
    return layout.add(index, [b - s for b, s in zip(begins, layout.starts, strict=True)])


def _digits(ranks: Tensor) -> Iterator[Tensor]:
    """Yield the digits of ranks, the highest first: int32. Nothing else of the ranks is kept."""
    if ranks.dtype == torch.int64:
        low = ranks.to(torch.int32)
        yield from _digits(ranks.bitwise_right_shift_(32).to(torch.int32))
        yield from _digits(low)
        return
    low = ranks.to(torch.int16)
    yield ranks.bitwise_right_shift_(16).bitwise_and_(0xFFFF)
    del ranks
    digit = low.to(torch.int32).bitwise_and_(0xFFFF)
    del low
    yield digit
