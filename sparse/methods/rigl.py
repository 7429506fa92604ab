"""RigL: Rigging the Lottery."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..topology.selection import Scores
from .base import DropAndGrow, DropNoise, Tensors, Timing
from .settings import setting


@dataclass(frozen=True, kw_only=True)
class Rigl(DropNoise, DropAndGrow):
    """RigL: drop by magnitude, grow by the dense gradient (Evci et al. 2020, algorithm 1).

    An update takes the place of an optimizer step: no weight moves, the step counts. A layer
    without a gradient at an update (frozen, or not part of this step) keeps its mask.
    """

    name: ClassVar[str] = "rigl"
    title: ClassVar[str] = "RigL"
    paper: ClassVar[str] = "[Evci et al., 2020](https://arxiv.org/abs/1911.11134)"
    timing: ClassVar[Timing] = "instead"

    initial_acc_scale: float = setting(0.0, "momentum of rigl's new connections per gradient")

    def grow_scores(self, name: str, mask: Tensor, grads: Tensors, step: int) -> Scores | None:
        return grads.get(name)

    def step_flops(self, dense: float, sparse: float, total_steps: int | None = None) -> float:
        """Count the dense gradient of the weights in one step of delta_t + 1.

        The updates are spread over the whole run, as in the published tables.
        """
        return (3 * sparse * self.delta_t + 2 * sparse + dense) / (self.delta_t + 1)
