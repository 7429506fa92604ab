"""Optimizers of torch, and NVIDIA apex's FusedSGD."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import SGD, AdamW, Optimizer, RMSprop

from image_classification.optimizers.spec import OptimizerSpec
from image_classification.sharding import any_spread

Groups = list[dict[str, Any]]
FUSED = ("cuda", "cpu")
"""Devices with fused steps: that of SGD takes a third to a quarter of the time of the others."""


def create_sgd(
    groups: Groups,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    device: torch.device,
    **options: Any,
) -> Optimizer:
    """Return torch's SGD."""
    _check_nesterov(momentum, nesterov)
    # Torch's fused SGD knows no sharded weights.
    spread = any_spread(parameter for group in groups for parameter in group["params"])
    fused = device.type in FUSED and not spread
    sgd = SGD(groups, momentum=momentum, nesterov=nesterov, fused=fused, **options)
    if momentum > 0:
        _start_momentum_at_zero(sgd)
    return sgd


def create_apex_sgd(
    groups: Groups,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    device: torch.device,
    **options: Any,
) -> Optimizer:
    """Return apex's FusedSGD, for parameters on a GPU."""
    _check_nesterov(momentum, nesterov)
    return _apex_sgd()(groups, momentum=momentum, nesterov=nesterov, **options)


def create_rmsprop(
    groups: Groups,
    *,
    momentum: float = 0.9,
    rmsprop_alpha: float = 0.9,
    rmsprop_eps: float = 1e-3,
    device: torch.device,
    **options: Any,
) -> Optimizer:
    """Return torch's RMSprop, which has no fused step."""
    return RMSprop(groups, alpha=rmsprop_alpha, eps=rmsprop_eps, momentum=momentum, **options)


def create_adamw(groups: Groups, *, device: torch.device, **options: Any) -> Optimizer:
    """Return AdamW (decoupled weight decay) with torch's averages, 0.9 and 0.999."""
    return AdamW(groups, fused=device.type in FUSED, **options)


def _check_nesterov(momentum: float, nesterov: bool) -> None:
    if nesterov and momentum == 0:
        raise ValueError("Nesterov momentum needs a momentum above 0")


def _start_momentum_at_zero(optimizer: SGD) -> None:
    """Allocate the momentum of fused SGD before its first step.

    Otherwise the first step allocates the buffers without initializing them. If GradScaler finds
    that this step overflowed, as first steps often do, they stay uninitialized, and the next step
    adds whatever the memory held. Starting from zero gives the same numbers in the first step:
    m * 0 + g = g.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _apex_sgd() -> Callable[..., Optimizer]:
    try:
        # An unrelated package on PyPI is called apex as well; it has no optimizers.
        from apex.optimizers import FusedSGD
    except ImportError as error:
        raise ValueError(
            f"optimizer apex-sgd needs NVIDIA apex built with its CUDA extensions ({error}); "
            "use sgd, which is fused too"
        ) from error
    factory: Callable[..., Optimizer] = FusedSGD
    return factory


_OF_SGD = {"momentum": "momentum", "nesterov": "Nesterov momentum"}
_OF_RMSPROP = {"rmsprop_alpha": "smoothing constant", "rmsprop_eps": "epsilon"}
SGD_SPEC = OptimizerSpec(create=create_sgd, settings=_OF_SGD)
RMSPROP_SPEC = OptimizerSpec(
    create=create_rmsprop, settings={"momentum": "momentum", **_OF_RMSPROP}
)
ADAMW_SPEC = OptimizerSpec(create=create_adamw)
APEX_SGD_SPEC = OptimizerSpec(
    create=create_apex_sgd,
    settings=_OF_SGD,
    description="apex's FusedSGD",
    equivalent="sgd",
    shards=False,
)
