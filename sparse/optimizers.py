"""What the library knows about optimizers: nothing about their classes, except whom to refuse.

Every state tensor of a weight's own shape (momentum buffers, Adam's moments, averages) belongs to
single connections and is treated as the weight is.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Optimizers that move a weight which is zero, with a gradient and a state that are zero too.
_REFUSED = {
    "LBFGS": "it evaluates the loss itself and mixes all gradients",
    "Muon": "its orthogonalized update moves every entry of a matrix",
    "SparseAdam": "it takes sparse gradients, and a growth signal is dense",
}


def check_optimizer(optimizer: Optimizer, weights: Mapping[str, nn.Parameter]) -> None:
    """Refuse an optimizer that would move inactive weights, or that lacks a weight.

    Raises:
        ValueError: The optimizer is a known offender, divides by zero (eps = 0), or does not hold
            one of the weights.
    """
    kind = type(optimizer).__name__
    if kind in _REFUSED:
        raise ValueError(f"{kind} cannot train sparse weights: {_REFUSED[kind]}; use SGD or AdamW")
    held = set()
    for group in optimizer.param_groups:
        held |= {id(parameter) for parameter in group["params"]}
        if group.get("eps") == 0:
            raise ValueError(
                f"{kind} with eps=0 turns inactive weights into NaN; use a positive eps"
            )
    for name, weight in weights.items():
        if id(weight) not in held:
            raise ValueError(
                f"{name} is not among the optimizer's parameters; add it, or keep the layer dense "
                "with dense_layers"
            )


def state_of(optimizer: Optimizer, weight: nn.Parameter) -> Iterator[Tensor]:
    """Yield the optimizer's state tensors that have one entry per connection."""
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            yield value


def learning_rate(optimizer: Optimizer, weight: nn.Parameter) -> float | Tensor:
    """Give the learning rate of a weight's parameter group."""
    for group in optimizer.param_groups:
        if any(parameter is weight for parameter in group["params"]):
            rate: float | Tensor = group["lr"]
            return rate
    raise AssertionError("the weight was checked to be in the optimizer")


def momentum_buffer(optimizer: Optimizer, weight: nn.Parameter) -> Tensor:
    """Give SGD's momentum buffer of a weight, made of zeros if the first step is yet to come."""
    state = optimizer.state[weight]
    if state.get("momentum_buffer") is None:
        state["momentum_buffer"] = torch.zeros_like(weight)
    buffer: Tensor = state["momentum_buffer"]
    return buffer


def create_momentum_buffers(optimizer: Optimizer) -> None:
    """Give SGD the momentum buffers it lacks, made of zeros.

    Its fused kernel allocates them without a value, and leaves them so if a GradScaler makes it
    skip the first step: training would go on from whatever the memory held.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                momentum_buffer(optimizer, parameter)


def has_momentum(optimizer: Optimizer) -> bool:
    """Say whether this is SGD with momentum, whose buffers `momentum_buffer` gives."""
    return all(group.get("momentum", 0.0) > 0.0 for group in optimizer.param_groups) and (
        "SGD" in type(optimizer).__name__
    )


def withhold_gradients(optimizer: Optimizer) -> list[tuple[nn.Parameter, Tensor]]:
    """Take all gradients away, so that the optimizer's step moves nothing.

    Returns:
        What `restore_gradients` needs to bring them back.
    """
    withheld = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                withheld.append((parameter, parameter.grad))
                parameter.grad = None
    return withheld


def restore_gradients(withheld: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    """Bring withheld gradients back."""
    for parameter, gradient in withheld:
        parameter.grad = gradient
