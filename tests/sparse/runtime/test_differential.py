"""Random networks over everything that can be traced: the runtime computes what torch computes."""

from pathlib import Path

import pytest

from sparse.runtime import bindings
from tests.sparse.runtime.conftest import LEVELS
from tests.sparse.runtime.random_networks import compare

FEW, MANY = 50, 850  # networks per kind of kernels


def test_random_networks_equal_torch(each_kernels: bindings.Kernels, tmp_path: Path) -> None:
    runs = [compare(seed, each_kernels, tmp_path / "network") for seed in range(FEW)]
    assert sum(runs) > 3 * FEW


@pytest.mark.slow
@pytest.mark.parametrize("num_lanes", LEVELS)
def test_many_random_networks_equal_torch(
    num_lanes: int, libraries: dict[int, Path], tmp_path: Path
) -> None:
    kernels = bindings.Kernels(libraries[num_lanes])
    first = 1000 * num_lanes
    runs = [compare(first + i, kernels, tmp_path / "network") for i in range(MANY)]
    print(f"{sum(runs)} runs of {MANY} networks")
    assert sum(runs) > 3 * MANY
