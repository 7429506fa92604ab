"""Whole networks: loaded from a file, run by the kernels, compared with the model itself."""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from image_classification.models import create_model
from sparse import runtime
from sparse.native import __main__ as native
from sparse.native import library
from sparse.runtime import arrange, bindings, execution_plan
from sparse.runtime.arrange import Arrangement, banded_grids
from sparse.runtime.network import Network
from tests.sparse.runtime.test_kernels import assert_close

Save = Callable[..., Path]
ROOT = Path(runtime.__file__).parents[2]

BLOCKS = (1, 2, 1, 1)  # of every kind, at the widths of the real networks' kin
NETWORKS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "basic": (64, lambda: ResNet(BasicBlock, BLOCKS, num_classes=7)),
    "bottleneck": (97, lambda: ResNet(Bottleneck, BLOCKS, num_classes=7)),
    "wide": (64, lambda: ResNet(Bottleneck, BLOCKS, num_classes=7, width_per_group=96)),
    "resnext": (64, lambda: ResNet(Bottleneck, BLOCKS, 7, groups=32, width_per_group=4)),
    "mobilenet_v1": (96, lambda: create_model("mobilenet_v1", num_classes=7, width=0.5)),
    "wrn22_2": (32, lambda: create_model("wrn22_2", num_classes=7)),
    "small_cnn": (40, lambda: create_model("small_cnn", num_classes=7)),
}


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)


@pytest.mark.parametrize("name", NETWORKS)
def test_architectures_compute_what_the_model_computes(
    name: str, save: Save, kernel_cache: Path, kernels: bindings.Kernels
) -> None:
    size, create = NETWORKS[name]
    model = create()
    path = save(model, density=0.3)
    images = torch.randn(3, 3, size, size)
    wanted = logits_of(model, images)
    network = runtime.load(path, tune=False, cache=kernel_cache)
    assert network.backend == "native"
    assert_close(network(images), wanted)
    assert_close(runtime.load(path, backend="torch")(images), wanted)
    two = runtime.load(path, tune=False, cache=kernel_cache, threads=2)
    assert_close(two(images), wanted)


def test_kernels_of_every_vector_size_run_networks(
    save: Save, each_kernels: bindings.Kernels
) -> None:
    model = ResNet(Bottleneck, BLOCKS, num_classes=7)
    path = save(model)
    images = torch.randn(1, 3, 112, 112)
    network = Network(path, threads=1, kernels=each_kernels, tuner=None)
    assert_close(network(images), logits_of(model, images))


@pytest.mark.parametrize("size", [(96, 96), (94, 128)])
@pytest.mark.parametrize("threads", [1, 2])
def test_bands_go_through_whole_networks(
    size: tuple[int, int],
    threads: int,
    save: Save,
    each_kernels: bindings.Kernels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ResNet(Bottleneck, BLOCKS, num_classes=7)
    model.bn1.bias.data -= 2  # the pool's border is below all of its values
    model.relu = nn.Identity()
    path = save(model, density=0.05)  # bands do not depend on it, but the time does
    images = torch.randn(2, 3, *size)
    wanted = logits_of(model, images)
    monkeypatch.setattr(arrange, "MAX_WASTE", 1.5)  # the last band may have rows to spare
    grids = banded_grids(*size, lanes=each_kernels.num_lanes)
    assert grids
    for grid in grids:
        monkeypatch.setattr(execution_plan, "arrange", functools.partial(Arrangement, grid=grid))
        network = Network(path, threads=threads, kernels=each_kernels, tuner=None)
        assert_close(network(images[:1]), wanted[:1])
        assert_close(network(images), wanted)


def test_images_may_be_of_any_kind(save: Save, kernel_cache: Path) -> None:
    model = create_model("small_cnn", num_classes=7)
    network = runtime.load(save(model), tune=False, cache=kernel_cache)
    images = torch.randn(2, 3, 32, 48)
    wanted = logits_of(model, images)
    found = network(images)
    assert isinstance(found, Tensor)
    assert_close(found, wanted)
    assert_close(network(images[0]), wanted[0])
    assert_close(network(images.contiguous(memory_format=torch.channels_last)), wanted)
    array = network(images.numpy())
    assert isinstance(array, np.ndarray)
    assert np.array_equal(array, found.numpy())
    # another size afterwards, and the first again: each has a plan of its own
    small = torch.randn(1, 3, 17, 19)
    assert_close(network(small), logits_of(model, small))
    assert torch.equal(network(images), found)
    assert network(images[:0]).shape == (0, 7)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.float64), "float32"),
        (torch.zeros(1, 1, 32, 32), r"\(N, 3, H, W\)"),
        (torch.zeros(32, 32), r"\(N, 3, H, W\)"),
    ],
)
def test_other_images_are_refused(
    save: Save, kernel_cache: Path, images: Tensor, message: str
) -> None:
    path = save(create_model("small_cnn", num_classes=7))
    network = runtime.load(path, tune=False, cache=kernel_cache)
    with pytest.raises(ValueError, match=message):
        network(images)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    ("tail", "fits", "others", "message"),
    [
        (
            (nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(24, 7)),
            [(4, 6), (2, 3), (14, 9)],
            [(5, 6), (1, 3), (4, 8)],
            r"'_1' averages \dx\d to 2x3, which must be divisors",
        ),
        (
            (nn.Flatten(), nn.Linear(4 * 12, 7)),
            [(2, 6), (3, 4), (12, 1)],
            [(2, 7), (1, 1)],
            r"the linear layer '_2' reads 12 pixels per channel, and \dx\d are left",
        ),
    ],
)
def test_layers_for_one_size_take_the_sizes_that_fit(
    tail: tuple[nn.Module, ...],
    fits: list[tuple[int, int]],
    others: list[tuple[int, int]],
    message: str,
    backend: str,
    save: Save,
    kernel_cache: Path,
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *tail)
    network = runtime.load(save(model, 0.5), tune=False, cache=kernel_cache, backend=backend)
    for size in fits:
        images = torch.randn(2, 3, *size)
        assert_close(network(images), logits_of(model, images))
    for size in others:
        with pytest.raises(ValueError, match=message) as error:
            network(torch.zeros(1, 3, *size))
        assert "\n" not in str(error.value)


