"""The methods of sparse training: small frozen values that say when and how masks change.

A method sees the whole network as dicts of tensors and returns new masks; it changes no tensor.
`Sparsifier` owns the masks, applies them and keeps counters, weights and optimizer state in order.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from sparse.errors import SparsityError, check_number
from sparse.topology import rng
from sparse.topology.distributions import count_active
from sparse.topology.masks import drop_and_grow, topk_mask
from sparse.topology.rng import Draw
from sparse.topology.schedules import DropFraction, Window, cubic_sparsity, num_dropped
from sparse.topology.selection import Scores, remove_smallest

Tensors = Mapping[str, Tensor]
Timing = Literal["after", "instead", "once"]
Scope = Literal["layer", "global"]


class Method(ABC):
    """What every method is made of; a new one derives from it and is handed to `Sparsifier`.

    Attributes:
        name: Name of the method, written to checkpoints.
        timing: When an update happens: "after" the optimizer step, "instead" of one (no weight
            moves, the step counts), or "once" before training (no weight moves, no step counts).
        gradient_decay: None: the method sees the dense gradient of the batch, except "after" the
            step, when inactive gradients are gone and it sees none. A number d in [0, 1): it sees
            the average G <- d * G + (1 - d) * gradient, kept over all steps (from 0, no debias).
        keeps_counts: Whether every layer keeps its number of active weights for good.
    """

    name: ClassVar[str]
    timing: ClassVar[Timing] = "after"
    gradient_decay: ClassVar[float | None] = None
    keeps_counts: ClassVar[bool] = False

    @abstractmethod
    def due(self, step: int) -> bool:
        """Say whether the masks change at this step (optimizer steps taken before it)."""

    @abstractmethod
    def update(
        self, masks: Tensors, weights: Tensors, grads: Tensors, step: int, state: dict[str, Tensor]
    ) -> Tensors:
        """Compute the new masks.

        Args:
            masks: Layer name -> bool mask, of all layers that may have one.
            weights: The weights of those layers, exactly 0 where inactive.
            grads: The gradients (see `gradient_decay`) of those layers that have one.
            step: Optimizer steps taken so far.
            state: What the method remembers, tensors by name: saved in checkpoints, empty at first.

        Returns:
            New masks for the same layers. They must not depend on values read from the device.
        """

    def survivors(self, masks: Tensors, weights: Tensors, step: int) -> Tensors:
        """Mark the connections whose weight and optimizer state an update leaves alone."""
        return masks

    def drop_fraction(self, step: int) -> float | None:
        """Give the drop fraction of an update at this step, None if there is no such thing."""
        return None


@dataclass(frozen=True)
class Static(Method):
    """A random mask that never changes."""

    name: ClassVar[str] = "static"
    keeps_counts: ClassVar[bool] = True

    def due(self, step: int) -> bool:
        return False

    def update(
        self, masks: Tensors, weights: Tensors, grads: Tensors, step: int, state: dict[str, Tensor]
    ) -> Tensors:
        return masks


@dataclass(frozen=True)
class Dropping(Method):
    """What methods share that drop the weakest connections of a layer and keep their number.

    Attributes:
        num_active: Layer name -> number of active weights, of all prunable layers in order.
        window: When to update.
        drop: How much to drop.
        drop_noise: Standard deviation of normal noise added to |w| when dropping.
        seed: Seed of all random numbers.
    """

    keeps_counts: ClassVar[bool] = True

    num_active: Mapping[str, int]
    window: Window
    drop: DropFraction
    drop_noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("drop_noise", self.drop_noise)
        if self.drop_noise < 0.0:
            raise ValueError(f"drop_noise must not be negative, got {self.drop_noise}")

    def due(self, step: int) -> bool:
        return self.window.due(step)

    def drop_fraction(self, step: int) -> float:
        return self.drop(step)

    def num_dropped(self, name: str, step: int) -> int:
        """Compute how many connections of a layer an update at this step drops."""
        return num_dropped(self.num_active[name], self.drop(step))

    def key(self, name: str, step: int, purpose: int) -> tuple[int, int, int, int]:
        """Make the random key of a layer at a step."""
        return (self.seed, step, list(self.num_active).index(name), purpose)

    def drop_scores(self, name: str, weight: Tensor, step: int) -> Tensor:
        """Give the scores whose smallest magnitudes are dropped."""
        if self.drop_noise == 0.0:
            return weight
        key = self.key(name, step, rng.DROP_NOISE)
        # Noise never exceeds six deviations: the offset makes scores non-negative, so that ranking
        # them by magnitude is ranking them by value.
        noise = rng.normal(weight.shape, key, weight.device).add_(6.0).mul_(self.drop_noise)
        return noise.add_(weight.abs())


@dataclass(frozen=True)
class DropAndGrow(Dropping):
    """Methods that replace the weakest connections of a layer by others."""

    @abstractmethod
    def grow_scores(self, name: str, mask: Tensor, grads: Tensors, step: int) -> Scores | None:
        """Give the scores whose largest magnitudes are grown; None leaves the layer as it is."""

    def update(
        self, masks: Tensors, weights: Tensors, grads: Tensors, step: int, state: dict[str, Tensor]
    ) -> Tensors:
        new = dict(masks)
        for name, mask in masks.items():
            grow = self.grow_scores(name, mask, grads, step)
            if grow is not None:
                drop = self.drop_scores(name, weights[name], step)
                new[name] = drop_and_grow(mask, drop, grow, self.num_dropped(name, step))
        return new


@dataclass(frozen=True)
class Rigl(DropAndGrow):
    """Grow where the dense gradient is largest (Evci et al. 2020, algorithm 1).

    A layer without a gradient at an update (frozen, or not part of this step) keeps its mask.
    """

    name: ClassVar[str] = "rigl"
    timing: ClassVar[Timing] = "instead"

    def grow_scores(self, name: str, mask: Tensor, grads: Tensors, step: int) -> Scores | None:
        return grads.get(name)


@dataclass(frozen=True)
class GradientMomentum(DropAndGrow):
    """Grow where the average of the dense gradient is largest, layer counts fixed.

    The RigL repository's "momentum" method, its form of SNFS (Dettmers & Zettlemoyer 2019).
    """

    name: ClassVar[str] = "snfs"
    gradient_decay: ClassVar[float] = 0.9

    def grow_scores(self, name: str, mask: Tensor, grads: Tensors, step: int) -> Scores | None:
        return grads.get(name)


@dataclass(frozen=True)
class Set(DropAndGrow):
    """Grow at random (Mocanu et al. 2018).

    Attributes:
        draw: Where the random scores come from: a function of shape and key.
    """

    name: ClassVar[str] = "set"

    draw: Callable[[tuple[int, ...], tuple[int, ...]], Scores] = Draw

    def grow_scores(self, name: str, mask: Tensor, grads: Tensors, step: int) -> Scores:
        return self.draw(tuple(mask.shape), self.key(name, step, rng.GROW_SCORE))


@dataclass(frozen=True)
class RiglReset(Dropping):
    """Reset the weakest weights and keep the masks: the control experiment of the RigL repository.

    That repository calls it "static"; it is not training with a fixed mask, which is `Static`.
    """

    name: ClassVar[str] = "rigl_reset"

    def update(
        self, masks: Tensors, weights: Tensors, grads: Tensors, step: int, state: dict[str, Tensor]
    ) -> Tensors:
        return masks

    def survivors(self, masks: Tensors, weights: Tensors, step: int) -> Tensors:
        return {
            name: remove_smallest(
                mask, self.drop_scores(name, weights[name], step), self.num_dropped(name, step)
            )
            for name, mask in masks.items()
        }


@dataclass(frozen=True)
class Snip(Method):
    """Prune once, before training, by connection sensitivity |gradient * weight| (Lee et al. 2019).

    Attributes:
        sparsities: Layer name -> sparsity, of the layers that are pruned.
        scope: "layer" prunes each layer to its own sparsity, as the RigL repository does; "global"
            ranks the weights of all layers together, as the paper does, for which all must have
            the same sparsity.
    """

    name: ClassVar[str] = "snip"
    timing: ClassVar[Timing] = "once"

    sparsities: Mapping[str, float]
    scope: str = "layer"

    def __post_init__(self) -> None:
        _check_scope(self.scope, self.sparsities)

    def due(self, step: int) -> bool:
        return step == 0

    def update(
        self, masks: Tensors, weights: Tensors, grads: Tensors, step: int, state: dict[str, Tensor]
    ) -> Tensors:
        missing = masks.keys() - grads.keys()
        if missing:
            raise SparsityError(
                f"SNIP needs the gradient of {min(missing)}, which has none: if the layer is "
                "frozen or takes no part in the step, keep it dense with dense_layers"
            )
        scores = {name: weights[name] * grads[name] for name in masks}
        return prune(scores, masks, self.sparsities, self.scope, count_active)


@dataclass(frozen=True)
class Gmp(Method):
    """Prune gradually by magnitude along a cubic ramp (Zhu & Gupta 2017).

    Of n weights, round(n * (1 - s(t))) are kept. Pruned weights do not come back: where fewer are
    left than the ramp asks for, as when a longer one is begun half-way, all of them are kept.

    Attributes:
        sparsities: Layer name -> final sparsity, of the layers that are pruned.
        window: When to prune; the ramp goes from its start to its end.
        scope: "layer" prunes each layer to its own sparsity; "global" ranks the weights of all
            layers together, for which all must have the same sparsity.
    """

    name: ClassVar[str] = "gmp"

    sparsities: Mapping[str, float]
    window: Window
    scope: str = "layer"

    def __post_init__(self) -> None:
        _check_scope(self.scope, self.sparsities)

    def due(self, step: int) -> bool:
        return self.window.due(step)

    def update(
        self, masks: Tensors, weights: Tensors, grads: Tensors, step: int, state: dict[str, Tensor]
    ) -> Tensors:
        def num_kept(numel: int, sparsity: float) -> int:
            ramp = cubic_sparsity(step, self.window.t_start, self.window.t_end, sparsity)
            return round(numel * (1.0 - ramp))

        return prune(weights, masks, self.sparsities, self.scope, num_kept)


def prune(
    scores: Tensors,
    masks: Tensors,
    sparsities: Mapping[str, float],
    scope: str,
    num_kept: Callable[[int, float], int],
) -> Tensors:
    """Keep the active entries of largest |score|, in every layer or in all of them together.

    Args:
        scores: What to rank.
        masks: The masks before.
        sparsities: Layer name -> sparsity.
        scope: "layer" or "global".
        num_kept: How many entries to keep, if as many are active: a function of the number of
            entries and the sparsity.
    """
    if scope == "layer":
        counts = {name: num_kept(mask.numel(), sparsities[name]) for name, mask in masks.items()}
        return {name: topk_mask(scores[name], counts[name], mask) for name, mask in masks.items()}
    flat = torch.cat([scores[name].reshape(-1).float() for name in masks])
    among = torch.cat([mask.reshape(-1) for mask in masks.values()])
    count = num_kept(flat.numel(), sparsities[next(iter(masks))])
    chosen = topk_mask(flat, count, among)
    parts = torch.split(chosen, [mask.numel() for mask in masks.values()])
    return {name: part.view(masks[name].shape) for name, part in zip(masks, parts, strict=True)}


def _check_scope(scope: str, sparsities: Mapping[str, float]) -> None:
    if scope not in get_args(Scope):
        raise ValueError(f"scope must be layer or global, got {scope!r}")
    if scope == "global" and len(set(sparsities.values())) > 1:
        raise ValueError("weights ranked over all layers have one sparsity, not one per layer")
