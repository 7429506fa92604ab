"""AC/DC: alternating compressed and decompressed training."""

import functools
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar

from torch import Tensor

from ..topology.flat import all_true
from .base import Tensors
from .pruning import Pruning
from .settings import setting


@dataclass(frozen=True, kw_only=True)
class Acdc(Pruning):
    """AC/DC: train sparse and dense in turn, and sparse in the end (Peste et al. 2021).

    A compression keeps the largest weights, a decompression makes all weights active again: the
    pruned ones begin at 0, and the optimizer's state of all parameters is reset. Of n weights a
    compression keeps ceil(n * (1 - s)) - 1, as the original does.

    Attributes:
        events: Step -> whether the network is sparse from this step on, or else dense.
    """

    name: ClassVar[str] = "acdc"
    title: ClassVar[str] = "AC/DC"
    paper: ClassVar[str] = "[Peste et al., 2021](https://arxiv.org/abs/2106.12379)"
    grows = True
    from_masks = None
    why_no_masks = "begins dense, where no mask has an effect"

    total_steps: int = setting(MISSING, "optimizer steps of acdc's run", share=1.0)
    dense_warmup: int = setting(
        MISSING, "optimizer steps before acdc's first compression, at least 1", epochs=10
    )
    sparse_phase: int = setting(
        MISSING, "optimizer steps from acdc's compression to decompression, at least 1", epochs=5
    )
    dense_phase: int = setting(
        MISSING, "optimizer steps from acdc's decompression to compression, at least 1", epochs=5
    )
    last_dense: int = setting(
        MISSING, "optimizer steps of acdc's last dense phase, at least 1", epochs=10
    )
    last_sparse: int = setting(
        MISSING, "optimizer steps of acdc's last sparse phase, at least 1", epochs=15
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        names = "total_steps dense_warmup sparse_phase dense_phase last_dense last_sparse".split()
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dense_warmup + self.last_sparse > self.total_steps:
            raise ValueError(
                f"dense_warmup {self.dense_warmup} and last_sparse {self.last_sparse} are longer "
                f"than the run of {self.total_steps} steps: shorten them"
            )

    @functools.cached_property
    def events(self) -> Mapping[int, bool]:
        last = self.total_steps - self.last_sparse
        found, end = {}, last - self.last_dense
        period = self.sparse_phase + self.dense_phase
        for step in range(self.dense_warmup, end - self.sparse_phase + 1, period):
            found[step] = True
            goes_on = step + period <= end - self.sparse_phase
            found[step + self.sparse_phase if goes_on else end] = False
        return found | {last: True}

    def due(self, step: int) -> bool:
        return step + 1 in self.events

    def restarts_optimizer(self, step: int) -> bool:
        return not self.events[step + 1]

    def num_final(self, numel: int, sparsity: float) -> int:
        return max(math.ceil(numel * (1.0 - sparsity)) - 1, 0) if sparsity > 0.0 else numel

    def update(
        self, masks: Tensors, weights: Tensors, grads: Tensors, step: int, state: dict[str, Tensor]
    ) -> Tensors:
        if self.events[step + 1]:
            return self.prune(weights, masks, self.num_final)
        return all_true(masks)

    def step_flops(self, dense: float, sparse: float, total_steps: int | None = None) -> float:
        """Count dense phases as dense training and sparse phases as sparse training."""
        events, num_sparse = sorted(self.events.items()), 0
        for (step, is_sparse), (until, _) in zip(
            events, [*events[1:], (self.total_steps, False)], strict=True
        ):
            num_sparse += is_sparse * (until - step)
        share = num_sparse / self.total_steps
        return 3 * (share * sparse + (1.0 - share) * dense)

    def check_left(self, num_left: Mapping[str, int]) -> None:
        """Accept any masks: what is pruned comes back."""
