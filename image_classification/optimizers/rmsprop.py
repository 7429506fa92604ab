"""RMSprop of torch."""

from typing import Any

import torch
from torch.optim import Optimizer, RMSprop

from image_classification.optimizers.spec import OptimizerSpec


def create(
    groups: list[dict[str, Any]],
    *,
    momentum: float = 0.9,
    rmsprop_alpha: float = 0.9,
    rmsprop_eps: float = 1e-3,
    device: torch.device,
    **options: Any,
) -> Optimizer:
    """Return RMSprop; torch has no fused implementation of it.

    Args:
        groups: The parameter groups.
        momentum: Momentum of the update.
        rmsprop_alpha: Smoothing constant of the squared gradient.
        rmsprop_eps: Added to the root of the squared gradient.
        device: Where the parameters are.
        **options: Learning rate and weight decay.
    """
    return RMSprop(groups, alpha=rmsprop_alpha, eps=rmsprop_eps, momentum=momentum, **options)


SPEC = OptimizerSpec(
    create=create,
    settings={
        "momentum": "momentum",
        "rmsprop_alpha": "smoothing constant",
        "rmsprop_eps": "epsilon",
    },
)
