"""Sparse Networks from Scratch: momentum decides where, and in which layer, weights grow.

Dettmers & Zettlemoyer 2019, with the arithmetic of their repository (sparse_learning, core.py).
All counts are 0-dim or per-layer tensors on the weights' device, because they follow from values
there; nothing is read back.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from sparse.methods.base import Method, Tensors
from sparse.topology import rng
from sparse.topology.masks import bernoulli_growth
from sparse.topology.rng import is_fake
from sparse.topology.schedules import DropFraction, Window
from sparse.topology.selection import add_largest, remove_smallest

Redistribution = Literal["momentum", "magnitude", "nonzero", "numel"]
Growth = Literal["momentum", "random"]

_ROUNDS = 1000  # of spreading the excess; the original gives up after as many


@dataclass(frozen=True)
class Snfs(Method):
    """Drop by magnitude in every layer, share the regrowth out among layers by momentum.

    Attributes:
        baseline: Number of active weights to hold on average, over all layers.
        window: When to update.
        drop: How much to drop.
        layers: All prunable layers in order; a layer's place is part of its random key.
        redistribution: What a layer's share is proportional to: mean |momentum| or |weight| over
            its active weights, its number of nonzero weights, or its size ("numel", which the
            original calls "none").
        growth: Grow where |momentum| is largest, or each candidate with equal probability.
        seed: Seed of all random numbers.
        draw: Where random growth takes its numbers, uniform on [0, 1), from: a function of shape,
            key and device.
        num_active: Layer name -> number of active weights to begin with. An update that does not
            see a layer, because it is frozen, leaves that many out of the baseline.
    """

    name: ClassVar[str] = "snfs"
    gradient_decay: ClassVar[float] = 0.9

    baseline: float
    window: Window
    drop: DropFraction
    layers: tuple[str, ...]
    redistribution: str = "momentum"
    growth: str = "momentum"
    seed: int = 0
    draw: Callable[[tuple[int, ...], tuple[int, ...], torch.device], Tensor] = rng.uniform
    num_active: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.redistribution not in get_args(Redistribution):
            raise ValueError(
                f"redistribution must be one of {', '.join(get_args(Redistribution))}, "
                f"got {self.redistribution!r}"
            )
        if self.growth not in get_args(Growth):
            raise ValueError(f"growth must be momentum or random, got {self.growth!r}")

    def due(self, step: int) -> bool:
        return self.window.due(step)

    def drop_fraction(self, step: int) -> float:
        return self.drop(step)

    def update(
        self, masks: Tensors, weights: Tensors, grads: Tensors, step: int, state: dict[str, Tensor]
    ) -> Tensors:
        numel = {name: mask.numel() for name, mask in masks.items()}
        active = torch.stack([mask.sum() for mask in masks.values()])
        shares = layer_shares(masks, weights, grads, self.redistribution)
        removed = num_removed(active, list(numel.values()), shares, self.drop(step))
        adjustment = state.get("adjustment", shares.new_zeros(()))
        regrown = num_regrown(active, list(numel.values()), shares, removed, adjustment)
        new = {}
        for index, (name, mask) in enumerate(masks.items()):
            kept = remove_smallest(mask, weights[name], removed[index])
            new[name] = self._grow(name, kept, regrown[index], grads, step)
        total = torch.stack([mask.sum() for mask in new.values()]).sum()
        unseen = sum(count for name, count in self.num_active.items() if name not in masks)
        _adjust(state, self.baseline - unseen - total.double())
        return new

    def _grow(self, name: str, kept: Tensor, count: Tensor, grads: Tensors, step: int) -> Tensor:
        if self.growth == "momentum":
            momentum = grads.get(name)
            scores = torch.zeros(kept.shape, device=kept.device) if momentum is None else momentum
            return add_largest(kept, scores, count)
        key = (self.seed, step, self.layers.index(name), rng.GROW_SCORE)
        return bernoulli_growth(kept, count, self.draw(tuple(kept.shape), key, kept.device))


def layer_shares(masks: Tensors, weights: Tensors, momenta: Tensors, redistribution: str) -> Tensor:
    """Compute the share of the regrowth each layer is worth.

    Returns:
        float64 tensor, one entry per layer in the order of `masks`, with sum 1.
    """
    values = []
    for name, mask in masks.items():
        if redistribution == "numel":
            value = torch.tensor(float(mask.numel()), dtype=torch.float64, device=mask.device)
        elif redistribution == "nonzero":
            value = (weights[name] != 0).sum().double()
        else:
            source = (momenta if redistribution == "momentum" else weights).get(name)
            total = mask.new_zeros((), dtype=torch.float64)
            if source is not None:
                total = (source.abs() * mask).sum(dtype=torch.float64)
            value = total / mask.sum().clamp(min=1)
        values.append(value)
    stacked = torch.stack(values)
    total = _ordered_sum(stacked)
    # With no momentum at all (an update before any gradient) every layer is worth the same.
    return torch.where(total > 0, stacked / total, 1.0 / len(values))


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
    zeros = (_vector(numel, active) - active) / _vector(numel, active)
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
    extra = torch.zeros_like(room[0])
    for _ in range(_ROUNDS):
        regrown = regrown + extra
        excess = _ordered_sum((regrown - room).clamp(min=0.0))
        regrown = torch.minimum(regrown, room)
        extra = excess / len(numel)
        # Reading the sum is free on a CPU. On a device the rounds run to the end, adding zeros.
        if excess.device.type == "cpu" and not is_fake(excess) and excess.item() <= 0.0:
            break
    return regrown.floor().clamp(min=0.0).long()


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
    return torch.tensor(numbers, dtype=torch.float64, device=like.device)


def _ordered_sum(values: Tensor) -> Tensor:
    """Sum in order, as a loop over layers does: the rounding of the original."""
    return values.cumsum(0)[-1]
