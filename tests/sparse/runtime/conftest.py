"""Compiled kernels and networks that the tests of the runtime share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparse import runtime
from sparse.native import library
from sparse.runtime import bindings

# Vectors of 16 on any processor: the layouts of AVX-512 without its instructions.
SIXTEEN_LANES = ("-USPARSE_LANES", "-DSPARSE_LANES=16", "-O1")


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory for compiled kernels and measurements, shared by all tests."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="session")
def kernels(kernel_cache: Path) -> bindings.Kernels:
    """Return the kernels of this processor."""
    return bindings.load(library.cpu_level(), kernel_cache)


@pytest.fixture(scope="session", params=["best", "portable", "sixteen"])
def each_kernels(
    request: pytest.FixtureRequest, kernel_cache: Path, kernels: bindings.Kernels
) -> bindings.Kernels:
    """Return the kernels of this processor, the portable ones, and ones with 16 lanes."""
    if request.param == "best":
        return kernels
    if request.param == "portable":
        return bindings.load("portable", kernel_cache)
    return sixteen_lanes(kernel_cache)


def sixteen_lanes(cache: Path) -> bindings.Kernels:
    """Return kernels with 16 lanes, with the instructions of this processor."""
    machine = library.LEVELS[library.cpu_level()][1]
    flags = (*machine, *SIXTEEN_LANES)
    return bindings.Kernels(library.KERNELS.compile("portable", cache, flags=flags))


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
