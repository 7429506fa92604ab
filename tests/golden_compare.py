"""Comparisons that say what differs, for the checks of recorded outputs."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
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


Check = Callable[[], None]
Checker = Callable[[Mapping[str, Any], Mapping[str, Any]], None]


def case_of(path: Path, index: str) -> dict[str, Any]:
    """Find the entry of a file in an index beside it."""
    cases = json.loads(path.with_name(index).read_text())["cases"]
    (found,) = (case for case in cases if case["file"] == path.name)
    assert isinstance(found, dict)
    return found


def indexed_cases(path: Path, check: Checker) -> Iterator[tuple[str, Check]]:
    """List the files of an index: each checked, where it is there, with its arrays and its entry.

    An index may list more files than there are.
    """
    for entry in json.loads(path.read_text())["cases"]:
        yield entry["file"], partial(_check_file, path.with_name(entry["file"]), entry, check)


def _check_file(path: Path, entry: Mapping[str, Any], check: Checker) -> None:
    if path.exists():
        check(np.load(path), entry)


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
