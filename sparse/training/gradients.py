"""What a method sees as gradients: those of the batch, or an average over all steps."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import SparsityError
from ..topology.flat import batched, copy, count_nonzero, layout_of, memory
from ..topology.rng import is_fake
from ..topology.shards import local
from .clock import found_inf, inverse_scale


def average_gradients(
    averages: dict[str, Tensor],
    weights: Mapping[str, nn.Parameter],
    decay: float,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Blend the present gradients in: average <- decay * average + (1 - decay) * gradient.

    Of a weight that is spread over processes there is the average of the part here. Averages start
    at 0 and are at least float32. If a GradScaler leaves the unscaling to a fused optimizer, the
    gradients are unscaled first. If it found an overflow, the averages do not change.
    """
    unscale, overflow = inverse_scale(optimizer), found_inf(optimizer)
    gradients = {name: weight.grad for name, weight in weights.items()}
    found = {name: local(grad) for name, grad in gradients.items() if grad is not None}
    for name, gradient in found.items():
        if name not in averages:
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            averages[name] = torch.zeros_like(local(weights[name]), dtype=dtype)
    groups = defaultdict(list)
    for name, gradient in found.items():
        average = averages[name]
        alike = average.stride() == gradient.stride() and batched(average)
        groups[average.device, average.dtype, None if alike else name].append(name)
    for (_, _, alone), names in groups.items():
        pairs = [averages[name] for name in names], [found[name] for name in names]
        (_blend_together if alone is None else _blend)(*pairs, 1.0 - decay, unscale, overflow)


def _blend(
    averages: list[Tensor],
    gradients: list[Tensor],
    share: float,
    unscale: Tensor | None,
    overflow: Tensor | None,
) -> None:
    for average, gradient in zip(averages, gradients, strict=True):
        wide = gradient.to(average.dtype)
        if unscale is not None:
            wide = wide * unscale
        if overflow is None:
            average.lerp_(wide, share)
        else:
            average.copy_(torch.where(overflow != 0, average, average.lerp(wide, share)))


def _blend_together(
    averages: list[Tensor],
    gradients: list[Tensor],
    share: float,
    unscale: Tensor | None,
    overflow: Tensor | None,
) -> None:
    """Do the same with tensors of one device, averages of one dtype, laid out as the gradients."""
    dtype = averages[0].dtype
    scaled = unscale is not None or overflow is not None
    if not scaled and all(gradient.dtype == dtype for gradient in gradients):
        torch._foreach_lerp_(averages, gradients, share)
        return
    layout = layout_of(tuple(average.numel() for average in averages))
    places = list(map(memory, averages))
    flat = layout.flatten(places, dtype, clear=False)
    blended = layout.flatten(list(map(memory, gradients)), dtype, clear=False)
    if unscale is not None:
        blended *= unscale
    torch.lerp(flat, blended, share, out=blended)
    if overflow is not None:
        torch.where(overflow != 0, flat, blended, out=blended)
    copy(places, layout.entries(blended))


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
    if any(is_fake(local(g)) or g.is_meta for g in gradients.values()):
        return
    for name, count in zip(gradients, count_nonzero(gradients).tolist(), strict=True):
        if not count:
            raise SparsityError(
                f"method {method!r} ranks {name} by a gradient that is 0 everywhere: take the "
                "first step after a batch, do not start residual branches at 0, or keep the layer "
                "dense with dense_layers"
            )
