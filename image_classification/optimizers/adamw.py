"""AdamW of torch."""

from typing import Any

import torch
from torch.optim import AdamW, Optimizer

from image_classification.optimizers.spec import OptimizerSpec


def create(groups: list[dict[str, Any]], *, device: torch.device, **options: Any) -> Optimizer:
    """Return AdamW (decoupled weight decay) with torch's averages, 0.9 and 0.999."""
    return AdamW(groups, fused=device.type in ("cuda", "cpu"), **options)


SPEC = OptimizerSpec(create=create)
