"""--deterministic: what it switches, that runs repeat, and operations that cannot."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import main
from image_classification import build, models
from tests import pictures
from tests.test_main import RIGL, SMALL, run, weights

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.write(tmp_path_factory.mktemp("data"), train=8, val=2)


@pytest.fixture(autouse=True)
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put this process's switches back."""
    monkeypatch.setenv(CUBLAS, ":16:8")
    monkeypatch.delenv(CUBLAS)
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    yield
    cudnn.benchmark, cudnn.deterministic = before
    torch.use_deterministic_algorithms(False)


def argv(data: Path, workspace: Path, *flags: str) -> list[str]:
    here = "--data-backend pytorch -j 0 --training-only --epochs 1 --workspace".split()
    return [str(data), *SMALL, *here, str(workspace), *flags]


@pytest.mark.parametrize("wanted", [True, False])
def test_the_switches_are_set_before_training(data: Path, tmp_path: Path, wanted: bool) -> None:
    flags = ["--deterministic"] if wanted else []
    with contextlib.ExitStack() as stack:
        main.prepare(argv(data, tmp_path, *flags), stack)
        assert torch.are_deterministic_algorithms_enabled() == wanted
        assert torch.backends.cudnn.deterministic == wanted
        assert torch.backends.cudnn.benchmark == (not wanted)
    assert os.environ.get(CUBLAS) == (":4096:8" if wanted else None)


def test_runs_repeat_bit_for_bit(data: Path, tmp_path: Path, device: torch.device) -> None:
    flags = [*RIGL, "--deterministic", *(["--cpu"] if device.type == "cpu" else ["--amp"])]
    for name in "ab":
        done = run(*argv(data, tmp_path / name, *flags))
        assert done.returncode == 0, done.stderr
    a, b = (weights(tmp_path / name) for name in "ab")
    assert all(torch.equal(v, b["state_dict"][k]) for k, v in a["state_dict"].items())


def test_a_contrary_environment_is_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CUBLAS, ":0:0")
    done = run(*argv(data, tmp_path, "--deterministic"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"{CUBLAS} is :0:0, --deterministic needs :4096:8 or :16:8: unset it" in line


class Scatter(nn.Module):
    """Writes to places that may be the same: torch has no deterministic way to."""

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.numel(), device=x.device).view(x.shape)
        return x.put_(places, x.clone())


def test_an_operation_that_cannot_repeat_ends_the_run_in_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = models.create_model

    def create(*args: object, **options: object) -> nn.Module:
        return nn.Sequential(plain(*args, **options), Scatter())  # type: ignore[arg-type]

    monkeypatch.setattr(build.models, "create_model", create)
    done = run(*argv(data, tmp_path, "--deterministic"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "main.py: error: --deterministic: put_ has no deterministic algorithm here: leave the flag "
        "out, or train another network"
    )
