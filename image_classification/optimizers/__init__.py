"""Optimizers by name, and the split of a model's parameters into groups."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from image_classification.optimizers import builtin
from image_classification.optimizers.spec import OptimizerSpec
from image_classification.ranges import AT_LEAST_0

__all__ = [
    "OPTIMIZERS",
    "WEIGHT_DECAY",
    "OptimizerSpec",
    "create_optimizer",
    "describe_optimizers",
    "describe_setting",
    "parameter_groups",
    "users",
]

OPTIMIZERS: dict[str, OptimizerSpec] = {
    "sgd": builtin.SGD_SPEC,
    "rmsprop": builtin.RMSPROP_SPEC,
    "adamw": builtin.ADAMW_SPEC,
    "apex-sgd": builtin.APEX_SGD_SPEC,
}
"""What `--optimizer` can name."""

WEIGHT_DECAY = AT_LEAST_0

NORMALIZATIONS = (
    nn.modules.batchnorm._NormBase,  # BatchNorm*, SyncBatchNorm, InstanceNorm*
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def users(setting: str) -> str:
    """Return the optimizers on which a setting has an effect: "sgd, rmsprop or apex-sgd"."""
    *others, last = (name for name, spec in OPTIMIZERS.items() if setting in spec.settings)
    return f"{', '.join(others)} or {last}" if others else last


def describe_setting(setting: str) -> str:
    """Return what the help says of a flag that some optimizers have."""
    return f"{_words(setting)} of {users(setting)}"


def _words(setting: str) -> str:
    return next(s.settings[setting] for s in OPTIMIZERS.values() if setting in s.settings)


def describe_optimizers() -> str:
    """Return what the help of `--optimizer` says."""
    named = [(name, spec.description) for name, spec in OPTIMIZERS.items() if spec.description]
    return "; ".join(f"{name} is {description}" for name, description in named)


def parameter_groups(
    model: nn.Module, *, weight_decay: float, bn_weight_decay: bool
) -> list[dict[str, Any]]:
    """Split the trainable parameters into one group with weight decay and one without.

    The split goes by the type of the module that owns a parameter, so the BatchNorm of a shortcut
    is found whatever it is called. For ResNet-50: 54 kernels decay, 107 parameters (53 scales,
    53 shifts, the bias of fc) do not.

    Args:
        model: Parameters that occur twice are taken once, frozen ones not at all.
        weight_decay: Coefficient of the first group, at least 0.
        bn_weight_decay: Decay scales and shifts of normalization layers too. Biases of other layers
            never decay.

    Returns:
        Groups for a `torch.optim` optimizer, in traversal order; none of them is empty.

    Deviations: NVIDIA's harness looks for "bn" in the name and so decays the BatchNorm of ResNet
    shortcuts; it also decays the bias of fc.
    """
    if weight_decay not in WEIGHT_DECAY:
        raise ValueError(f"weight_decay must be {WEIGHT_DECAY}, got {weight_decay}")
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            if isinstance(module, NORMALIZATIONS):
                decays = bn_weight_decay
            else:
                decays = name != "bias" and not name.endswith("_bias")
            (decayed if decays else undecayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def create_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    *,
    lr: float,
    weight_decay: float = 0.0,
    device: torch.device,
    **settings: Any,
) -> Optimizer:
    """Return an optimizer over `groups`, on the fastest implementation that `device` has.

    Create it after the model has its final device and memory format: the momentum of SGD is laid
    out here like the parameters.

    Args:
        name: One of `OPTIMIZERS`.
        groups: As of `parameter_groups`.
        lr: Learning rate until a schedule sets another.
        weight_decay: Coefficient of groups that name none.
        device: Where the parameters are.
        **settings: Those of the optimizer (`OptimizerSpec.settings`).

    Raises:
        ValueError: Unknown `name`, a setting without effect on it, or it cannot be created here.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; known are {', '.join(OPTIMIZERS)}")
    for setting in settings.keys() - OPTIMIZERS[name].settings.keys():
        raise ValueError(f"{_words(setting)} has no effect on {name}; use it with {users(setting)}")
    return OPTIMIZERS[name].create(
        groups, lr=lr, weight_decay=weight_decay, device=device, **settings
    )
