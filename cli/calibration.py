"""Images with which a network is quantized: `export.py --quantize int8 --calibration DIR`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from cli.predictions import load_image

BATCH_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How a network is quantized."""

    images: tuple[Path, ...]
    method: str
    """One of `sparse.runtime.METHODS`."""

    def batches(self, *, image_size: int, interpolation: str) -> Iterator[Tensor]:
        """Yield the images as validation sees them, (N, 3, image_size, image_size)."""
        for start in range(0, len(self.images), BATCH_SIZE):
            yield torch.cat(
                [
                    load_image(path, image_size=image_size, interpolation=interpolation)
                    for path in self.images[start : start + BATCH_SIZE]
                ]
            )


def choose(folder: Path, *, num_images: int, method: str) -> Calibration:
    """Choose images of a folder, spread evenly over all in it and below it, by their names.

    Raises:
        ValueError: The folder does not exist or has too few images.
    """
    if num_images < 1:
        raise ValueError(f"--num-images must be at least 1, got {num_images}")
    if not folder.is_dir():
        raise ValueError(f"--calibration {folder} is no folder")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if len(found) < num_images:
        raise ValueError(
            f"--calibration {folder} has {len(found)} images, --num-images is {num_images}: name a "
            "folder with more, or a smaller number"
        )
    places = range(num_images)
    images = tuple(found[place * len(found) // num_images] for place in places)
    return Calibration(images=images, method=method)
