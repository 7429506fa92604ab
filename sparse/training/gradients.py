"""What a method sees as gradients: those of the batch, or an average over all steps."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SparsityError
from ..methods.base import Method
from ..topology.flat import batched, copy, count_nonzero, layout_for, memory, zeros_like
from ..topology.rng import is_fake
from ..topology.shards import local, spread_all
from . import checkpoints
from .clock import found_inf, inverse_scale


class SeenGradients:
    """The gradients that a method sees at an update.

    Attributes:
        averages: Name -> average of gradients, where the method has one.
    """

    def __init__(self, method: Method) -> None:
        self.averages: dict[str, Tensor] = {}
        self._method = method

    @property
    def kept(self) -> dict[str, Tensor] | None:
        """The averages that a state must hold; None: none lasts from step to step."""
        lasts = self._method.gradient_decay is not None or self._method.gradient_steps > 1
        return self.averages if lasts else None

    def reads(self, step: int) -> bool:
        """Say whether the gradients of a step have a part in the averages."""
        return self._share(step) is not None

    def asks(self, step: int) -> bool:
        """Say whether it has to be known for sure that this is the step: averages begin and end."""
        return self._method.gradient_decay is None and self.reads(step)

    def _share(self, step: int) -> float | None:
        """Give the share of a step's gradient in the average; None: it has no part in it."""
        decay, number = self._method.gradient_decay, self._method.gradient_steps
        if decay is not None:
            return 1.0 - decay
        left = next((n for n in range(number) if self._method.due(step + n)), None)
        return None if left is None else 1.0 / min(number - left, step + 1)

    def gather(
        self, weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int
    ) -> None:
        """Take the gradients of a step into the averages."""
        share = self._share(step)
        if share is not None:
            average_gradients(self.averages, weights, share, optimizer)

    def at_update(
        self, weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> dict[str, Tensor]:
        """Collect what the method sees of the gradients of some weights."""
        if self._method.timing == "after" or self._method.gradient_decay is not None:
            found = {name: g for name, g in self.averages.items() if name in weights}
            return spread_all(found, weights)
        gradients = unscaled_gradients(weights, optimizer)
        if self._method.timing == "once":
            check_gradients(gradients, self._method.name)
        return gradients

    def forget(self) -> None:
        """Begin anew after an update, unless the average is one over all steps."""
        if self._method.gradient_decay is None:
            self.averages.clear()

    def load(self, state: Mapping[str, Any], weights: Mapping[str, nn.Parameter]) -> None:
        """Read the averages of a saved state.

        Raises:
            ValueError: They are missing, or one fits no weight.
        """
        wanted, needed = self.reads(state["step"]), self._method.gradient_decay is not None
        self.averages = checkpoints.load_averages(state, weights, wanted, needed)


def average_gradients(
    averages: dict[str, Tensor],
    weights: Mapping[str, nn.Parameter],
    share: float,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Blend the present gradients in: average <- (1 - share) * average + share * gradient.

    Of a weight that is spread over processes there is the average of the part here. Averages start
    at 0 and are at least float32. If a GradScaler leaves the unscaling to a fused optimizer, the
    gradients are unscaled first. If it found an overflow, the averages do not change.
    """
    unscale, overflow = inverse_scale(optimizer), found_inf(optimizer)
    gradients = {name: weight.grad for name, weight in weights.items()}
    found = {name: local(grad) for name, grad in gradients.items() if grad is not None}
    missing = {name: grad for name, grad in found.items() if name not in averages}
    averages |= _zeros(missing, {name: local(weights[name]) for name in missing})
    groups = defaultdict(list)
    for name, gradient in found.items():
        average = averages[name]
        alike = average.stride() == gradient.stride() and batched(average)
        groups[average.device, average.dtype, None if alike else name].append(name)
    for (_, _, alone), names in groups.items():
        pairs = [averages[name] for name in names], [found[name] for name in names]
        (_blend_together if alone is None else _blend)(*pairs, share, unscale, overflow)


def _zeros(gradients: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make averages to begin with, of at least 32 bits and laid out as the weights are."""
    groups = defaultdict(list)
    for name, gradient in gradients.items():
        dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        groups[weights[name].device, dtype].append(name)
    made: dict[str, Tensor] = {}
    for (_, dtype), names in groups.items():
        if batched(weights[names[0]]):
            made |= zip(names, zeros_like([weights[name] for name in names], dtype), strict=True)
        else:
            made |= {name: torch.zeros_like(weights[name], dtype=dtype) for name in names}
    return {name: made[name].detach() for name in gradients}


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
    layout = layout_for(averages)
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
        SparsityError: All gradients of a layer are 0, or some are infinite or NaN; names the layer.
    """
    if not gradients or any(is_fake(local(g)) or g.is_meta for g in gradients.values()):
        return
    products = torch._foreach_mul(list(gradients.values()), 0.0)  # NaN where not finite
    wrong = {f"0 * {name}": product for name, product in zip(gradients, products, strict=True)}
    counts = count_nonzero({**gradients, **wrong}).view(2, -1).T.tolist()
    for name, (count, not_finite) in zip(gradients, counts, strict=True):
        if not_finite:
            raise SparsityError(
                f"method {method!r} ranks {name} by a gradient that is infinite or NaN in "
                f"{not_finite} places: leave out the step of such a batch"
            )
        if not count:
            raise SparsityError(
                f"method {method!r} ranks {name} by a gradient that is 0 everywhere: take the "
                "first step after a batch, do not start residual branches at 0, or keep the layer "
                "dense with dense_layers"
            )
