"""Access to optimizers. All classes are treated alike, except for the refused ones.

A state tensor of a weight's own shape (momentum buffers, Adam's moments, averages) has one entry
per connection and is masked like the weight.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..topology.flat import count_nonzero
from ..topology.rng import is_fake
from ..topology.shards import any_sharded, local

# Optimizers that move a weight which is zero, with a gradient and a state that are zero too.
_REFUSED = {
    "LBFGS": "it evaluates the loss itself and mixes all gradients",
    "Muon": "its orthogonalized update moves every entry of a matrix",
    "SparseAdam": "it takes sparse gradients, and a growth signal is dense",
}


# State that every optimizer keeps at 0 where weight and gradient are 0. Other state stays at
# another value (Adamax's exp_inf at eps, Rprop's step_size at the learning rate) and moves no
# weight.
_MOMENTS = frozenset(
    "momentum_buffer exp_avg exp_avg_sq max_exp_avg_sq square_avg grad_avg acc_delta sum".split()
)

# Optimizers whose second moment has one of these names and is above 0 also where all gradients
# were 0. It only divides, so that it moves no weight either.
_ABOVE_ZERO = {"Adafactor": "exp_avg_sq", "RMSpropTF": "square_avg"}


def check_optimizer(optimizer: Optimizer, weights: Mapping[str, nn.Parameter]) -> None:
    """Refuse an optimizer that would move inactive weights, or that lacks a weight.

    Raises:
        ValueError: The optimizer is one of the refused classes, divides by zero (eps = 0), or does
            not hold one of the weights.
    """
    kind = type(optimizer).__name__
    if kind in _REFUSED:
        raise ValueError(f"{kind} cannot train sparse weights: {_REFUSED[kind]}; use SGD or AdamW")
    for group in optimizer.param_groups:
        if group.get("eps") == 0:
            raise ValueError(
                f"{kind} with eps=0 turns inactive weights into NaN; use a positive eps"
            )
        if kind == "SGD" and group.get("fused") and any_sharded(group["params"]):
            raise ValueError("fused SGD cannot train sharded weights; use foreach=True")
    check_held(optimizer, weights)


def check_held(optimizer: Optimizer, weights: Mapping[str, nn.Parameter]) -> None:
    """Refuse weights that are trained, but not by the optimizer.

    Raises:
        ValueError: Names the first one.
    """
    held = {id(parameter) for parameter in parameters_of(optimizer)}
    for name, weight in weights.items():
        if weight.requires_grad and id(weight) not in held:
            raise ValueError(
                f"{name} is not among the optimizer's parameters; add it, or keep the layer dense "
                "with dense_layers"
            )


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield all parameters of an optimizer."""
    for group in optimizer.param_groups:
        yield from group["params"]


def state_holder(optimizer: Optimizer) -> Optimizer:
    """Give the optimizer that holds the state: the inner one of a ZeroRedundancyOptimizer."""
    inner = getattr(optimizer, "optim", None)
    return inner if isinstance(inner, Optimizer) else optimizer


def holds_state(optimizer: Optimizer, weight: nn.Parameter) -> bool:
    """Say whether this process holds the optimizer's state of a weight."""
    return any(parameter is weight for parameter in parameters_of(state_holder(optimizer)))


