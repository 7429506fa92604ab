"""What methods share that drop and grow with a step, after its weights have moved."""

import functools
from dataclasses import dataclass

from ..topology.schedules import DropFraction
from .base import Dropping


@dataclass(frozen=True, kw_only=True)
class AfterSteps(Dropping):
    """Methods that change masks after a step, by the dense gradient of this step's batch.

    Their schedules count the step that was just taken: updates come after t_start + delta_t steps,
    t_start + 2 * delta_t steps and so on, and not before the first step. The cosine begins at 0.
    """

    grows = True
    gradient_steps = 1

    @functools.cached_property
    def schedule(self) -> DropFraction:
        minimum, default = self.drop_fraction_min, type(self).drop_fraction_min
        if minimum == default:  # it is not asked for, and gives way to what is
            minimum = min(default, self.drop_fraction) if self.drop_anneal == "cosine" else 0.0
        return DropFraction(
            initial=self.drop_fraction,
            t_start=0,
            t_end=self.t_end,
            anneal=self.drop_anneal,
            power=self.drop_power,
            minimum=minimum,
        )

    def due(self, step: int) -> bool:
        return self.window.due(step + 1)

    def fraction_at(self, step: int) -> float:
        return self.schedule(step + 1)
