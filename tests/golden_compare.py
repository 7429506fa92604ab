"""Comparisons that say what differs, for the checks of recorded outputs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class MismatchError(Exception):
    """The library and the original disagree."""


def require(holds: bool, message: str) -> None:
    """Raise with a message unless something holds."""
    if not holds:
        raise MismatchError(message)


def same(what: str, found: Tensor, expected: Any) -> None:
    """Require a mask to be the recorded one."""
    different = int((found != torch.from_numpy(expected).bool()).sum())
    require(different == 0, f"{what}: {different} entries differ")


def close(what: str, found: Any, expected: Any, tolerance: float) -> None:
    """Require numbers to be within a distance of the recorded ones."""
    distance = np.abs(np.asarray(found, dtype=np.float64) - np.asarray(expected, dtype=np.float64))
    worst = float(distance.max(initial=0.0))
    require(worst <= tolerance, f"{what}: off by {worst:.3g}")


def distribution(kind: str) -> str:
    """Translate the RigL repository's name of a distribution."""
    names = {"random": "uniform", "erdos_renyi": "er", "erdos_renyi_kernel": "erk"}
    return names.get(kind, kind)


def torch_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Bring a TensorFlow kernel's shape (..., inputs, outputs) into PyTorch's order."""
    return (shape[-1], shape[-2], *shape[:-2])


def torch_order(array: Any) -> Any:
    """Bring a TensorFlow kernel (..., inputs, outputs) into PyTorch's order."""
    axes = range(array.ndim)
    return np.ascontiguousarray(array.transpose(torch_shape(axes)))


def decimal(value: Any) -> float:
    """Give the decimal number that a float32 stands for, such as 0.8."""
    return float(str(np.float32(value)))