def state_of(optimizer: Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """Give the optimizer's state tensors that have one entry per connection, by their keys.

    Raises:
        ValueError: One of them has 8 bits per entry: codes, of which 0 may mean any value.
    """
    found = _state_like(optimizer, weight)
    for key, value in found.items():
        if value.element_size() == 1:
            raise ValueError(
                f"{type(optimizer).__name__} keeps its {key} in 8 bits ({value.dtype}), where no "
                "connection can be set to 0; use an optimizer whose state has 16 bits or more"
            )
    return found


def _state_like(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    return {
        key: value
        for key, value in state_holder(optimizer).state.get(parameter, {}).items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    }


def moments_of(optimizer: Optimizer, weight: nn.Parameter) -> dict[str, Tensor]:
    """Give the state tensors that stay 0 where a weight and its gradient were always 0."""
    state = state_of(optimizer, weight).items()
    known = _MOMENTS - {_ABOVE_ZERO.get(type(optimizer).__name__)}
    return {key: value for key, value in state if key in known}


def lay_out_state(optimizer: Optimizer) -> None:
    """Give state tensors the memory layout of their parameters.

    Loaded state keeps the memory layout in which it was saved. Fused optimizers read weight and
    state in the order of memory and would combine entries of different connections.
    """
    for parameter in parameters_of(optimizer):
        for key, value in _state_like(optimizer, parameter).items():
            if value.stride() != parameter.stride() and parameter.layout == torch.strided:
                laid_out = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
                state_holder(optimizer).state[parameter][key] = laid_out.copy_(value)


def only_sets_up_state(optimizer: Optimizer) -> bool:
    """Say whether a loop takes the coming step only to make the optimizer create its state.

    torch.distributed.checkpoint takes such steps. A step of this kind moves no weight: the learning
    rates (plain numbers, or tensors on the CPU) and all gradients are 0, and there is no state yet.
    Waits for the device only if the rates are 0.
    """
    if any(state_holder(optimizer).state.values()):
        return False
    rates = [group.get("lr", 1.0) for group in optimizer.param_groups]
    if any((isinstance(rate, Tensor) and not rate.is_cpu) or rate != 0 for rate in rates):
        return False
    found = enumerate(parameters_of(optimizer))
    gradients = {str(i): p.grad for i, p in found if p.grad is not None}
    if any(is_fake(local(gradient)) for gradient in gradients.values()):
        return False
    # The processes that share the weights decide together.
    return not count_nonzero(gradients).any()


def groups_of(
    optimizer: Optimizer, weights: Mapping[str, nn.Parameter]
) -> list[tuple[dict[str, Any], set[str]]]:
    """List the parameter groups, each with the names of those weights that are in it."""
    names = {id(weight): name for name, weight in weights.items()}
    return [
        (group, {names[id(p)] for p in group["params"] if id(p) in names})
        for group in optimizer.param_groups
    ]


def momentum_buffer(optimizer: Optimizer, weight: Tensor) -> Tensor:
    """Give SGD's momentum buffer of a weight. Before the first step it is created with zeros."""
    state = state_holder(optimizer).state[weight]
    if state.get("momentum_buffer") is None:
        state["momentum_buffer"] = torch.zeros_like(weight)
    buffer: Tensor = state["momentum_buffer"]
    return buffer


def create_momentum_buffers(optimizer: Optimizer) -> None:
    """Create the momentum buffers that SGD lacks, with zeros.

    SGD's fused kernel allocates the buffers without initializing them. If a GradScaler makes the
    kernel skip the first step, the buffers stay uninitialized, and training would continue from
    arbitrary values.
    """
    for parameter in parameters_of(state_holder(optimizer)):
        if parameter.grad is not None:
            momentum_buffer(optimizer, parameter)


def has_momentum(optimizer: Optimizer) -> bool:
    """Say whether this is SGD with momentum, and `momentum_buffer` can be used."""
    holder = state_holder(optimizer)
    return all(group.get("momentum", 0.0) > 0.0 for group in holder.param_groups) and (
        "SGD" in type(holder).__name__
    )


def restart(optimizer: Optimizer) -> None:
    """Forget the state of all parameters that are trained, as if the optimizer were new."""
    holder = state_holder(optimizer)
    for parameter in parameters_of(holder):
        if parameter.requires_grad:
            holder.state.pop(parameter, None)


def withhold_gradients(optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
    """Remove all gradients, so that the optimizer's step moves nothing.

    Returns:
        What `restore_gradients` needs to bring them back.
    """
    withheld = []
    for parameter in parameters_of(optimizer):
        if parameter.grad is not None:
            withheld.append((parameter, parameter.grad))
            parameter.grad = None
    return withheld


def restore_gradients(withheld: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Bring withheld gradients back."""
    for parameter, gradient in withheld:
        parameter.grad = gradient
