"""classify.py on a real JPEG and a real checkpoint."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import classify
import export
from image_classification import checkpoint, data, models
from image_classification.config import Config
from image_classification.models import create_model
from sparse import runtime

ROOT = Path(classify.__file__).parent
CLASSES = ["cat", "dog", "elk", "fox"]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Write one JPEG of odd size as the only validation image of each of four classes."""
    rows, columns = np.mgrid[0:75, 0:101]
    pixels = np.stack([3 * rows, 2 * columns, rows * columns % 251], axis=-1).astype(np.uint8)
    for name in CLASSES:
        directory = tmp_path / "data" / "val" / name
        directory.mkdir(parents=True)
        Image.fromarray(pixels).save(directory / "photo.jpg", quality=92)
    return directory / "photo.jpg"


def write_checkpoint(directory: Path, **options: object) -> tuple[Path, nn.Module]:
    config = Config(
        **{"data": "somewhere", "arch": "small_cnn", "num_classes": 4, "image_size": 40} | options
    )
    torch.manual_seed(0)
    model = create_model(config.arch, num_classes=4, stem=config.stem, width=config.width)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that evaluation must use
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    state = {
        "format": checkpoint.FORMAT,
        "epoch": 1,
        "epoch_step": 0,
        "step": 10,
        "arch": config.arch,
        "best_prec1": 0.0,
        "state_dict": model.state_dict(),
        "optimizer": {},
        "config": dict(vars(config)),
    }
    return checkpoint.save(directory, state, epoch=1, is_best=False), model.eval()


