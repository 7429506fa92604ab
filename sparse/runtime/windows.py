"""Which pixels of a map attend to each other: the windows of Swin and MaxViT."""

from dataclasses import dataclass

import numpy as np

from .arrays import Array

Size = tuple[int, int]

MASKED = -100.0  # added to the score of pixels that are neighbors only because of a shift


@dataclass(frozen=True)
class Windows:
    """Windows of equal size that cover a map."""

    size: Size
    """Of the map, which the windows divide."""
    window: Size
    shift: Size = (0, 0)
    """Rows and columns by which the windows begin later; they go on at the opposite border."""
    spread: bool = False
    """Whether the pixels of a window are as far apart as the map allows, instead of neighbors."""

    @property
    def counts(self) -> Size:
        """Windows below each other, and beside each other."""
        return self.size[0] // self.window[0], self.size[1] // self.window[1]

    def __len__(self) -> int:
        return self.counts[0] * self.counts[1]

    @property
    def tokens(self) -> int:
        """Pixels of a window."""
        return self.window[0] * self.window[1]

    def places(self) -> Array:
        """Return the numbers (windows, tokens) of the pixels, counted row by row, unshifted."""
        pixels = np.arange(self.size[0] * self.size[1])
        return self._by_window(pixels.reshape(self.size))

    def pixels(self) -> tuple[Array, Array]:
        """Return the rows and the columns (windows, tokens) of the pixels."""
        row, column = np.divmod(self.places(), self.size[1])
        return (row + self.shift[0]) % self.size[0], (column + self.shift[1]) % self.size[1]

    def masks(self) -> Array:
        """Return what is added to the scores (windows, tokens, tokens) because of the shift."""
        rows, columns = (self._regions(axis) for axis in (0, 1))
        region = self._by_window(3 * rows[:, None] + columns)
        differs = region[:, :, None] != region[:, None, :]
        return np.where(differs, MASKED, 0).astype(np.float32)

    def _regions(self, axis: int) -> Array:
        """Return which of a shifted map's rows or columns lay beside each other before."""
        count, window, shift = self.size[axis], self.window[axis], self.shift[axis]
        if shift == 0:
            return np.zeros(count, np.int64)
        place = np.arange(count)
        return (place >= count - window).astype(np.int64) + (place >= count - shift)

    def _by_window(self, numbers: Array) -> Array:
        """Return the numbers (windows, tokens) of a map of numbers."""
        (down, right), (height, width) = self.counts, self.window
        if self.spread:
            found = numbers.reshape(height, down, width, right).transpose(1, 3, 0, 2)
        else:
            found = numbers.reshape(down, height, right, width).transpose(0, 2, 1, 3)
        return found.reshape(len(self), self.tokens)


def found_windows(size: Size, places: Array, shift: Size) -> Windows | None:
    """Return the windows whose `places` are these; None if there are none."""
    width = int(np.count_nonzero(places[0] // size[1] == places[0, 0] // size[1]))
    window = places.shape[1] // width, width
    if places.shape[1] % width or size[0] % window[0] or size[1] % window[1]:
        return None
    for spread in (False, True):
        windows = Windows(size, window, shift, spread)
        if np.array_equal(windows.places(), places):
            return windows
    return None
