"""The layout of activations in memory. op.h describes it; sizes here are in floats."""

from dataclasses import dataclass, field

import numpy as np

from .arrays import Array

ALIGNMENT = 16  # floats of a cache line
BANDS_GAIN = 0.75  # several bands must do with this share of the vectors of one band
WAY_LINES = 64  # cache lines in 4 KiB
SPREADING = (9, 19, 27, 37, 45, 55)  # their first 7 multiples are 7 lines apart, modulo 64


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How an image lies in vectors. The lanes hold `bands` bands of rows, each in column groups.

    In vector i of row y, lane l holds the column l % groups * vectors + i and the row
    l // groups * rows + y of the image, where groups = lanes / bands. One band suits most images.
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
        """Return the grid of every stride-th row and column; None if it cuts a band unevenly."""
        if self.rows % stride[0] or self.vectors % stride[1]:
            return None
        return Grid(
            vectors=self.vectors // stride[1],
            rows=self.rows // stride[0],
            lanes=self.lanes,
            bands=self.bands,
        )

    def holds(self, height: int, width: int) -> bool:
        """Tell whether an image of this size fits into the grid."""
        return self.bands * self.rows >= height and self.groups * self.vectors >= width

    def fits(self, wanted: "Grid") -> bool:
        """Tell whether this grid serves a reader of `wanted`. With one band, rows may differ."""
        if self.bands == wanted.bands == 1:
            return self.vectors == wanted.vectors
        return self == wanted

    def moves(self) -> Array:
        """Return the lanes (4, lanes) of the neighbors of each lane, or -1 for none.

        The neighbors are in the order left, right, above, below.
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
    """The value of a layer: planes of rows of vectors. Its readers set the borders.

    A map can be a range of the channels of another one, the whole. It then lies in its memory.
    """

    channels: int
    height: int
    width: int
    grid: Grid
    whole: "Map | None" = None
    first: int = 0
    """The first channel in the whole."""
    fill: int = 0
    """What lies outside the image: the zero point of a map in int8."""
    borders: "Borders" = field(default_factory=lambda: Borders(), init=False)
    _position: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        # With one band, `mask` has one row for all rows, so no row may lie below the image.
        assert self.grid.holds(self.height, self.width)
        assert self.grid.bands > 1 or self.grid.rows == self.height
        if self.whole is not None:
            self.borders = self.whole.borders

    @property
    def root(self) -> "Map":
        """The map that has a place of its own in memory."""
        return self if self.whole is None else self.whole

    def part(self, first: int, channels: int) -> "Map":
        """Return the map of some of the channels; it is the map itself for all of them."""
        if channels == self.channels:
            return self
        return Map(
            channels=channels,
            height=self.height,
            width=self.width,
            grid=self.grid,
            whole=self.root,
            first=self.first + first,
            fill=self.fill,
        )

    def overlaps(self, other: "Value | None") -> bool:
        """Tell whether the maps have channels in common."""
        return (
            isinstance(other, Map)
            and self.root is other.root
            and self.first < other.first + other.channels
            and other.first < self.first + self.channels
        )

    @property
    def position(self) -> int:
        """Place of row 0, channel 0, vector 0 in the arena; `place` of memory.py sets it."""
        return self.root._position + self.first * self.plane

    @position.setter
    def position(self, value: int) -> None:
        assert self.whole is None
        self._position = value

    @property
    def halo(self) -> int:
        return self.borders.halo

    @property
    def pad_top(self) -> int:
        return self.borders.top

    @property
    def pad_bottom(self) -> int:
        return self.borders.bottom

    @property
    def vectors(self) -> int:
        return self.grid.vectors

    @property
    def rows(self) -> int:
        """Rows of vectors. With one band these are the rows of the image."""
        return self.grid.rows

    @property
    def lanes(self) -> int:
        return self.grid.lanes

    @property
    def plane(self) -> int:
        return (self.vectors + 2 * self.halo) * self.lanes

    @property
    def row(self) -> int:
        """Distance between rows. It keeps the rows of a tile from evicting each other.

        A cache with 4 KiB per way maps addresses whose distance is a multiple of 4 KiB to one set.
        """
        lines = -(-self.plane * self.root.channels // ALIGNMENT)
        if lines >= WAY_LINES:
            while lines % WAY_LINES not in SPREADING:
                lines += 1
        return lines * ALIGNMENT

    @property
    def key(self) -> tuple[object, ...]:
        """What maps must have in common to share a place: the same lanes are then zero in all."""
        return (
            self.channels,
            self.height,
            self.width,
            self.grid,
            self.fill,
            self.halo,
            self.pad_top,
            self.pad_bottom,
        )

    @property
    def share(self) -> int:
        """Floats of a row that belong to the map."""
        return self.row * self.channels // self.root.channels

    @property
    def size(self) -> int:
        size = self.share * (self.pad_top + self.rows + self.pad_bottom)
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
        """Return the image row (count, lanes) of each lane, or -1 outside the image.

        The rows are first .. first + count - 1.
        """
        row = np.arange(self.lanes) // self.grid.groups * self.rows
        row = row + np.arange(first, first + count)[:, None]
        return np.where((row >= 0) & (row < self.height), row, -1)

    def pixels(self) -> tuple[Array, Array]:
        """Return the image row and column (rows, vectors, lanes) of each lane, or -1 outside."""
        row, column = self.row_numbers(0, self.rows), self.columns(0, self.vectors)
        outside = (row[:, None, :] < 0) | (column < 0)
        return np.where(outside, -1, row[:, None, :]), np.where(outside, -1, column)

    def places(self, row: Array, column: Array) -> Array:
        """Return where pixels of a channel lie: the distance in floats from row 0, vector 0."""
        band, y = np.divmod(row, self.rows)
        group, vector = np.divmod(column, self.vectors)
        place: Array = y * self.row + vector * self.lanes + band * self.grid.groups + group
        return place

    def mask(self) -> Array | None:
        """Return ~0 for lanes inside the image and 0 for others; None if all lanes are inside.

        The shape is (vectors, lanes), or (rows, vectors, lanes) if there are several bands.
        """
        valid = self.pixels()[0] >= 0
        if valid.all():
            return None
        return np.where(valid if self.grid.bands > 1 else valid[0], -1, 0).astype(np.int32)

    def require(self, *, halo: int, top: int, bottom: int) -> None:
        """Enlarge the borders to the size that a reader needs."""
        self.borders.halo = max(self.halo, halo)
        self.borders.top = max(self.pad_top, top)
        self.borders.bottom = max(self.pad_bottom, bottom)


@dataclass
class Borders:
    """What a map has around the image. All parts of a map have the same."""

    halo: int = 0
    """Vectors on each side."""
    top: int = 0
    bottom: int = 0


@dataclass(kw_only=True, eq=False)
class Vector:
    """The value of a layer: one number per channel, padded to whole vectors with zeros."""

    channels: int
    lanes: int
    position: int = field(default=-1, init=False)

    @property
    def root(self) -> "Vector":
        return self

    @property
    def key(self) -> tuple[object, ...]:
        return (self.channels,)

    @property
    def size(self) -> int:
        unit = max(self.lanes, ALIGNMENT)
        return -(-self.channels // unit) * unit

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
        vectors: Vectors per row of the grid with one band. This grid is returned unless another is
            much smaller, because the rows at the borders of bands have to be copied.
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

    With `ceil_mode` the last window may reach beyond the padding, but it must begin before the
    padding at the end.
    """
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return room // stride + 1
    return min(-(-room // stride), (size + padding - 1) // stride) + 1
