"""CIFAR-10 as an image folder, where there is one."""

import os
from pathlib import Path

import pytest
import torch

from image_classification.data import DataConfig, create_train_loader, inspect_dataset

DIRECTORY = os.environ.get("CIFAR10_DIR")
pytestmark = pytest.mark.skipif(not DIRECTORY, reason="CIFAR10_DIR is not set")


def test_cifar10_loads_alike_with_both_backends():
    path = Path(DIRECTORY or "")
    info = inspect_dataset(path, num_classes=10)
    assert (info.num_train, info.num_val) == (50_000, 10_000)
    assert "airplane" in info.classes
    loaded = []
    for backend in ("pytorch", "dali-cpu"):
        loader = create_train_loader(
            DataConfig(
                path=path, backend=backend, image_size=32, batch_size=64, workers=0, num_classes=10
            )
        )
        assert len(loader) == 781
        running = loader.epoch(3)
        loaded.append(next(running))
        loader.close()
    (images, targets), (others, other_targets) = loaded
    assert torch.equal(targets, other_targets)
    assert (images - others).abs().mean() * 0.226 * 255 < 0.5
