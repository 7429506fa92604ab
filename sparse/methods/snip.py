"""SNIP: pruning once, before training."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import SparsityError
from ..topology.distributions import count_active
from .base import Tensors, Timing
from .pruning import Pruning


@dataclass(frozen=True, kw_only=True)
class Snip(Pruning):
    """SNIP: prune once by |gradient * weight| of the first step's batch (Lee et al. 2019).

    The first optimizer step sets the masks from the gradients it finds, moves no weight and does
    not count. Until then the model is dense. The scope "layer" is that of the RigL repository,
    "global" that of the paper. The dense gradient of this step is not counted in the costs.
    """

    name: ClassVar[str] = "snip"
    title: ClassVar[str] = "SNIP, per layer or global"
    paper: ClassVar[str] = "[Lee et al., 2019](https://arxiv.org/abs/1810.02340)"
    timing: ClassVar[Timing] = "once"
    ranks_products = True

    def due(self, step: int) -> bool:
        return step == 0

    def num_final(self, numel: int, sparsity: float) -> int:
        return count_active(numel, sparsity)

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
        return self.prune(scores, masks, self.num_final)
