"""Where activations lie in memory (op.h describes the layout; sizes here are in floats)."""

from dataclasses import dataclass, field

import numpy as np

from sparse.runtime.lower import Array

ALIGNMENT = 16  # floats of a cache line
BANDS_GAIN = 0.75  # share of vectors at or below which several bands are chosen
WAY_LINES = 64  # lines of 4 KiB
SPREADING = (9, 19, 27, 37, 45, 55)  # their first 7 multiples are 7 lines apart, modulo 64


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How an image lies in vectors: `bands` of rows, each of groups of columns, share the lanes.

    Lane l holds the column l % groups * vectors + i and the row l // groups * rows + y of the image
    in vector i of row y, where groups = lanes / bands. One band suits all but small images.
    """

    vectors: int
    rows: int
    lanes: int
    bands: int = 1

    @property
    def groups(self) -> int:
        return self.lanes // self.bands

    def scaled(self, stride: tuple[int, int]) -> "Grid":
        """Return the grid of an input whose every stride-th row and column has this grid."""
        return Grid(
            vectors=self.vectors * stride[1],
            rows=self.rows * stride[0],
            lanes=self.lanes,
            bands=self.bands,
        )

    def divided(self, stride: tuple[int, int]) -> "Grid | None":
        """Return the grid of every stride-th row and column, None if bands are not whole then."""
        if self.rows % stride[0] or self.vectors % stride[1]:
            return None
        return Grid(
            vectors=self.vectors // stride[1],
            rows=self.rows // stride[0],
            lanes=self.lanes,
            bands=self.bands,
        )

    def holds(self, height: int, width: int) -> bool:
        """Tell whether an image has room."""
        return self.bands * self.rows >= height and self.groups * self.vectors >= width

    def moves(self) -> Array:
        """Return from which lane each lane's neighbor comes, -1 for none: (4, lanes).

        The neighbors are those on the left, right, above and below.
        """
        lane = np.arange(self.lanes)
        column, band = lane % self.groups, lane // self.groups
        return np.stack(
            [
                np.where(column > 0, lane - 1, -1),
                np.where(column < self.groups - 1, lane + 1, -1),
                np.where(band > 0, lane - self.groups, -1),
                np.where(band < self.bands - 1, lane + self.groups, -1),
            ]
        ).astype(np.int32)


@dataclass(kw_only=True, eq=False)
class Map:
    """The value of a layer: planes of rows of vectors; `halo` and pads grow with its readers."""

    channels: int
    height: int
    width: int
    grid: Grid
    halo: int = 0
    pad_top: int = 0
    pad_bottom: int = 0
    position: int = field(default=-1, init=False)
    """Of row 0, channel 0, vector 0 in the arena; set by `place`."""

    def __post_init__(self) -> None:
        # `mask` has one row for all with one band: there must be none below the image.
        assert self.grid.holds(self.height, self.width)
        assert self.grid.bands > 1 or self.grid.rows == self.height

    @property
    def vectors(self) -> int:
        return self.grid.vectors

    @property
    def rows(self) -> int:
        """Rows of vectors; those of the image with one band."""
        return self.grid.rows

    @property
    def lanes(self) -> int:
        return self.grid.lanes

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
    def key(self) -> tuple[object, ...]:
        """Maps of one key can take each other's place: what is zero in one is zero in all."""
        return (
            self.channels,
            self.grid,
            self.halo,
            self.pad_top,
            self.pad_bottom,
        )

    @property
    def size(self) -> int:
        size = self.row * (self.pad_top + self.rows + self.pad_bottom)
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
        column = np.arange(self.lanes)[None, :] % self.grid.groups * self.vectors + vector
        return np.where((column >= 0) & (column < self.width), column, -1)

    def row_numbers(self, first: int, count: int) -> Array:
        """Return the image row of each lane of rows first .. first + count - 1.

        Shape (count, lanes); -1 outside the image.
        """
        row = np.arange(self.lanes) // self.grid.groups * self.rows
        row = row + np.arange(first, first + count)[:, None]
        return np.where((row >= 0) & (row < self.height), row, -1)

    def pixels(self) -> tuple[Array, Array]:
        """Return the image row and column of each lane: (rows, vectors, lanes); -1 outside."""
        row, column = self.row_numbers(0, self.rows), self.columns(0, self.vectors)
        outside = (row[:, None, :] < 0) | (column < 0)
        return np.where(outside, -1, row[:, None, :]), np.where(outside, -1, column)

    def places(self, row: Array, column: Array) -> Array:
        """Return where pixels of a channel lie, in floats from row 0, vector 0."""
        band, y = np.divmod(row, self.rows)
        group, vector = np.divmod(column, self.vectors)
        place: Array = y * self.row + vector * self.lanes + band * self.grid.groups + group
        return place

    def mask(self) -> Array | None:
        """Return ~0 for the lanes inside the image, 0 for the others; None if all are inside.

        Shape (vectors, lanes), or (rows, vectors, lanes) where rows differ.
        """
        valid = self.pixels()[0] >= 0
        if valid.all():
            return None
        return np.where(valid if self.grid.bands > 1 else valid[0], -1, 0).astype(np.int32)

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
    def key(self) -> tuple[object, ...]:
        return (self.channels,)

    @property
    def size(self) -> int:
        step = max(self.lanes, ALIGNMENT)
        return -(-self.channels // step) * step

    @property
    def start(self) -> int:
        return 0


Value = Map | Vector


def reach(size: int, out_size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Return how many rows (or vectors) beyond the last of `size` a window reads."""
    return max(0, (out_size - 1) * stride + (kernel - 1) * dilation - padding - (size - 1))


def best_grid(height: int, width: int, *, lanes: int, vectors: int) -> Grid:
    """Return the grid of an image that wastes few lanes.

    Args:
        height: Rows that it has to hold.
        width: Columns that it has to hold.
        lanes: Floats per vector.
        vectors: Of a row of the grid of one band, which is taken unless another is much smaller:
            bands cost their readers a copy of the rows at their borders.
    """
    grids = [Grid(vectors=vectors, rows=height, lanes=lanes)]
    bands = 2
    while bands <= lanes:
        columns = -(-width // (lanes // bands))
        grids.append(Grid(vectors=columns, rows=-(-height // bands), lanes=lanes, bands=bands))
        bands *= 2
    best = min(grids, key=lambda grid: grid.vectors * grid.rows)
    small = best.vectors * best.rows <= BANDS_GAIN * vectors * height
    return best if small else grids[0]


def out_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int, *, ceil_mode: bool = False
) -> int:
    """Return the output size of a convolution or pool; below 1 if the window does not fit.

    With `ceil_mode` the last window may reach beyond the padding, but must not begin there.
    """
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return room // stride + 1
    return min(-(-room // stride), (size + padding - 1) // stride) + 1
