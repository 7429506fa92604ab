"""A data backend, an optimizer and a model are one file each, and one line in one dict.

The three parts of this module stand for the three files, and `added` has the three lines.
"""

import contextlib
import io
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer

import main
from image_classification import checkpoint, config, data, models, optimizers
from image_classification.config import Config
from image_classification.data.stage import Batch
from scripts import derive
from tests.pictures import write

# image_classification/data/stills.py


class StillSource:
    """Read images with torchvision, without augmentation."""

    def __init__(self, settings: data.DataConfig, images: Any, *, training: bool) -> None:
        self.size, self.images = settings.image_size, images

    def read(self, epoch: int, batches: Sequence[np.ndarray]) -> Generator[Batch, None, None]:
        for indices in batches:
            pictures = [self.image(index) for index in indices.tolist()]
            targets = torch.from_numpy(self.images.labels[indices])
            yield Batch(torch.stack(pictures), targets, {})

    def image(self, index: int) -> Tensor:
        with Image.open(self.images.path(index)) as image:
            pixels = np.array(image.convert("RGB").resize([self.size] * 2))
        return torch.from_numpy(pixels)

    def close(self) -> None: ...


BACKEND = data.BackendSpec(
    source=StillSource, refuses={"bicubic": "is not what stills are resized with: pass bilinear"}
)

# image_classification/optimizers/signs.py


class Signs(Optimizer):
    """Go by the sign of the momentum."""

    def __init__(self, groups: Any, **defaults: Any) -> None:
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                average = state.setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * average.sign())


def create(groups: Any, *, device: torch.device, **settings: Any) -> Optimizer:
    return Signs(groups, **settings)


OPTIMIZER = optimizers.OptimizerSpec(
    create=create, settings={"momentum": "momentum"}, description="a toy"
)

# image_classification/models/tiny.py


class Tiny(nn.Module):
    """One convolution and one layer."""

    def __init__(self, num_classes: int, width: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, int(8 * width), 3, stride=2)
        self.fc = nn.Linear(int(8 * width), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.conv(x).relu().mean((2, 3)))
        return logits


MODEL = models.ModelSpec(
    create=Tiny,
    image_size=12,
    has_width=True,
    size_fault=lambda size: "tiny takes even sizes" if size % 2 else None,
)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data.BACKENDS, "stills", BACKEND)
    monkeypatch.setitem(optimizers.OPTIMIZERS, "signs", OPTIMIZER)
    monkeypatch.setitem(models.OWN, "tiny", MODEL)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write(tmp_path / "data", train=4, val=2)


THREE = "--data-backend stills --optimizer signs --arch tiny --cpu -b 4 --lr 0.01 --seed 1".split()


def run(*argv: str) -> tuple[int, str]:
    state = torch.get_rng_state()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as text,
    ):
        status = main.main(argv)
    torch.set_rng_state(state)
    return status, text.getvalue()


@pytest.mark.usefixtures("added")
def test_main_trains_with_them_and_goes_on(images: Path, tmp_path: Path) -> None:
    argv = [str(images), *THREE, "--workspace", str(tmp_path), "--momentum", "0.5", "--width", "2"]
    assert run(*argv, "--epochs", "1") == (0, "")
    state = checkpoint.load(tmp_path / "checkpoint.pth.tar")
    assert (state["arch"], state["config"]["data_backend"]) == ("tiny", "stills")
    assert state["state_dict"]["conv.weight"].shape == (16, 3, 3, 3)
    assert {key for of in state["optimizer"]["state"].values() for key in of} == {"average"}
    assert all(group["momentum"] == 0.5 for group in state["optimizer"]["param_groups"])
    assert run(*argv, "--epochs", "2", "--resume", "auto") == (0, "")
    assert checkpoint.load(tmp_path / "checkpoint.pth.tar")["step"] == 2 * state["step"] > 0


@pytest.mark.usefixtures("added")
def test_a_sparse_method_joins_them(images: Path, tmp_path: Path) -> None:
    rigl = "--sparse-method rigl --sparsity 0.5 --delta-t 1 --epochs 2".split()
    assert run(str(images), *THREE, *rigl, "--workspace", str(tmp_path)) == (0, "")
    kernel = checkpoint.load(tmp_path / "checkpoint.pth.tar")["state_dict"]["conv.weight"]
    assert 0 < (kernel == 0).float().mean() < 1


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--interpolation bicubic", "--interpolation bicubic is not what stills are resized with"),
        ("--synthetic-batches 3", "--synthetic-batches has no effect"),
        ("--nesterov", "--nesterov has no effect without --optimizer sgd or apex-sgd"),
        ("--optimizer adamw --mom 0.5", "without --optimizer sgd, rmsprop, apex-sgd or signs"),
        ("--image-size 13", "--image-size 13 does not suit tiny, whose own is 12: tiny takes even"),
        ("--arch tinny", "did you mean tiny?"),
        ("--width 101", "--width must be above 0 and at most 100, got 101"),
    ],
)
def test_a_mistake_is_one_line(images: Path, typed: str, message: str) -> None:
    status, text = run(str(images), *THREE, *typed.split(), "--dry-run")
    assert status == 2
    assert message in text
    assert text.count("\n") == 1


@pytest.mark.usefixtures("added")
def test_the_flags_and_their_page_name_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert "apex-sgd`, `signs`" in derive.options()
    assert "`syntetic`, `stills`" in derive.options()
    (defaults,) = config.parse([], Config, description="")
    assert defaults.optimizer == "sgd"
    with pytest.raises(SystemExit, match="0"):
        config.parse(["--help"], Config, description="")
    assert "signs" in capsys.readouterr().out
    assert optimizers.describe_optimizers() == "apex-sgd is apex's FusedSGD; signs is a toy"
    assert models.with_width() == ["mobilenet_v1", "tiny"]
