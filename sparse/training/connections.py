"""Write a change of connections into layers: their gates, weights and optimizer state."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..methods.base import GrowInit, Method
from ..methods.layers import named_parameters
from ..topology import rng
from ..topology.flat import count_nonzero
from ..topology.sharded import sums_of_magnitudes
from ..topology.shards import is_sharded, local, part_like
from .gates import Gate, update_gates, zero_inactive
from .invariant import held
from .optimizers import (
    has_momentum,
    holds_state,
    learning_rate,
    momentum_buffer,
    state_of,
)


@dataclass(frozen=True)
class NewConnections:
    """How new connections begin.

    Attributes:
        init: Weight of new connections: "zeros"; "gradient", one plain gradient step from zero; or
            "random", normal with the standard deviation of the layer's active weights.
        momentum_scale: Momentum that SGD gives to new connections, as a multiple of the gradient.
        seed: Seed of "random".
    """

    init: str = "zeros"
    momentum_scale: float = 0.0
    seed: int = 0

    def check(self, method: Method, optimizer: Optimizer) -> None:
        """Refuse a choice that can have no effect.

        Raises:
            ValueError: Names the choice.
        """
        if self.init not in get_args(GrowInit):
            raise ValueError(f"grow_init must be zeros, gradient or random, got {self.init!r}")
        averages = method.gradient_decay is not None or method.gradient_steps > 0
        sees_gradient = method.timing != "after" or averages
        if self.init == "gradient" and not sees_gradient:
            raise ValueError(f"grow_init 'gradient': method {method.name!r} sees no gradient")
        if self.momentum_scale and not (sees_gradient and has_momentum(optimizer)):
            raise ValueError(
                "initial_acc_scale needs a method with gradients and SGD with momentum"
            )

    def write(
        self,
        optimizer: Optimizer,
        weight: nn.Parameter,
        fresh: Tensor,
        gradient: Tensor | None,
        key: tuple[int, ...],
    ) -> None:
        """Give weight and momentum of the connections marked by `fresh` their first values.

        New connections are 0 already, so "zeros" and a momentum scale of 0 need no work.
        """
        if self.init == "random":
            values = rng.normal(weight.shape, key, weight.device) * _deviation(weight)
            _put(weight, fresh, part_like(values, weight))
        elif self.init == "gradient" and gradient is not None:
            _put(weight, fresh, gradient * -learning_rate(optimizer, weight))
        if self.momentum_scale and gradient is not None and holds_state(optimizer, weight):
            buffer = momentum_buffer(optimizer, weight)
            _put(buffer, fresh, gradient * self.momentum_scale)


def disconnect(
    optimizer: Optimizer,
    weights: Mapping[str, nn.Parameter],
    gates: Mapping[str, Gate],
    masks: Mapping[str, Tensor],
) -> None:
    """Give layers new masks, and zero weight and optimizer state of inactive connections.

    New connections are 0 afterwards, because they were inactive before.
    """
    gates = {name: gates[name] for name in masks}
    update_gates(gates, masks)
    zero_inactive((tensor, gate) for _, tensor, gate in held(optimizer, weights, gates, state_of))


def mask_module(module: nn.Module, gates: Mapping[str, Gate]) -> None:
    """Zero the weights of a module that gates mark as inactive. Weights are found by name.

    Raises:
        ValueError: The module lacks a weight that has a gate, or the weight has another shape.
    """
    parameters = named_parameters(module)
    pairs = []
    for name, gate in gates.items():
        weight = parameters.get(name)
        if weight is None:
            raise ValueError(f"the module to mask has no parameter {name}")
        if local(weight).shape != gate.inactive.shape:
            raise ValueError(
                f"{name} has shape {tuple(local(weight).shape)} in the module to mask, "
                f"its mask {tuple(gate.inactive.shape)}"
            )
        pairs.append((weight, gate))
    zero_inactive(pairs)


def _deviation(weight: Tensor) -> Tensor:
    """Compute the standard deviation of the active weights: 0-dim, the same on all ranks."""
    if is_sharded(weight):
        squares, count = sums_of_magnitudes({"": weight.square()}), count_nonzero({"": weight})
        return (squares / count.clamp(min=1)).sqrt()[0]
    return (weight.square().sum() / (weight != 0).sum().clamp(min=1)).sqrt()


def _put(target: Tensor, where: Tensor, values: Tensor) -> None:
    """Write values where a mask of the part that lies here is True."""
    target = local(target)
    target.copy_(torch.where(where, local(values).to(target.dtype), target))
