"""Caches are a help, never a need: missing, unwritable, full, or written by somebody else."""

import json
import platform
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from sparse import runtime
from sparse.native import library
from sparse.runtime import bindings, tune
from tests.sparse.runtime.test_kernels import assert_close
from tests.sparse.runtime.test_networks import logits_of

Save = Callable[..., Path]

IMAGES = torch.randn(1, 3, 12, 12)


def small() -> nn.Module:
    """Return a network of two convolutions, for one of which no dense kernel is the default."""
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()


@pytest.fixture
def prebuilt(kernels: bindings.Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels come with the installation, and nothing be known of earlier tests."""
    monkeypatch.setattr(library, "PREBUILT", kernels.path.parent)
    monkeypatch.setattr(tune.Tuner, "_measured", {})


def test_a_missing_cache_is_made(save: Save, tmp_path: Path, prebuilt: None) -> None:
    model, cache = small(), tmp_path / "missing" / "cache"
    assert_close(runtime.load(save(model), cache=cache)(IMAGES), logits_of(model, IMAGES))
    assert [path.suffix for path in cache.iterdir()] == [".json"]


@pytest.mark.usefixtures("prebuilt")
def test_a_cache_that_cannot_be_written_is_said_once_and_replaced_by_memory(
    save: Save, tmp_path: Path
) -> None:
    model = small()
    path = save(model)
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache"  # which nobody can make, root included
    with pytest.warns(UserWarning, match=f"{cache} cannot be written: Not a directory"):
        found = runtime.load(path, cache=cache)(IMAGES)
    assert_close(found, logits_of(model, IMAGES))
    # The process remembers: nothing is measured again, and no second warning comes.
    assert torch.equal(runtime.load(path, cache=cache)(IMAGES), found)


@pytest.mark.usefixtures("prebuilt")
def test_a_full_cache_is_left_as_it_was(save: Save, tmp_path: Path) -> None:
    model, cache = small(), tmp_path / "cache"
    cache.mkdir()
    network = runtime.load(save(model), cache=cache)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with pytest.warns(UserWarning, match="cannot be written: File too large"):
            found = network(IMAGES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_close(found, logits_of(model, IMAGES))
    assert not list(cache.iterdir())


CHOICE = {
    "dense": False,
    "tile_vectors": 1,
    "tile_rows": 1,
    "group": 1,
    "num_blocks": 1,
    "panel": 0,
}


@pytest.mark.usefixtures("prebuilt")
@pytest.mark.parametrize(
    "known",
    [
        None,
        [],
        {},
        {**CHOICE, "tile_vectors": 1000},  # for which there is no kernel
        {**CHOICE, "tile_rows": 0},
        {**CHOICE, "group": 3},
        {**CHOICE, "num_blocks": 10**9},
        {**CHOICE, "panel": 1},
        {**CHOICE, "tile_vectors": 1.0},
        {**CHOICE, "dense": True, "tile_rows": 3},
        {**CHOICE, "later": 1},
    ],
)
def test_choices_of_another_version_are_measured_anew(
    save: Save, tmp_path: Path, known: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = small(), tmp_path / "cache"
    path = save(model)
    runtime.load(path, cache=cache)(IMAGES)
    (tuned,) = cache.iterdir()
    right = json.loads(tuned.read_text())
    tuned.write_text(json.dumps(dict.fromkeys(right, known)))
    monkeypatch.setattr(tune.Tuner, "_measured", {})
    assert_close(runtime.load(path, cache=cache)(IMAGES), logits_of(model, IMAGES))
    again = json.loads(tuned.read_text())
    assert again.keys() == right.keys()
    assert known not in again.values()


def test_measurements_belong_to_the_model_of_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tune.processor()
    monkeypatch.setattr(platform, "node", lambda: "another-host")
    assert tune.processor() == here
    found = set()
    for text in (
        "processor : 0\nvendor_id : A\nmodel name : B\ncpu MHz : 1\n\nmodel name : D",
        "processor : 0\nvendor_id : A\nmodel name : B\ncpu MHz : 2\n",
        "processor : 0\nvendor_id : A\nmodel name : C\ncpu MHz : 1\n",
        "processor : 0\nCPU implementer : 0x41\nCPU part : 0xd0c\n",
    ):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(tune, "CPUINFO", tmp_path / "cpuinfo")
        found.add(tune.processor())
    assert len(found) == 3
    monkeypatch.setattr(tune, "CPUINFO", tmp_path / "missing")
    assert tune.processor()


def test_a_damaged_library_is_passed_over(
    kernels: bindings.Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    level, name = library.cpu_level(), kernels.path.name
    monkeypatch.setattr(library, "PREBUILT", tmp_path)
    for damaged in (b"", kernels.path.read_bytes()[:50]):
        (tmp_path / name).write_bytes(damaged)
        assert library.KERNELS.find(level, kernels.path.parent) == kernels.path
        (tmp_path / name).unlink()
    shutil.copy(kernels.path, tmp_path)
    assert library.KERNELS.find(level, tmp_path / "cache") == tmp_path / name
