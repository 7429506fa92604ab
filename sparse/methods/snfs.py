"""Sparse Networks from Scratch: momentum decides where, and in which layer, weights grow.

Dettmers & Zettlemoyer 2019, with the arithmetic of their repository (sparse_learning, core.py).
All counts are 0-dim or per-layer tensors on the weights' device, because they follow from values
there; nothing is read back.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..topology import draws, rng
from ..topology.blocks import check_block
from ..topology.draws import Keys
from ..topology.flat import ROW, batched, by_device, count_nonzero, gather, layout_for, vector
from ..topology.selection import Scores, replace
from ..topology.sharded import sums_of_magnitudes
from ..topology.shards import any_sharded
from .base import DropAndGrow, Tensors
from .settings import setting

Redistribution = Literal["momentum", "magnitude", "nonzero", "numel", "none"]
Growth = Literal["momentum", "random"]

_ROUNDS = 1000  # of spreading the excess; the original gives up after as many
_LITTLE = 1e-6  # of a weight


@dataclass(frozen=True, kw_only=True)
class Snfs(DropAndGrow):
    """Sparse Networks from Scratch: grow by gradient momentum (Dettmers & Zettlemoyer 2019).

    Every layer drops by magnitude. The regrowth is shared out among the layers in proportion to
    mean |momentum| or |weight| over their active weights, to their number of nonzero weights, or to
    their size ("numel", which the original calls "none"). With the redistribution "none" every
    layer keeps its count: the RigL repository's "momentum" method. The growth "random" is a
    control: each candidate has equal probability, and counts are met in expectation only.

    Attributes:
        draw: Where random growth takes its numbers, uniform on [0, 1), from: a function of keys and
            of tensors of the layers' shapes, both by name.
    """

    name: ClassVar[str] = "snfs"
    title: ClassVar[str] = "SNFS, with or without redistribution"
    paper: ClassVar[str] = "[Dettmers & Zettlemoyer, 2019](https://arxiv.org/abs/1907.04840)"
    gradient_decay: ClassVar[float] = 0.9

    drop_fraction_min: float = setting(0.0, "what the cosine of the drop fraction ends at")
    redistribution: Redistribution = setting(
        "momentum", "what a layer's share of snfs's growth follows; none: counts stay"
    )
    growth: Growth = setting("momentum", "where snfs grows")
    draw: Callable[[Keys, Tensors], Tensors] = draws.uniform

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.keeps_counts:
            moves = f"redistribution {self.redistribution!r} moves single weights between layers"
            check_block(self.block, moves)
        if self.redistribution == "none" and self.growth != "momentum":
            raise ValueError(
                f"growth {self.growth!r} has no effect with redistribution 'none'; use set"
            )

    @property
    def keeps_counts(self) -> bool:
        return self.redistribution == "none"

    def step_flops(self, dense: float, sparse: float, total_steps: int | None = None) -> float:
        """Count the dense gradient of the weights in every step."""
        return 2 * sparse + dense

    def grow_scores(self, name: str, mask: Tensor, grads: Tensors, step: int) -> Scores | None:
        return grads.get(name)

    def update(
        self, masks: Tensors, weights: Tensors, grads: Tensors, step: int, state: dict[str, Tensor]
    ) -> Tensors:
        if self.keeps_counts:
            return super().update(masks, weights, grads, step, state)
        numel = [mask.numel() for mask in masks.values()]
        active = count_nonzero(masks)
        shares = layer_shares(masks, active, weights, grads, self.redistribution)
        removed = num_removed(active, numel, shares, self.schedule(step))
        adjustment = state.get("adjustment", shares.new_zeros(()))
        regrown = num_regrown(active, numel, shares, removed, adjustment)
        new = self._change(masks, weights, grads, step, removed, regrown)
        total = count_nonzero(new).sum()
        # What an update does not see, because it is frozen, has no part in the number to hold.
        baseline = sum(self.num_active[name] for name in masks)
        _adjust(state, baseline - total.double())
        return new

    def _change(
        self,
        masks: Tensors,
        weights: Tensors,
        grads: Tensors,
        step: int,
        removed: Tensor,
        regrown: Tensor,
    ) -> dict[str, Tensor]:
        num_dropped = dict(zip(masks, removed.unbind(), strict=True))
        if self.growth == "momentum":
            num_grown = dict(zip(masks, regrown.unbind(), strict=True))
            grow = {n: grads[n] if n in grads else torch.zeros_like(weights[n]) for n in masks}
            return replace(
                masks, drop=weights, num_dropped=num_dropped, grow=grow, num_grown=num_grown
            )
        kept = replace(masks, drop=weights, num_dropped=num_dropped)
        keys = {name: self.key(name, step, rng.GROW_SCORE) for name in masks}
        return bernoulli_growth(kept, regrown, self.draw(keys, kept))


def bernoulli_growth(kept: Tensors, expected: Tensor, uniform: Tensors) -> dict[str, Tensor]:
    """Activate inactive entries, each with probability expected / inactive entries of its layer.

    Args:
        kept: Layer name -> the mask after dropping.
        expected: The number of entries to activate in each layer.
        uniform: Layer name -> numbers uniform on [0, 1), of the shape of the mask.
    """
    numel = _vector([mask.numel() for mask in kept.values()], expected).long()
    shares = dict(zip(kept, (expected / (numel - count_nonzero(kept))).unbind(), strict=True))
    new: dict[str, Tensor] = {}
    for names in by_device(kept):
        if batched(kept[names[0]]) and not any_sharded(kept.values()):
            layout = layout_for(kept[name] for name in names)
            share = layout.of_rows(gather([shares[name] for name in names]))
            numbers = layout.flatten([uniform[name] for name in names], torch.float32, clear=False)
            grown = (numbers.view(-1, ROW) < share).view(-1)
            grown |= layout.flatten([kept[name] for name in names], torch.bool, clear=False)
            new |= layout.by_layer(grown, names, kept)
        else:
            new |= {name: kept[name] | (uniform[name] < shares[name]) for name in names}
    return {name: new[name] for name in kept}


def layer_shares(
    masks: Tensors, active: Tensor, weights: Tensors, momenta: Tensors, redistribution: str
) -> Tensor:
    """Compute the share of the regrowth each layer is worth.

    Args:
        masks: Layer name -> mask.
        active: Active weights per layer, integer tensor.
        weights: Layer name -> weight.
        momenta: Layer name -> momentum, of the layers that have one.
        redistribution: One of `Redistribution`, other than "none".

    Returns:
        float64 tensor, one entry per layer in the order of `masks`, with sum 1.
    """
    first = next(iter(masks.values()))
    if redistribution == "numel":
        stacked = _vector([mask.numel() for mask in masks.values()], first)
    elif redistribution == "nonzero":
        stacked = count_nonzero({name: weights[name] for name in masks}).double()
    else:
        totals = _magnitudes(masks, momenta if redistribution == "momentum" else weights)
        stacked = totals / active.clamp(min=1)
    total = _ordered_sum(stacked)
    # With no momentum at all (an update before any gradient) every layer is worth the same.
    return torch.where(total > 0, stacked / total, 1.0 / len(masks))


def _magnitudes(masks: Tensors, sources: Tensors) -> Tensor:
    """Add up the magnitudes of every layer where its mask is True: float64, 0 without a source."""
    found = {name: sources[name] for name in masks if name in sources}
    if any_sharded(masks.values()):
        zero = {name: masks[name] for name in masks if name not in found}
        active = {n: found[n] * masks[n] if n in found else zero[n] & ~zero[n] for n in masks}
        return sums_of_magnitudes(active)
    totals = dict.fromkeys(masks, next(iter(masks.values())).new_zeros((), dtype=torch.float64))
    for names in by_device(found):
        if batched(found[names[0]]):
            layout = layout_for(masks[name] for name in names)
            dtypes = {found[name].dtype for name in names}
            dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
            values = layout.flatten([found[name] for name in names], dtype, clear=False)
            values *= layout.flatten([masks[name] for name in names], torch.bool, clear=False)
            norms = torch._foreach_norm(layout.entries(values), 1, dtype=torch.float64)
            totals |= dict(zip(names, norms, strict=True))
        else:
            for name in names:
                totals[name] = (found[name].abs() * masks[name]).sum(dtype=torch.float64)
    return gather(list(totals.values()))


def num_removed(active: Tensor, numel: list[int], shares: Tensor, rate: float) -> Tensor:
    """Compute how many weights each layer loses: ceil(rate * active).

    The rate of a layer with less than 20% zeros whose share is above average, so that it is still
    growing, is limited to its fraction of zeros.

    Args:
        active: Active weights per layer, integer tensor.
        numel: Weights per layer.
        shares: Shares of the layers, float64.
        rate: Drop fraction.

    Returns:
        int64 tensor, one entry per layer.
    """
    sizes = _vector(numel, active)
    zeros = (sizes - active) / sizes
    growing = (zeros < 0.2) & (1.0 / len(numel) < shares)
    rates = torch.where(growing, zeros.clamp(max=rate), rate)
    return (rates * active).ceil().long()


def num_regrown(
    active: Tensor, numel: list[int], shares: Tensor, removed: Tensor, adjustment: Tensor
) -> Tensor:
    """Compute how many weights each layer gets back: ceil(share * (all removed + adjustment)).

    No layer may fill more than 99% of its free places; what exceeds that is spread equally over all
    layers, again and again until nothing is left over. The results are rounded down.

    Args:
        active: Active weights per layer before the removal, integer tensor.
        numel: Weights per layer.
        shares: Shares of the layers, float64.
        removed: Weights each layer loses, integer tensor.
        adjustment: float64, 0-dim: what earlier updates grew too few.

    Returns:
        int64 tensor, one entry per layer.
    """
    room = 0.99 * (_vector(numel, active) - active + removed)
    regrown = (shares * (removed.sum() + adjustment)).ceil()
    regrown = _level(regrown, room) if batched(regrown) else _spread_excess(regrown, room)
    return regrown.floor().clamp(min=0.0).long()


def _spread_excess(regrown: Tensor, room: Tensor) -> Tensor:
    """Spread what exceeds the room in rounds, as the original does."""
    extra = torch.zeros_like(room[0])
    for _ in range(_ROUNDS):
        regrown = regrown + extra
        excess = _ordered_sum((regrown - room).clamp(min=0.0))
        regrown = torch.minimum(regrown, room)
        extra = excess / len(room)
        if excess.item() <= 0.0:
            break
    return regrown


def _level(regrown: Tensor, room: Tensor) -> Tensor:
    """Compute what the rounds tend to, without rounds, whose end a host would have to read.

    In every round all layers get the same, and none keeps more than its room. In the end a layer
    has min(regrown + level, room), and the level is where the excess is used up. The rounds stay
    below this limit. Its distance from an integer that it does not meet is at least 0.01 divided by
    the number of layers, so a little less of it is rounded down as the result of the rounds is. If
    it does meet an integer, rounding alone says whether the rounds reach it; here they do not.
    """
    excess = (regrown - room).clamp(min=0.0).sum()
    free = (room - regrown).clamp(min=0.0)
    # What all layers take together, were the level the free room of one of them.
    taken = torch.minimum(free[:, None], free[None, :]).sum(1)
    full = taken <= excess
    level = (excess - (free * full).sum()) / (~full).sum().clamp(min=1)
    # With no layer left to take the excess, all of them are filled.
    level = torch.where(full.all(), free.amax() + 1.0, level)
    return torch.minimum(regrown + (level - _LITTLE).clamp(min=0.0), room)


def _adjust(state: dict[str, Tensor], deviation: Tensor) -> None:
    """Smooth the deviation from the baseline, for which the next update compensates.

    adjustment <- 0.25 * adjustment + 0.75 * deviation + mean of all deviations so far.
    """
    zero = torch.zeros_like(deviation)
    total = state.get("deviation_sum", zero) + deviation
    count = state.get("deviation_count", zero) + 1.0
    previous = state.get("adjustment", zero)
    state["deviation_sum"], state["deviation_count"] = total, count
    state["adjustment"] = 0.25 * previous + 0.75 * deviation + total / count


def _vector(numbers: list[int], like: Tensor) -> Tensor:
    if batched(like):
        return vector(numbers, like.device, torch.float64)
    return torch.tensor(numbers, dtype=torch.float64)


def _ordered_sum(values: Tensor) -> Tensor:
    """Sum in order, as a loop over layers does: the rounding of the original."""
    return values.sum() if batched(values) else values.cumsum(0)[-1]
