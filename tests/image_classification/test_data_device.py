"""What the loaders do on a device: on the CPU, and on a GPU where there is one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from image_classification.data import DataConfig, create_train_loader, create_val_loader
from image_classification.data.stage import MEAN, STD, Batch, DeviceStage

pytestmark = pytest.mark.filterwarnings(  # workers are forked, from Python 3.12 on with a warning
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(37):
            file = root / split / "ab"[number % 2] / f"{number:02}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            noise = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            noise.resize((301 + number, 240), Image.Resampling.BICUBIC).save(file, quality=95)
    return root


@pytest.fixture(params=["dali-gpu", "dali-cpu", "pytorch"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    if request.param == "dali-gpu" and device.type == "cpu":
        pytest.skip("dali-gpu decodes on a GPU")
    return request.param


def config(folder: Path, backend: str, **settings) -> DataConfig:
    defaults = {"image_size": 64, "resize": 73, "batch_size": 8, "workers": 2, "num_classes": 2}
    return DataConfig(path=folder, backend=backend, **{**defaults, **settings})


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_the_stage_normalizes_and_moves_every_batch(device, memory_format):
    raw = [
        Batch(
            torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8),
            torch.arange(4) + step,
            {f"{step}.jpg": "not an image"},
        )
        for step in range(5)
    ]
    stage = DeviceStage(device=device, memory_format=memory_format, image_size=32)
    for (images, targets, bad_files), source in zip(stage(iter(raw)), raw, strict=True):
        assert images.device == targets.device == device
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=memory_format)
        expected = (source.images.numpy() / 255 - np.array(MEAN)) / np.array(STD)  # in float64
        difference = images.cpu().permute(0, 2, 3, 1).numpy() - expected
        assert np.abs(difference).max() < 2e-6  # the largest value is 2.64: ten roundings
        assert torch.equal(targets.cpu(), source.targets)
        assert bad_files == source.bad_files


@pytest.mark.parametrize("create", [create_train_loader, create_val_loader])
def test_batches_equal_those_of_the_pytorch_backend_on_the_cpu(folder, device, backend, create):
    loader = create(config(folder, backend, device=device))
    reference = create(config(folder, "pytorch"))
    tolerance = 3.0 if backend == "dali-gpu" else 0.5  # nvJPEG rounds in its own way
    for epoch in range(2):
        pairs = zip(loader.epoch(epoch), reference.epoch(epoch), strict=True)
        for (images, targets), (expected, labels) in pairs:
            assert images.device == targets.device == device
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(targets.cpu(), labels)
            difference = (images.cpu() - expected).abs().mean((1, 2, 3)) * 0.226 * 255
            assert difference.max() < tolerance
    loader.close()
    reference.close()


def test_a_batch_stays_intact_while_later_ones_are_made(folder, device, backend):
    loader = create_train_loader(config(folder, backend, device=device))
    running = loader.epoch(0)
    first, _ = next(running)
    kept = first.clone()
    # On a GPU, work that keeps the consumer's stream behind the side stream.
    side = 4096 if device.type == "cuda" else 8
    weight = torch.randn(side, side, device=device)
    for _ in running:
        weight = (weight @ weight).clamp(-1, 1)
        assert torch.equal(first, kept)
    loader.close()
