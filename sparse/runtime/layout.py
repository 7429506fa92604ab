"""Where activations lie in memory (op.h describes the layout; sizes here are in floats)."""

from dataclasses import dataclass, field

import numpy as np

from sparse.runtime.lower import Array

ALIGNMENT = 16  # floats of a cache line
WAY_LINES = 64  # lines of 4 KiB
SPREADING = (9, 19, 27, 37, 45, 55)  # their first 7 multiples are 7 lines apart, modulo 64


@dataclass(kw_only=True, eq=False)
class Map:
    """The value of a layer: planes of rows of vectors; `halo` and pads grow with its readers."""

    channels: int
    height: int
    width: int
    vectors: int
    lanes: int
    halo: int = 0
    pad_top: int = 0
    pad_bottom: int = 0
    position: int = field(default=-1, init=False)
    """Of row 0, channel 0, vector 0 in the arena; set by `place`."""

    @property
    def plane(self) -> int:
        return (self.vectors + 2 * self.halo) * self.lanes

    @property
    def row(self) -> int:
        """Distance between rows, such that rows of a tile do not compete for places of a cache.

        Caches of 4 KiB per way put addresses that are a multiple of 4 KiB apart in one place.
        """
        lines = -(-self.plane * self.channels // ALIGNMENT)
        if lines >= WAY_LINES:
            while lines % WAY_LINES not in SPREADING:
                lines += 1
        return lines * ALIGNMENT

    @property
    def key(self) -> tuple[int, ...]:
        """Maps of one key can take each other's place: what is zero in one is zero in all."""
        return (
            self.channels,
            self.height,
            self.vectors,
            self.halo,
            self.pad_top,
            self.pad_bottom,
        )

    @property
    def size(self) -> int:
        size = self.row * (self.pad_top + self.height + self.pad_bottom)
        return -(-size // ALIGNMENT) * ALIGNMENT

    @property
    def start(self) -> int:
        """Position of row 0, channel 0, vector 0 from the beginning of the memory."""
        return self.pad_top * self.row + self.halo * self.lanes

    def columns(self, first: int, count: int) -> Array:
        """Return the image column of each lane of vectors first .. first + count - 1.

        Shape (count, lanes); -1 outside the image.
        """
        vector = np.arange(first, first + count)[:, None]
        column = np.arange(self.lanes)[None, :] * self.vectors + vector
        return np.where((column >= 0) & (column < self.width), column, -1)

    def mask(self) -> Array | None:
        """Return ~0 for the lanes inside the image, 0 for the others; None if all are inside."""
        valid = self.columns(0, self.vectors) >= 0
        return None if valid.all() else np.where(valid, -1, 0).astype(np.int32)

    def require(self, *, halo: int, top: int, bottom: int) -> None:
        """Grow the borders to what a reader needs."""
        self.halo = max(self.halo, halo)
        self.pad_top = max(self.pad_top, top)
        self.pad_bottom = max(self.pad_bottom, bottom)


@dataclass(kw_only=True, eq=False)
class Vector:
    """The value of a layer: one number per channel, padded to whole vectors with zeros."""

    channels: int
    lanes: int
    position: int = field(default=-1, init=False)

    @property
    def key(self) -> tuple[int, ...]:
        return (self.channels,)

    @property
    def size(self) -> int:
        step = max(self.lanes, ALIGNMENT)
        return -(-self.channels // step) * step

    @property
    def start(self) -> int:
        return 0


Value = Map | Vector


class Arena:
    """Gives values a place; a place is reused by values of the same key only."""

    def __init__(self) -> None:
        self.size = 0
        self._free: dict[tuple[int, ...], list[int]] = {}

    def place(self, value: Value) -> None:
        """Set the position of a value."""
        free = self._free.get(value.key)
        if free:
            value.position = free.pop()
        else:
            value.position = self.size + value.start
            self.size += value.size

    def release(self, value: Value) -> None:
        """Let others have the place of a value."""
        self._free.setdefault(value.key, []).append(value.position)


def reach(size: int, out_size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Return how many rows (or vectors) beyond the last of `size` a window reads."""
    return max(0, (out_size - 1) * stride + (kernel - 1) * dilation - padding - (size - 1))


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Return the output size of a convolution or pool; below 1 if the window does not fit."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
