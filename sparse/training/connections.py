"""Write a change of connections into layers: their gates, weights and optimizer state."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..methods.base import GrowInit, Method
from ..methods.layers import named_parameters
from ..topology.draws import Keys, normal
from ..topology.flat import ROW, batched, by_device, copy, count_nonzero, gather, layout_for
from ..topology.sharded import sums_of_magnitudes
from ..topology.shards import any_sharded, local, locals_of
from .gates import Gate, update_gates, zero_inactive
from .invariant import held
from .optimizers import (
    groups_of,
    has_momentum,
    holds_state,
    momentum_buffer,
    state_of,
)

Tensors = Mapping[str, Tensor]


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
        if self.init == "gradient" and any(g.get("lr") is None for g in optimizer.param_groups):
            kind = type(optimizer).__name__
            raise ValueError(f"grow_init 'gradient': this {kind} has no learning rate; give it one")
        if self.momentum_scale and not (sees_gradient and has_momentum(optimizer)):
            raise ValueError(
                "initial_acc_scale needs a method with gradients and SGD with momentum"
            )

    def write(
        self,
        optimizer: Optimizer,
        weights: Mapping[str, nn.Parameter],
        fresh: Tensors,
        gradients: Tensors,
        keys: Keys,
    ) -> None:
        """Give weight and momentum of the connections marked by `fresh` their first values.

        New connections are 0 already, so "zeros" and a momentum scale of 0 need no work.

        Args:
            optimizer: The optimizer.
            weights: The weights that may have new connections, by name.
            fresh: Name -> the marks of new connections, of what lies here.
            gradients: Name -> gradient, of the weights that have one.
            keys: Name -> random key.
        """
        seen = {name: gradients[name] for name in weights if name in gradients}
        if self.init == "random":
            _put(weights, fresh, normal(keys, weights), _deviations(weights))
        if self.init != "gradient" and not self.momentum_scale:
            return
        for group, names in groups_of(optimizer, weights):
            part = {name: gradient for name, gradient in seen.items() if name in names}
            sign = -1.0 if group.get("maximize") else 1.0  # such a group steps along the gradient
            if self.init == "gradient":
                _put(weights, fresh, part, -sign * group["lr"])
            if self.momentum_scale:
                held = {n: g for n, g in part.items() if holds_state(optimizer, weights[n])}
                buffers = {name: momentum_buffer(optimizer, weights[name]) for name in held}
                _put(buffers, fresh, held, sign * self.momentum_scale)


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


def _deviations(weights: Tensors) -> dict[str, Tensor]:
    """Compute the standard deviation of the active weights of layers: 0-dim, alike on all ranks."""
    found: dict[str, Tensor] = {}
    for names in by_device(weights):
        layers = {name: weights[name] for name in names}
        if any_sharded(layers.values()):
            squares = sums_of_magnitudes({name: w.square() for name, w in layers.items()})
        else:
            norms = torch._foreach_norm(list(layers.values()), 2, dtype=torch.float64)
            squares = gather(norms).square()
        means = squares / count_nonzero(layers).clamp(min=1)
        found |= zip(names, means.sqrt().float().unbind(), strict=True)
    return found


def _put(
    targets: Tensors,
    where: Tensors,
    values: Tensors,
    factor: float | Tensor | Mapping[str, Tensor],
) -> None:
    """Write values, times a number, where masks of the part that lies here are True.

    Args:
        targets: Name -> tensor, for all values and perhaps more.
        where: Name -> mask of what lies here, likewise.
        values: Name -> values.
        factor: A number, or name -> number.
    """
    groups = defaultdict(list)
    for name, value in locals_of(values).items():
        target = local(targets[name])
        groups[target.device, target.dtype, value.dtype].append((name, target, value))
    for (_, dtype, kind), group in groups.items():
        if not batched(group[0][1]):
            for name, target, value in group:
                product = value * (factor[name] if isinstance(factor, Mapping) else factor)
                target.copy_(torch.where(where[name], product.to(dtype), target))
            continue
        names, into, of = zip(*group, strict=True)
        layout = layout_for(into)
        new = layout.flatten(of, kind)
        if isinstance(factor, Mapping):
            new.view(-1, ROW).mul_(layout.of_rows(gather([factor[name] for name in names])))
        else:
            new *= factor
        new, marks = new.to(dtype), layout.flatten([where[name] for name in names], torch.bool)
        torch.where(marks, new, layout.flatten(into, dtype), out=new)
        copy(into, layout.entries(new))
