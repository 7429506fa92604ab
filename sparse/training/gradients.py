"""What a method sees as gradients: those of the batch, or an average over all steps."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparse.errors import SparsityError
from sparse.topology.rng import is_fake
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


def unscaled_gradients(
    weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Collect the gradients of the batch, of the weights that have one."""
    unscale = inverse_scale(optimizer)
    gradients = {name: weight.grad for name, weight in weights.items()}
    return {
        name: gradient if unscale is None else gradient * unscale
        for name, gradient in gradients.items()
        if gradient is not None
    }


def check_gradients(gradients: Mapping[str, Tensor], method: str) -> None:
    """Refuse gradients of 0 for a method that ranks weights by gradients once and for all.

    Raises:
        SparsityError: All gradients of a layer are 0; names the layer.
    """
    for name, gradient in gradients.items():
        if not is_fake(gradient) and not gradient.is_meta and not gradient.any():
            raise SparsityError(
                f"method {method!r} ranks {name} by a gradient that is 0 everywhere: take the "
                "first step after a batch, do not start residual branches at 0, or keep the layer "
                "dense with dense_layers"
            )
