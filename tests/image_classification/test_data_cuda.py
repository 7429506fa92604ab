"""What the loaders do on a CUDA device."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from image_classification.data import DataConfig, create_train_loader, create_val_loader
from image_classification.data.stage import DeviceStage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


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


def config(folder: Path, backend: str, **settings) -> DataConfig:
    defaults = {"image_size": 64, "resize": 73, "batch_size": 8, "workers": 2, "num_classes": 2}
    return DataConfig(path=folder, backend=backend, **{**defaults, **settings})


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_the_stage_equals_that_of_the_cpu(memory_format):
    settings = {"memory_format": memory_format, "image_size": 32}
    raw = [
        (torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8), torch.arange(4) + step)
        for step in range(5)
    ]
    on_cpu = list(DeviceStage(device=torch.device("cpu"), **settings)(iter(raw)))
    on_cuda = DeviceStage(device=torch.device("cuda"), **settings)(iter(raw))
    for (images, targets), (expected, labels) in zip(on_cuda, on_cpu, strict=True):
        assert images.is_cuda
        assert images.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(images.cpu(), expected, rtol=0, atol=1e-6)
        assert torch.equal(targets.cpu(), labels)


@pytest.mark.parametrize("create", [create_train_loader, create_val_loader])
@pytest.mark.parametrize("backend", ["dali-gpu", "dali-cpu", "pytorch"])
def test_batches_equal_those_of_the_cpu(folder, backend, create):
    device = torch.device("cuda", torch.cuda.current_device())
    loader = create(config(folder, backend, device=device))
    reference = create(config(folder, "pytorch"))
    tolerance = 3.0 if backend == "dali-gpu" else 0.5  # nvJPEG rounds in its own way
    for epoch in range(2):
        pairs = zip(loader.epoch(epoch), reference.epoch(epoch), strict=True)
        for (images, targets), (expected, labels) in pairs:
            assert images.device == device
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(targets.cpu(), labels)
            difference = (images.cpu() - expected).abs().mean((1, 2, 3)) * 0.226 * 255
            assert difference.max() < tolerance
    loader.close()
    reference.close()


@pytest.mark.parametrize("backend", ["dali-gpu", "dali-cpu", "pytorch"])
def test_a_batch_stays_intact_while_later_ones_are_made(folder, backend):
    loader = create_train_loader(config(folder, backend, device=torch.device("cuda")))
    running = loader.epoch(0)
    first, _ = next(running)
    kept = first.clone()
    # Work that keeps the consumer's stream behind the side stream.
    weight = torch.randn(4096, 4096, device="cuda")
    for _ in running:
        weight = (weight @ weight).clamp(-1, 1)
        assert torch.equal(first, kept)
    loader.close()
