"""Keep an average of every dense gradient, for the methods that grow by it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparse.training.clock import found_inf, inverse_scale


def average_gradients(
    averages: dict[str, Tensor],
    weights: Mapping[str, nn.Parameter],
    decay: float,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Blend the present gradients in: average <- decay * average + (1 - decay) * gradient.

    Averages start at 0 and are at least float32. If a GradScaler leaves the unscaling to a fused
    optimizer, the gradients are unscaled first. If it found an overflow, the averages do not
    change.
    """
    unscale, overflow = inverse_scale(optimizer), found_inf(optimizer)
    for name, weight in weights.items():
        gradient = weight.grad
        if gradient is None:
            continue
        if name not in averages:
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            averages[name] = torch.zeros_like(weight, dtype=dtype)
        average = averages[name]
        gradient = gradient.to(average.dtype)
        if unscale is not None:
            gradient = gradient * unscale
        if overflow is None:
            average.lerp_(gradient, 1.0 - decay)
        else:
            blended = average.lerp(gradient, 1.0 - decay)
            average.copy_(torch.where(overflow != 0, average, blended))
