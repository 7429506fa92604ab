"""SGD of torch, and NVIDIA apex's FusedSGD."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import SGD, Optimizer

from image_classification.optimizers.spec import OptimizerSpec


def create_sgd(
    groups: list[dict[str, Any]],
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    device: torch.device,
    **options: Any,
) -> Optimizer:
    """Return SGD, in the fused implementation where `device` has one."""
    _check(momentum, nesterov)
    # The fused step of SGD on a CPU takes a third to a quarter of the time of the others.
    fused = device.type in ("cuda", "cpu")
    sgd = SGD(groups, momentum=momentum, nesterov=nesterov, fused=fused, **options)
    if momentum > 0:
        _start_momentum_at_zero(sgd)
    return sgd


def create_apex_sgd(
    groups: list[dict[str, Any]],
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    device: torch.device,
    **options: Any,
) -> Optimizer:
    """Return apex's FusedSGD, which needs parameters on a GPU.

    Raises:
        ValueError: apex is not installed.
    """
    _check(momentum, nesterov)
    return _apex_sgd()(groups, momentum=momentum, nesterov=nesterov, **options)


def _check(momentum: float, nesterov: bool) -> None:
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


SETTINGS = {"momentum": "momentum", "nesterov": "Nesterov momentum"}
SGD_SPEC = OptimizerSpec(create=create_sgd, settings=SETTINGS)
APEX_SGD_SPEC = OptimizerSpec(
    create=create_apex_sgd,
    settings=SETTINGS,
    description="apex's FusedSGD",
    equivalent="sgd",
)
