"""One-shot magnitude pruning: masks of the largest weights, before training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..topology.distributions import count_active
from ..topology.rng import Draw
from ..topology.selection import largest_in_layers
from .base import Tensors, Timing
from .pruning import Pruning


@dataclass(frozen=True, kw_only=True)
class Magnitude(Pruning):
    """One-shot magnitude pruning: keep the largest weights, then train with these masks.

    The masks are those of the weights that the model has when it is made sparse: load a trained
    network before. They never change. Of n weights, n - floor(s * n) are kept. The scope "layer"
    does this in every layer, "global" over all layers together.
    """

    name: ClassVar[str] = "magnitude"
    title: ClassVar[str] = "one-shot magnitude pruning, per layer or global"
    paper: ClassVar[str] = "[Han et al., 2015](https://arxiv.org/abs/1506.02626)"
    timing: ClassVar[Timing] = "once"
    from_masks = None

    @property
    def keeps_counts(self) -> bool:
        return self.scope == "layer"

    @property
    def num_active(self) -> Mapping[str, int]:
        return self.allocation.num_active

    def first_masks(
        self,
        draws: Mapping[str, Draw],
        num_active: Mapping[str, int],
        among: Tensors,
        weights: Tensors,
    ) -> Tensors:
        if self.scope == "layer":
            return largest_in_layers(weights, num_active, among)
        return self.prune(weights, among, self.num_final)

    def due(self, step: int) -> bool:
        return False

    def num_final(self, numel: int, sparsity: float) -> int:
        return count_active(numel, sparsity)

    def update(
        self, masks: Tensors, weights: Tensors, grads: Tensors, step: int, state: dict[str, Tensor]
    ) -> Tensors:
        return masks
