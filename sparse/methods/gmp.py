"""Gradual magnitude pruning."""

import functools
from dataclasses import MISSING, dataclass
from typing import ClassVar

from torch import Tensor

from ..topology.schedules import Window, check_period
from .base import Tensors
from .pruning import Pruning
from .settings import setting


@dataclass(frozen=True, kw_only=True)
class Gmp(Pruning):
    """Gradual magnitude pruning along a cubic ramp (Zhu & Gupta 2017).

    Of n weights, round(n * (1 - s(t))) are kept. Pruned weights do not come back: where fewer are
    left than the ramp asks for, as when a longer one is begun half-way, all of them are kept.
    """

    name: ClassVar[str] = "gmp"
    title: ClassVar[str] = "gradual magnitude pruning"
    paper: ClassVar[str] = "[Zhu & Gupta, 2017](https://arxiv.org/abs/1710.01878)"

    prune_start: int = setting(0, "optimizer step at which gmp starts")
    prune_end: int = setting(MISSING, "step of gmp's final sparsity", is_end=True)
    prune_every: int = setting(100, "optimizer steps between gmp's prunings, at least 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.prune_start < self.prune_end or self.prune_every < 1:
            raise ValueError(
                f"prune_start {self.prune_start}, prune_end {self.prune_end} and prune_every "
                f"{self.prune_every} must satisfy 0 <= prune_start < prune_end and "
                "prune_every >= 1"
            )

    @functools.cached_property
    def window(self) -> Window:
        return Window(self.prune_every, self.prune_start, self.prune_end, at_end=True)

    def due(self, step: int) -> bool:
        return self.window.due(step)

    def num_final(self, numel: int, sparsity: float) -> int:
        return round(numel * (1.0 - sparsity))

    def update(
        self, masks: Tensors, weights: Tensors, grads: Tensors, step: int, state: dict[str, Tensor]
    ) -> Tensors:
        def num_kept(numel: int, sparsity: float) -> int:
            ramp = cubic_sparsity(step, self.prune_start, self.prune_end, sparsity)
            return self.num_final(numel, ramp)

        return self.prune(weights, masks, num_kept)

    def step_flops(self, dense: float, sparse: float, total_steps: int | None = None) -> float:
        """Average over the ramp: operations are linear in the density.

        Raises:
            ValueError: total_steps is not given.
        """
        if total_steps is None:
            raise ValueError("the cost of gmp depends on the length of the run: pass total_steps")
        begun = 0.0  # the share of the ramp that masks to begin with have done
        if self.begins_with and self.allocation.sizes:
            whole = sum(self.allocation.sizes.values())
            begun = whole - sum(self.num_active.values())
            begun /= max(whole - self.final_total, 1)
        return 3 * (dense - self.mean_ramp(total_steps, begun) * (dense - sparse))

    def mean_ramp(self, total_steps: int, begun: float = 0.0) -> float:
        """Compute the mean of sparsity / final sparsity over a run.

        Between two prunings the sparsity does not change: it is that of the last pruning. The
        first one removes nothing. Steps at and after `prune_end` have the final sparsity.

        Args:
            total_steps: Optimizer steps of the run.
            begun: This ratio at the start.

        Raises:
            ValueError: total_steps is less than 1.
        """
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        start, end = self.prune_start, self.prune_end
        total, ramp_end = begun * min(start, total_steps), min(end, total_steps)
        for step in range(start, ramp_end, self.prune_every):
            share = cubic_sparsity(step, start, end, 1.0)
            total += max(share, begun) * (min(step + self.prune_every, ramp_end) - step)
        return (total + max(0, total_steps - end)) / total_steps


def cubic_sparsity(step: int, t_start: int, t_end: int, final: float) -> float:
    """Ramp the sparsity from 0 at t_start to `final` at t_end and after.

    s(t) = final * (1 - (1 - p)^3) with p = (t - t_start) / (t_end - t_start) clipped to [0, 1]
    (Zhu & Gupta 2017, equation 1).
    """
    check_period(t_start, t_end)
    progress = min(max((step - t_start) / (t_end - t_start), 0.0), 1.0)
    return float(final * (1.0 - (1.0 - progress) ** 3))
