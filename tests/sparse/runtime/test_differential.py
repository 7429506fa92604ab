"""Random networks over everything that can be traced: the runtime computes what torch computes."""

from pathlib import Path

import pytest

from sparse.native import library
from sparse.runtime import bindings
from tests.sparse.runtime.conftest import sixteen_lanes
from tests.sparse.runtime.random_networks import compare

FEW, MANY = 50, 850  # networks per kind of kernels


def test_random_networks_equal_torch(each_kernels: bindings.Kernels, tmp_path: Path) -> None:
    runs = [compare(seed, each_kernels, tmp_path / "network") for seed in range(FEW)]
    assert sum(runs) > 3 * FEW


def levels() -> list[str]:
    """Return the levels that this processor runs."""
    found = list(library.LEVELS)
    return found[found.index(library.cpu_level()) :]


@pytest.mark.slow
@pytest.mark.parametrize("level", [*levels(), "sixteen"])
def test_many_random_networks_equal_torch(level: str, kernel_cache: Path, tmp_path: Path) -> None:
    is_level = level in library.LEVELS
    kernels = bindings.load(level, kernel_cache) if is_level else sixteen_lanes(kernel_cache)
    first = 1000 * (1 + [*library.LEVELS, "sixteen"].index(level))
    runs = [compare(first + i, kernels, tmp_path / "network") for i in range(MANY)]
    print(f"{sum(runs)} runs of {MANY} networks")
    assert sum(runs) > 3 * MANY
