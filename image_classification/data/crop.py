"""The random crop and flip of a training image, the same numbers for every backend.

The window is that of Szegedy et al. ("Going deeper with convolutions", 2014) as torchvision's
RandomResizedCrop draws it: an area of 8 to 100% and an aspect ratio of 3/4 to 4/3 (log-uniform);
the first of ten attempts that fits, else the largest centered window with an allowed ratio.
"""

from __future__ import annotations

from math import log

import numpy as np

from image_classification.data.order import FloatArray, IntArray, draws

ATTEMPTS = 10
AREA = (0.08, 1.0)
ASPECT_RATIO = (3 / 4, 4 / 3)

# Columns of `crop_parameters`.
HEIGHTS = slice(0, ATTEMPTS)
WIDTHS = slice(ATTEMPTS, 2 * ATTEMPTS)
SHAPES = slice(0, 2 * ATTEMPTS)
PLACE = slice(2 * ATTEMPTS, 2 * ATTEMPTS + 2)
FLIP, EXTRA = range(2 * ATTEMPTS + 2, 2 * ATTEMPTS + 4)
_NUM_DRAWS = EXTRA + 1


def crop_parameters(seed: int, epoch: int, indices: IntArray) -> FloatArray:
    """Draw what random crops need before the sizes of the images are known.

    Returns:
        One row per image: the height and the width of each attempt as fractions of the square
        root of the image's area (columns `HEIGHTS`, `WIDTHS`), the top and the left of the window
        as fractions of the room there is (`PLACE`), 1 to flip and 0 not to (`FLIP`), and a number
        uniform in [0, 1) for whatever else is random (`EXTRA`).
    """
    rows = draws(seed, epoch, indices, _NUM_DRAWS)
    low, high = AREA
    area = low + (high - low) * rows[:, HEIGHTS]
    low, high = map(log, ASPECT_RATIO)
    ratio = np.exp(low + (high - low) * rows[:, WIDTHS])
    rows[:, HEIGHTS] = np.sqrt(area / ratio)
    rows[:, WIDTHS] = np.sqrt(area * ratio)
    rows[:, FLIP] = rows[:, FLIP] < 0.5
    return rows


def crop_windows(sizes: IntArray, parameters: FloatArray) -> IntArray:
    """Return the windows of training crops.

    Args:
        sizes: Height and width of each image in pixels, [n, 2].
        parameters: Rows of `crop_parameters`, [n, columns].

    Returns:
        Top, left, height and width of each window in pixels, [n, 4].
    """
    side = np.sqrt(sizes[:, 0] * sizes[:, 1])[:, None]
    attempts = _rounded(side * parameters[:, SHAPES]).reshape(-1, 2, ATTEMPTS)
    inside = (attempts > 0) & (attempts <= sizes[:, :, None])
    fits = inside[:, 0] & inside[:, 1]
    rows, first = np.arange(len(sizes)), fits.argmax(axis=1)
    found = fits[rows, first][:, None]
    window = attempts[rows, :, first]
    start = np.floor(parameters[:, PLACE] * (sizes - window + 1)).astype(np.int64)
    if not found.all():
        widest = _rounded(sizes.min(axis=1, keepdims=True) * ASPECT_RATIO[1])
        largest = np.minimum(sizes, widest)
        window = np.where(found, window, largest)
        start = np.where(found, start, (sizes - largest) // 2)
    return np.concatenate([start, window], axis=1)


def _rounded(values: FloatArray) -> IntArray:
    return np.floor(values + 0.5).astype(np.int64)
