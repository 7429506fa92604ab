"""Read one image file."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# What the known extensions promise, and what web pages deliver under them. Without the list Pillow
# would also start other programs, for PostScript.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000")

_TIFF_MODES = ("RGB", "RGBA", "L", "P", "I;16")
_TIFF_COMPRESSIONS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd")


class UnreadableImageError(ValueError):
    """A file that is no image, or not a whole one; one line with its name and the reason."""


def read_image(path: str) -> Tensor:
    """Return the pixels of an image file as RGB, uint8 [3, H, W], as they are stored.

    Gray, palette and CMYK images become RGB, 16-bit ones are scaled to 8 bits, transparency is
    dropped. The orientation noted in EXIF data is left alone, as torchvision's loader does. The
    content decides on the format, whatever the extension.

    Raises:
        UnreadableImageError: The file cannot be read or decoded to its end.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise OSError("it is not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            with Image.open(path, formats=_FORMATS) as file:
                pixels = _to_rgb(file)
    except Exception as error:  # Pillow's readers raise a dozen types on damaged files
        raise UnreadableImageError(f"cannot read image {path}: {_reason(error)}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def why_unreadable(path: str) -> str | None:
    """Return the reason why an image cannot be read, with its name; None when it can."""
    try:
        read_image(path)
    except UnreadableImageError as error:
        return str(error)
    return None


def is_plain_tiff(path: str) -> bool:
    """Return whether an image named as TIFF is of the kinds that DALI decodes without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path, formats=_FORMATS) as file:
            if file.format != "TIFF":
                return True
            return file.mode in _TIFF_MODES and file.info.get("compression") in _TIFF_COMPRESSIONS


def write_png(pixels: Tensor, path: Path) -> None:
    """Write what `read_image` returned to a file."""
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, format="PNG", compress_level=1)


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) else None
    return " ".join((text or str(error)).split()) or type(error).__name__


def _to_rgb(image: Image.Image) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
        gray = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((gray * 255 + 32767) // 65535).astype(np.uint8))
    return np.array(image.convert("RGB"))
