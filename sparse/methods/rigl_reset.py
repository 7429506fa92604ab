"""The control experiment of the RigL repository."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..topology.selection import replace
from .base import DropNoise, Tensors


@dataclass(frozen=True, kw_only=True)
class RiglReset(DropNoise):
    """Reset the weakest weights at every update and keep the masks: a control for RigL.

    The RigL repository calls this method "static"; it is not training with a fixed mask, which is
    `Static`.
    """

    name: ClassVar[str] = "rigl_reset"
    title: ClassVar[str] = "RigL's control: reset weights, keep masks"

    @property
    def maskable(self) -> tuple[str, ...]:
        return self.allocation.maskable

    def update(
        self, masks: Tensors, weights: Tensors, grads: Tensors, step: int, state: dict[str, Tensor]
    ) -> Tensors:
        return masks

    def survivors(self, masks: Tensors, weights: Tensors, step: int) -> Tensors:
        scores = self.all_drop_scores({name: weights[name] for name in masks}, {}, step)
        counts = {name: self.num_dropped(name, step) for name in masks}
        return replace(masks, drop=scores, num_dropped=counts)
