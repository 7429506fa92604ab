"""A data directory that a network learns from in seconds."""

from pathlib import Path

import numpy as np
from PIL import Image


def write(root: Path, *, train: int, val: int) -> Path:
    """Write JPEGs of two classes that differ in hue; return `root`.

    Args:
        root: Directory that gets train/ and val/.
        train: Training images per class.
        val: Validation images per class.
    """
    noise = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, channel in (("blue", 2), ("red", 0)):
            folder = root / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 120, (40, 36 + index, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / f"{index}.jpg")
    return root
