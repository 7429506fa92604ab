"""GraNet: pruning that goes on while connections regrow."""

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from decimal import Decimal
from typing import ClassVar, Literal, Self

from torch import Tensor, nn

from ..topology.blocks import check_block
from ..topology.distributions import check_sparsity, count_active
from ..topology.flat import count_nonzero
from ..topology.selection import largest_together, replace
from .after import AfterSteps
from .allocation import allocate_layers, check_prunable
from .base import Tensors
from .settings import setting


@dataclass(frozen=True, kw_only=True)
class Granet(AfterSteps):
    """GraNet: prune all layers together along a ramp, and regrow in each (Liu et al. 2021).

    An update prunes the smallest weights of the whole network, down to a number that falls along a
    cubic ramp. Then every layer drops its weakest connections and grows as many where the dense
    gradient is largest. The network begins with an initial sparsity, or dense with 0.
    """

    name: ClassVar[str] = "granet"
    title: ClassVar[str] = "GraNet, from sparse or dense"
    paper: ClassVar[str] = "[Liu et al., 2021](https://arxiv.org/abs/2106.10404)"
    from_masks: ClassVar[Literal["counts", "prune"] | None] = "prune"
    masks_replace = ("initial_sparsity", "distribution", "power_scale")

    initial_sparsity: float = setting(0.5, "granet's fraction of zeros at first, 0 to begin dense")
    prune_end: int = setting(MISSING, "step of granet's final sparsity", share=0.3)
    t_end: int = setting(MISSING, "last optimizer step of a topology update", share=1.0)
    drop_fraction: float = setting(0.5, "first share of connections replaced, in [0, 1]")
    drop_fraction_min: float = setting(0.005, "what the cosine of the drop fraction ends at")
    sparsity_map: Mapping[str, float] | None = None  # no setting: all layers are ranked together

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block(self.block, "granet ranks the single weights of all layers")
        check_sparsity(self.sparsity)
        if self.begins_with is None and not 0.0 <= self.initial_sparsity <= self.sparsity:
            raise ValueError(
                f"initial_sparsity must be in [0, {self.sparsity}], up to the final sparsity, got "
                f"{self.initial_sparsity}"
            )
        if self.initial_sparsity == 0.0 and self.power_scale != 1.0:
            raise ValueError("power_scale has no effect with initial_sparsity 0, a dense start")
        if self.prune_end < self.t_start or self.prune_end < 1:
            raise ValueError(
                f"prune_end must be at least 1 and t_start {self.t_start}, got {self.prune_end}"
            )

    @property
    def keeps_counts(self) -> bool:
        return False

    def fitted_to(self, model: nn.Module) -> Self:
        names = "distribution power_scale dense_layers include".split()
        settings = {name: getattr(self, name) for name in names}
        if self.begins_with is None:
            allocation = allocate_layers(model, self.initial_sparsity, **settings)
            return dataclasses.replace(self, allocation=allocation)
        found = allocate_layers(model, 0.0, **settings)  # all layers dense
        check_prunable(self.begins_with, found)
        found = dataclasses.replace(found, num_active={**found.num_active, **self.begins_with})
        left = {name: found.num_active[name] for name in found.maskable}
        ranked = sum(found.sizes[name] for name in left)
        initial = 1.0 - sum(left.values()) / max(ranked, 1)
        fitted = dataclasses.replace(self, allocation=found, initial_sparsity=initial)
        fitted.check_left(left)
        return fitted

    @property
    def final_counts(self) -> Mapping[str, int] | None:
        return None

    @property
    def final_total(self) -> int:
        sizes = self.allocation.sizes
        ranked = sum(sizes[name] for name in self.allocation.maskable)
        return sum(sizes.values()) - ranked + count_active(ranked, self.sparsity)

    def progress(self, step: int) -> float:
        """Give the share of the ramp that an update with this step has done, counted in updates."""
        first, last = self.t_start // self.delta_t, self.prune_end // self.delta_t
        number = (step + 1) // self.delta_t
        return 1.0 if number >= last else (number - first) / (last - first)

    def num_kept(self, numel: int, step: int) -> int:
        """Compute how many of all weights the pruning of an update leaves, if as many are left.

        On the ramp int(numel * (1 - s)), with the double arithmetic of the original.
        """
        progress = self.progress(step)
        if progress >= 1.0:
            return count_active(numel, self.sparsity)
        first, last = _density(self.initial_sparsity), _density(self.sparsity)
        zeros = (1.0 - first) + (first - last) * (1.0 - (1.0 - progress) ** 3)
        return int(numel * (1.0 - zeros))

    def survivors(self, masks: Tensors, weights: Tensors, step: int) -> Tensors:
        if self.progress(step) <= 0.0:
            return masks
        numel = sum(mask.numel() for mask in masks.values())
        return largest_together(weights, self.num_kept(numel, step), masks)

    def update(
        self, masks: Tensors, weights: Tensors, grads: Tensors, step: int, state: dict[str, Tensor]
    ) -> Tensors:
        pruned = self.survivors(masks, weights, step)
        active = count_nonzero(pruned).double()
        dropped = (active * self.fraction_at(step)).ceil().long()
        counts = dict(zip(pruned, dropped.unbind(), strict=True))
        changed = {name: mask for name, mask in pruned.items() if name in grads}
        new = replace(changed, drop=weights, num_dropped=counts, grow=grads, num_grown=counts)
        return {**pruned, **new}

    def step_flops(self, dense: float, sparse: float, total_steps: int | None = None) -> float:
        """Average over the ramp, and count the dense gradient of the weights at updates.

        Operations are taken to be linear in the number of weights. That is an estimate, because
        the layers share them out as training decides.

        Raises:
            ValueError: total_steps is not given.
        """
        if total_steps is None:
            raise ValueError("the cost of granet depends on the run's length: pass total_steps")
        share, grown = 0.0, 0.0
        excess = (self.sparsity - self.initial_sparsity) / self.sparsity if self.sparsity else 0.0
        for step in range(total_steps):
            forward = sparse + excess * (dense - sparse)
            share += 3 * forward / total_steps
            if self.due(step):
                grown += (dense - forward) / total_steps
                left = (1.0 - max(self.progress(step), 0.0)) ** 3
                excess = left * (self.sparsity - self.initial_sparsity) / (self.sparsity or 1.0)
        return share + grown

    def check_left(self, num_left: Mapping[str, int]) -> None:
        sizes = sum(self.allocation.sizes[name] for name in num_left)
        left, wanted = sum(num_left.values()), count_active(sizes, self.sparsity)
        if left < wanted:
            raise ValueError(
                f"the network has {left} weights left, this run would keep {wanted}, and granet "
                "adds none"
            )


def _density(sparsity: float) -> float:
    """Compute 1 - sparsity in decimal numbers: 0.2 for 0.8."""
    return float(1 - Decimal(str(sparsity)))
