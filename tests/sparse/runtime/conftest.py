"""Compiled kernels and networks that the tests of the runtime share."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparse import runtime
from sparse.native import library
from sparse.runtime import bindings

# Number of lanes -> the level with vectors of this size.
LEVELS = {lanes: level for level, (lanes, _) in library.LEVELS.items()}


@pytest.fixture(scope="session")
def libraries() -> dict[int, Path]:
    """Return libraries by number of lanes: from the user's cache, or compiled side by side."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(LEVELS, pool.map(library_of, LEVELS), strict=True))


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory, libraries: dict[int, Path]) -> Path:
    """Return a directory for measurements, shared by all tests, with this processor's kernels."""
    cache = tmp_path_factory.mktemp("kernels")
    shutil.copy(libraries[library.LEVELS[library.cpu_level()][0]], cache)
    return cache


@pytest.fixture(scope="session")
def kernels(kernel_cache: Path) -> bindings.Kernels:
    """Return the kernels of this processor."""
    return bindings.load(library.cpu_level(), kernel_cache)


@pytest.fixture(scope="session", params=LEVELS, ids="{} lanes".format)
def each_kernels(request: pytest.FixtureRequest, libraries: dict[int, Path]) -> bindings.Kernels:
    """Return kernels with vectors of each size."""
    return bindings.Kernels(libraries[request.param])


def library_of(num_lanes: int) -> Path:
    """Return a library with vectors of a size and instructions of this processor.

    A level that the processor does not have lends its layout, but not its instructions.
    """
    cache, best = library.default_cache(), library.cpu_level()
    lanes, machine = library.LEVELS[best]
    if num_lanes <= lanes:
        return library.KERNELS.compile(LEVELS[num_lanes], cache)
    flags = (*machine, "-USPARSE_LANES", f"-DSPARSE_LANES={num_lanes}", "-O1")
    return library.KERNELS.compile("portable", cache, flags=flags)


def prune_(model: nn.Module, density: float, seed: int = 0) -> dict[str, Tensor]:
    """Zero random weights of all ungrouped layers and draw BatchNorms; return the masks."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and getattr(module, "groups", 1) == 1:
            mask = torch.rand(module.weight.shape, generator=generator) < density
            module.weight.data.masked_fill_(~mask, 0.0)
            masks[f"{name}.weight"] = mask
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.5, 0.5, generator=generator)
            nn.init.uniform_(module.running_mean, -0.5, 0.5, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 2.0, generator=generator)
    return masks


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that prunes a model and writes its compact file."""

    def write(model: nn.Module, density: float = 0.2, **options: object) -> Path:
        masks = prune_(model.eval(), density)
        path = tmp_path / "network.safetensors"
        runtime.save(
            path,
            model.state_dict(),
            masks,
            nodes=runtime.trace(model),
            arch="some",
            model={"num_classes": 7},
            image_size=32,
            mean=(0.5, 0.4, 0.3),
            std=(0.2, 0.2, 0.3),
            **options,
        )
        return path

    return write