def probabilities_of_validation(photo: Path, model: nn.Module, **options: object) -> torch.Tensor:
    """Return what the network says of the image as the validation loader hands it out."""
    loader = data.create_val_loader(
        data.DataConfig(
            path=photo.parents[2],
            num_classes=4,
            batch_size=4,
            **{"backend": "pytorch", "workers": 0, "image_size": 40} | options,
        )
    )
    images, _ = next(iter(loader.epoch(0)))
    with torch.no_grad():
        return model(images)[-1].softmax(0)


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    status = classify.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_says_what_validation_computes(
    interpolation: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = write_checkpoint(tmp_path, interpolation=interpolation)
    expected = probabilities_of_validation(photo, model, interpolation=interpolation)
    order = expected.argsort(descending=True).tolist()
    status, out, err = run(capsys, "--resume", path, "--image", photo, "--topk", 3, "--cpu")
    assert (status, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert [(line[0], int(line[2])) for line in lines] == list(zip("123", order[:3], strict=True))
    for line, index in zip(lines, order, strict=False):
        assert float(line[1]) == pytest.approx(expected[index].item(), abs=2e-4)
    assert max(expected) - min(expected) > 0.01  # the order above means something


def test_names_and_size_and_options_of_the_training(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = write_checkpoint(
        tmp_path, arch="mobilenet_v1", width=0.25, image_size=None, interpolation="triangular"
    )
    expected = probabilities_of_validation(photo, model, image_size=64)
    best = CLASSES[int(expected.argmax())]
    (tmp_path / "names.txt").write_text("\n".join(CLASSES) + "\n")
    for names in (tmp_path / "names.txt", tmp_path / "data"):
        status, out, _ = run(
            capsys,
            *("--resume", path, "--image", photo, "--class-names", names, "--image-size", 64),
            *("--arch", "mobilenet_v1", "--cpu"),
        )
        assert status == 0
        assert len(out.splitlines()) == 4  # --topk is 5
        assert out.startswith(f"1 {expected.max():.4f} {best}\n")


def test_a_checkpoint_without_flags_is_read_with_the_defaults(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = write_checkpoint(tmp_path)
    state = {k: v for k, v in checkpoint.load(path).items() if k != "config"}
    path = checkpoint.save(tmp_path, state, epoch=1, is_best=False)
    expected = probabilities_of_validation(photo, model, image_size=32)
    status, out, err = run(capsys, "--resume", path, "--image", photo, "--topk", 1, "--cpu")
    assert (status, err) == (0, "")
    assert out == f"1 {expected.max():.4f} {int(expected.argmax())}\n"


def test_as_a_command(photo: Path, tmp_path: Path) -> None:
    path, _ = write_checkpoint(tmp_path, arch="resnet18", stem="cifar", image_size=32)
    command = [sys.executable, str(ROOT / "classify.py"), "--resume", str(path), "--image"]
    done = subprocess.run([*command, str(photo)], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 4


def test_mistakes_are_one_line_and_status_2(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = write_checkpoint(tmp_path)
    good = {"--resume": path, "--image": photo, "--cpu": None}
    (tmp_path / "large").mkdir()
    large, _ = write_checkpoint(tmp_path / "large", arch="squeezenet1_1", image_size=64)
    text = tmp_path / "three.txt"
    text.write_text("a\nb\nc\n")
    (tmp_path / "empty").mkdir()
    mistakes: list[tuple[dict[str, object], str]] = [
        ({"--resume": tmp_path / "none.pth.tar"}, "none.pth.tar does not exist"),
        ({"--resume": text}, "three.txt"),
        ({"--image": tmp_path / "none.jpg"}, "cannot read image"),
        ({"--image": text}, "cannot read image"),
        ({"--arch": "resnet50"}, "holds small_cnn, --arch is resnet50"),
        ({"--topk": 0}, "--topk must be at least 1, got 0"),
        ({"--image-size": 0}, "--image-size must be at least 1, got 0"),
        ({"--resume": large, "--image-size": 16}, "--image-size 16 does not suit squeezenet1_1"),
        ({"--class-names": text}, "holds 3 names, the network has 4 classes"),
        ({"--class-names": tmp_path / "none.txt"}, "cannot be read: No such file"),
        ({"--class-names": photo}, "it is no text file"),
        ({"--class-names": tmp_path / "empty"}, "neither train/ nor val/"),
        ({"--topkk": 3}, "unrecognized arguments: --topkk"),
    ]
    for change, message in mistakes:
        words = [w for pair in (good | change).items() for w in pair if w is not None]
        status, out, err = run(capsys, *words)
        assert (status, out) == (2, ""), change
        assert message in err, change
        assert err.startswith("classify.py: error: "), change
        assert err.count("\n") == 1, err


def test_a_network_of_gray_images_is_refused(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = nn.Sequential(nn.Conv2d(1, 4, 3)).eval(), tmp_path / "gray"
    named = {"arch": "mine", "model": {}, "image_size": 8, "mean": (0.5,), "std": (0.5,)}
    nodes = runtime.trace(model, image_size=8)
    runtime.save(path, model.state_dict(), {}, nodes=nodes, in_channels=1, **named)
    status, _, err = run(capsys, photo, "--model", path)
    assert status == 2
    assert "takes images of 1 channels, image files are read with 3: run it with sparse.run" in err


def curved(*, num_classes: int) -> nn.Module:
    """Return a network with an activation that the sparse runtime does not know."""
    first = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.PReLU(8)
    second = nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*first, *second, *pool, nn.Linear(8, num_classes))


def test_torch_runs_what_the_sparse_runtime_does_not_know(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.OWN, "curved", models.ModelSpec(create=curved, image_size=32))
    path, _ = write_checkpoint(tmp_path, arch="curved")
    output = tmp_path / "network"
    for kind in ("compact", "plan"):
        assert export.main([str(path), str(output), "--to", kind]) == 2
        err = capsys.readouterr().err
        assert err.startswith("export.py: error: the runtime does not know 2: PReLU (aten.prelu); ")
        assert "classify.py --fallback torch" in err
        assert err.count("\n") == 1
        assert not output.exists()
    plain = run(capsys, "--resume", path, "--image", photo, "--cpu")[1].splitlines()
    status, out, err = run(capsys, photo, "--model", path, "--fallback", "torch")
    assert (status, err) == (0, "")
    *ranks, time, share, part = out.splitlines()
    assert ranks == plain
    assert time.endswith(" ms for 1 image")
    assert share.startswith("torch runs 0.0% of the multiply-adds (")
    assert part == "  2: PReLU (aten.prelu)"

    known, _ = write_checkpoint(tmp_path)
    assert export.main([str(known), str(output)]) == 0
    capsys.readouterr()
    for words, message in (
        (("--model", output), f"--fallback has no effect with {output}, which is no checkpoint"),
        (("--resume", path), "--fallback has no effect without --model"),
        (("--model", tmp_path / "none"), "none cannot be read: No such file"),
        (("--model", known, "--arch", "resnet50"), "holds small_cnn, --arch is resnet50"),
    ):
        status, out, err = run(capsys, photo, "--fallback", "torch", *words)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert message in err
