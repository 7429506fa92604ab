"""Read one image file."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def read_image(path: str) -> Tensor:
    """Return the pixels of an image file as RGB, uint8 [3, H, W], as they are stored.

    Gray, palette and CMYK images become RGB, 16-bit ones are scaled to 8 bits, transparency is
    dropped. The orientation noted in EXIF data is left alone, as torchvision's loader does.

    Raises:
        ValueError: The file cannot be read, with its name and the reason.
    """
    try:
        with Image.open(path) as file:
            pixels = _to_rgb(file)
    except (OSError, SyntaxError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot read image {path}: {reason}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
        gray = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((gray * 255 + 32767) // 65535).astype(np.uint8))
    return np.array(image.convert("RGB"))
