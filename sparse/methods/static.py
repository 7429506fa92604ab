"""A random mask that never changes."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Allocated, Tensors


@dataclass(frozen=True, kw_only=True)
class Static(Allocated):
    """Train with a random mask that never changes."""

    name: ClassVar[str] = "static"
    title: ClassVar[str] = "static random mask"
    keeps_counts = True

    seed: int = 0

    def due(self, step: int) -> bool:
        return False

    def update(
        self, masks: Tensors, weights: Tensors, grads: Tensors, step: int, state: dict[str, Tensor]
    ) -> Tensors:
        return masks