def test_the_state_dict_of_a_loaded_network_is_the_trained_one(
    save: Save, kernel_cache: Path
) -> None:
    model = create_model("wrn22_2", num_classes=7)
    state = runtime.load(save(model), cache=kernel_cache).state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_tuning_is_remembered_and_changes_no_result(save: Save, kernel_cache: Path) -> None:
    model = create_model("small_cnn", num_classes=7)
    path = save(model)
    images = torch.randn(1, 3, 32, 32)
    first = runtime.load(path, cache=kernel_cache)(images)
    assert_close(first, logits_of(model, images))
    (tuned,) = kernel_cache.glob("tuned-*.json")
    written = tuned.stat().st_mtime_ns
    assert torch.equal(runtime.load(path, cache=kernel_cache)(images), first)
    assert tuned.stat().st_mtime_ns == written
    tuned.write_text("{ damaged")
    assert_close(runtime.load(path, cache=kernel_cache)(images), first)


def test_without_a_compiler_torch_runs_the_network_and_says_so_once(
    save: Save, tmp_path: Path
) -> None:
    model = create_model("small_cnn", num_classes=7)
    path = save(model)
    program = """
import sys, torch, sparse.runtime
images = torch.ones(1, 3, 32, 32)
for _ in range(2):
    network = sparse.runtime.load(sys.argv[1], cache=sys.argv[2])
print(network.backend, *network(images)[0].tolist())
"""
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), str(empty)],
        env={**os.environ, "PATH": str(empty), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    backend, *logits = done.stdout.split()
    assert backend == "torch"
    assert_close(
        torch.tensor([float(x) for x in logits]), logits_of(model, torch.ones(1, 3, 32, 32))[0]
    )
    assert done.stderr.count("there is no C++ compiler") == 1


def test_a_failing_compiler_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Save
) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'file.cpp:1: error: no such thing' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(library.BuildError, match=r"failed: file\.cpp:1: error: no such thing"):
        library.KERNELS.compile("portable", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threads": 0}, "threads must be at least 1"),
        ({"backend": "cuda"}, "backend must be auto, native or torch"),
        ({"level": "sse9"}, "level must be one of avx512, avx2, "),
    ],
)
def test_arguments_out_of_range_are_refused(
    save: Save, arguments: dict[str, object], message: str
) -> None:
    path = save(create_model("small_cnn", num_classes=7))
    with pytest.raises(ValueError, match=message):
        runtime.load(path, **arguments)


def test_unknown_operations_are_named() -> None:
    with torch.device("meta"):
        model = torchvision.models.SwinTransformer([4, 4], 32, [1, 1], [1, 2], [7, 7])
        model.features[1][0].mlp[1] = nn.Mish()
    with pytest.raises(ValueError, match=r"know features.1.0.mlp.1: Mish .aten\.mish"):
        runtime.trace(model.eval())


def test_prebuilt_kernels_need_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "PREBUILT", tmp_path / "prebuilt")
    (tmp_path / "prebuilt").mkdir()
    for sources in (library.KERNELS, library.GATES):
        shutil.copy(sources.compile("portable", library.default_cache()), tmp_path / "prebuilt")
    bindings.load.cache_clear()
    monkeypatch.setattr(library, "COMPILERS", ())
    assert native.main(["portable"]) == 0
    assert bindings.load("portable", tmp_path).path.parent == tmp_path / "prebuilt"
    bindings.load.cache_clear()
    with pytest.raises(library.BuildError, match="no C\\+\\+ compiler"):
        bindings.load("avx2", tmp_path)
    assert native.main(["sse9"]) == 2
