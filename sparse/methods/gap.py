"""GaP: scheduled grow-and-prune."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import ClassVar, Literal, Self

from torch import Tensor, nn

from ..topology.blocks import check_block
from ..topology.distributions import match_layers
from ..topology.flat import all_true
from ..topology.rng import Draw
from ..topology.selection import largest_in_layers, largest_together
from .allocation import allocate_layers, allocation_of
from .base import Allocated, Tensors
from .layers import included, prunable_modules
from .settings import setting

Init = Literal["random", "magnitude"]

STAGES = ("layer1.*", "layer2.*", "layer3.*", "layer4.*")
"""The partitions of a ResNet, where none are given."""


@dataclass(frozen=True, kw_only=True)
class Gap(Allocated):
    """GaP: one partition of the layers is dense at a time, in turn (Ma et al. 2022, C-GaP).

    After every phase the dense partition is pruned by magnitude, layer by layer, and the next one
    grows to dense: its pruned weights begin at 0. The optimizer begins anew with every phase. After
    the last phase all layers are sparse, and the masks stay. Layers in no partition are dense.

    Attributes:
        members: The layers of every partition.
    """

    name: ClassVar[str] = "gap"
    title: ClassVar[str] = "GaP, cyclic"
    paper: ClassVar[str] = "[Ma et al., 2022](https://arxiv.org/abs/2106.09857)"
    grows = True
    masks_replace = ("mask_init",)

    partitions: Sequence[str] | None = setting(
        None,
        "globs of gap's partitions in turn, those of one joined by commas; by default the stages "
        "of a ResNet",
    )
    phase: int = setting(
        MISSING, "optimizer steps that gap trains with a partition dense, at least 1", epochs=10
    )
    mask_init: Init = setting("random", "masks gap begins with: random, or the largest weights")
    num_phases: int = setting(8, "phases of gap, at least 1; what is left of the run is sparse")
    members: Sequence[Sequence[str]] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block(self.block, "gap grows and prunes single weights")
        for name in ("phase", "num_phases"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if isinstance(self.partitions, str) or len(self.partitions or STAGES) < 2:
            raise ValueError(f"partitions must be two globs or more, got {self.partitions!r}")

    def fitted_to(self, model: nn.Module) -> Self:
        names = prunable_modules(model, included(model, self.include))
        members = [_matches(globs, names) for globs in self.partitions or STAGES]
        seen = [name for part in members for name in part]
        for name in seen:
            if seen.count(name) > 1:
                raise ValueError(f"partitions: {name} is in more than one")
        if self.begins_with is not None:
            found = allocation_of(model, self.begins_with, self.include)
            grown = {name: found.sizes[name] for name in members[0]}
            return dataclasses.replace(
                self,
                allocation=dataclasses.replace(found, num_active=found.num_active | grown),
                sparsity=found.sparsity,
                members=members,
            )
        dense = self.dense_layers
        if not isinstance(dense, str):  # which is refused with what else it might be
            dense = [*(dense or ()), *(name for name in names if name not in seen)]
        others = "distribution power_scale sparsity_map include".split()
        settings = {name: getattr(self, name) for name in others}
        found = allocate_layers(model, self.sparsity, dense_layers=dense, **settings)
        counts, count = dict(found.sizes), num_random if self.mask_init == "random" else num_kept
        for name in found.maskable:
            if name not in members[0]:
                counts[name] = count(found.sizes[name], found.sparsities[name])
        found = dataclasses.replace(found, num_active=counts)
        return dataclasses.replace(self, allocation=found, members=members)

    @property
    def num_in_masks(self) -> Mapping[str, int]:
        return self.final_counts

    def begin_from(self, masks: Tensors) -> Tensors:
        return {name: mask for name, mask in masks.items() if name not in self.members[0]}

    def first_masks(
        self,
        draws: Mapping[str, Draw],
        num_active: Mapping[str, int],
        among: Tensors,
        weights: Tensors,
    ) -> Tensors:
        if self.mask_init == "random":
            return super().first_masks(draws, num_active, among, weights)
        return largest_in_layers(weights, num_active, among)

    @property
    def final_counts(self) -> Mapping[str, int]:
        return {name: self.num_left(name, size) for name, size in self.allocation.sizes.items()}

    def num_left(self, name: str, numel: int) -> int:
        """Compute how many weights a layer keeps when its partition is pruned."""
        if self.begins_with is not None:
            return self.begins_with.get(name, numel)
        return num_kept(numel, self.allocation.sparsities[name])

    def due(self, step: int) -> bool:
        return (step + 1) % self.phase == 0 and step < self.phase * self.num_phases

    def restarts_optimizer(self, step: int) -> bool:
        return True

    def grown_at(self, step: int) -> Sequence[str]:
        """List the layers that an update with this step makes dense; none after the last phase."""
        number = (step + 1) // self.phase
        return self.members[number % len(self.members)] if number < self.num_phases else ()

    def update(
        self, masks: Tensors, weights: Tensors, grads: Tensors, step: int, state: dict[str, Tensor]
    ) -> Tensors:
        grown = set(self.grown_at(step))
        # Sparse layers have no more than that many, so that they stay as they are.
        pruned = {name: mask for name, mask in masks.items() if name not in grown}
        counts = {name: self.num_left(name, mask.numel()) for name, mask in pruned.items()}
        full = all_true({name: mask for name, mask in masks.items() if name in grown})
        new = full | (largest_in_layers(weights, counts, pruned) if pruned else {})
        return {name: new[name] for name in masks}

    def step_flops(self, dense: float, sparse: float, total_steps: int | None = None) -> float:
        """Count every partition as dense in its phases, as if all were dense for equally long.

        Raises:
            ValueError: total_steps is not given.
        """
        if total_steps is None:
            raise ValueError("the cost of gap depends on the run's length: pass total_steps")
        share = min(self.phase * self.num_phases / total_steps, 1.0)
        return 3 * (sparse + share * (dense - sparse) / len(self.partitions or STAGES))


def num_kept(numel: int, sparsity: float) -> int:
    """Compute how many weights a layer keeps: those above a percentile of their magnitudes."""
    return numel if sparsity == 0.0 else numel - 1 - math.floor(sparsity * (numel - 1))


def num_random(numel: int, sparsity: float) -> int:
    """Compute how many weights a layer begins with, as the original rounds it."""
    return int(numel * (1.0 - sparsity))


def magnitude_sparsities(weights: Tensors, sparsity: float) -> dict[str, float]:
    """Share a sparsity out among layers as pruning all of them together would.

    Args:
        weights: Layer name -> trained weights.
        sparsity: Fraction of zeros over all layers.

    Returns:
        Layer name -> fraction of weights that are not among the largest of all layers.
    """
    kept = num_kept(sum(weight.numel() for weight in weights.values()), sparsity)
    masks = largest_together(weights, kept, all_true(weights))
    return {name: 1.0 - int(mask.sum()) / mask.numel() for name, mask in masks.items()}


def _matches(globs: str, names: Mapping[str, object]) -> list[str]:
    """List the layers of a partition. One of its globs may match other modules alone."""
    found = set()
    for glob in map(str.strip, globs.split(",")):
        with contextlib.suppress(ValueError):
            found |= set(match_layers(glob, names, "partitions"))
    return [name for name in names if name in found] or match_layers(globs, names, "partitions")
