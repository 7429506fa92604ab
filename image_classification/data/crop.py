"""The random crop and flip of a training image, the same numbers for every backend.

The window is that of Szegedy et al. ("Going deeper with convolutions", 2014) as torchvision's
RandomResizedCrop draws it: an area of 8 to 100% and an aspect ratio of 3/4 to 4/3 (log-uniform);
the first of ten attempts that fits, else the largest centered window with an allowed ratio.
"""

from __future__ import annotations

from math import floor, log, sqrt
from typing import NamedTuple

import numpy as np

from image_classification.data.order import FloatArray, IntArray, draws

ATTEMPTS = 10
AREA = (0.08, 1.0)
ASPECT_RATIO = (3 / 4, 4 / 3)

# Columns of `crop_parameters`.
WIDTHS = slice(0, ATTEMPTS)
HEIGHTS = slice(ATTEMPTS, 2 * ATTEMPTS)
TOP, LEFT, FLIP, EXTRA = range(2 * ATTEMPTS, 2 * ATTEMPTS + 4)
_NUM_DRAWS = EXTRA + 1


class Window(NamedTuple):
    """A region of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def crop_parameters(seed: int, epoch: int, indices: IntArray) -> FloatArray:
    """Draw what a random crop needs before the size of the image is known.

    Returns:
        One row per image: the width and the height of each attempt as fractions of the square
        root of the image's area (columns `WIDTHS`, `HEIGHTS`), the place of the window as
        fractions of the room there is (`TOP`, `LEFT`), 1 to flip and 0 not to (`FLIP`), and a
        number uniform in [0, 1) for whatever else is random (`EXTRA`).
    """
    rows = draws(seed, epoch, indices, _NUM_DRAWS)
    low, high = AREA
    area = low + (high - low) * rows[:, WIDTHS]
    low, high = map(log, ASPECT_RATIO)
    ratio = np.exp(low + (high - low) * rows[:, HEIGHTS])
    rows[:, WIDTHS] = np.sqrt(area * ratio)
    rows[:, HEIGHTS] = np.sqrt(area / ratio)
    rows[:, FLIP] = rows[:, FLIP] < 0.5
    return rows


def crop_window(height: int, width: int, parameters: FloatArray) -> Window:
    """Return the window of a training crop.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        parameters: A row of `crop_parameters`.
    """
    side = sqrt(height * width)
    for w, h in zip(parameters[WIDTHS], parameters[HEIGHTS], strict=True):
        window_width, window_height = floor(side * w + 0.5), floor(side * h + 0.5)
        if 0 < window_width <= width and 0 < window_height <= height:
            top = floor(parameters[TOP] * (height - window_height + 1))
            left = floor(parameters[LEFT] * (width - window_width + 1))
            return Window(top, left, window_height, window_width)
    widest = ASPECT_RATIO[1]
    window_width = min(width, floor(height * widest + 0.5))
    window_height = min(height, floor(width * widest + 0.5))
    return Window(
        (height - window_height) // 2, (width - window_width) // 2, window_height, window_width
    )
