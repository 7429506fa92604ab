"""The layout of every value of a network, and the order in which its layers are computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sparse.runtime import bindings
from sparse.runtime.graph import INPUT
from sparse.runtime.layout import Grid, Map, Value, Vector, best_grid, out_size, reach
from sparse.runtime.lower import Array, Layer
from sparse.runtime.memory import place
from sparse.runtime.schedule import group, maps_of, schedule, work_of

MAX_GROWTH = 1.2  # of a row, to spare its readers a repacking
LINEAR_DENSITY = 0.3
BYTES_PER_VECTOR = 20  # that the caches move while a vector is multiplied and added
LEVELS = (4, 8)  # by which bands of the image are a multiple: the layers' strides divide them
MAX_COST = 0.99  # of bands against none: the estimate is no better than that
MAX_WASTE = 1.02  # lanes of an image of several bands, per pixel
REPACK_COST = 16  # of a vector that is put together lane by lane


@dataclass(kw_only=True, eq=False)
class Step:
    """One operation with what it reads and writes."""

    kind: int
    source: Value | None
    target: Value | None
    residual: Map | None = None
    layer: Layer | None = None
    stride: tuple[int, int] = (1, 1)
    op: bindings.Op = field(default_factory=bindings.Op)
    tables: list[Array] = field(default_factory=list)
    """What the pointers of `op` point to."""

    def num_connections(self) -> int:
        """Return the multiply-accumulates of one image that are not with a zero weight."""
        pixels = self.target.height * self.target.width if isinstance(self.target, Map) else 1
        return self.layer.num_active * pixels if self.layer is not None else 0

    def moves_whole(self) -> bool:
        """Tell whether a repacking moves vectors as they are; the image is read pixel by pixel."""
        source, target = self.source, self.target
        if not (isinstance(source, Map) and isinstance(target, Map)):
            return False
        return _fits(source.grid, target.grid.scaled(self.stride))


class Arrangement:
    """The steps of a network for images of one size, with a place for every value.

    Args:
        layers: Result of `lower`.
        size: Channels, height and width of the images.
        lanes: Floats per vector of the kernels.
        grid: Of the image; its bands go down through the layers. By default of one band.

    Attributes:
        steps: In the order of the layers.
        groups: Of steps whose rows are computed in turn.
        pieces: The order of execution.
        arena_size: Floats that all values take (memory.py).
        out_shape: Of the result, of one image.

    Raises:
        ValueError: An image too small for the network.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        size: tuple[int, int, int],
        *,
        lanes: int,
        grid: Grid | None = None,
    ) -> None:
        self.steps: list[Step] = []
        self._size, self._lanes = size, lanes
        self._values: dict[str, Value] = {}
        self._repacked: dict[tuple[object, ...], Map] = {}
        self._wishes = self._wished(layers)
        self._read_image(layers[0], grid)
        for layer in layers:
            self._add(layer)
        self._finish()
        self.groups = group(self.steps)
        self.pieces = schedule(self.steps, self.groups)
        self.arena_size = place(self.steps, self.groups, self.pieces)

    def cost(self) -> float:
        """Estimate the time, in multiplications and additions of vectors.

        A layer is bound by them or, outside a group, by what it reads and writes.
        """
        alone = {members.start for members in self.groups if len(members) == 1}
        total = 0.0
        for i, step in enumerate(self.steps):
            sizes = [4 * value.size for value in maps_of(step)]
            moved = sum(sizes) / BYTES_PER_VECTOR if i in alone else 0
            work, target = work_of(step), step.target
            if step.layer is None and isinstance(target, Map) and not step.moves_whole():
                work = REPACK_COST * target.channels * target.rows * target.vectors
            total += max(work, moved)
        return total

    def _read_image(self, first: Layer, grid: Grid | None) -> None:
        channels, height, width = self._size
        if grid is None:
            vectors = first.stride[1] * self._out_vectors(first, width)
            grid = Grid(vectors=vectors, rows=height, lanes=self._lanes)
        image = Map(channels=channels, height=height, width=width, grid=grid)
        self._values[INPUT] = image
        self.steps.append(Step(kind=bindings.INPUT, source=None, target=image))

    def _out_vectors(self, layer: Layer, width: int) -> int:
        """Return the vectors of an output row: whole in the input's and in the output's.

        The least number, unless a reader would have to repack the row and a little more avoids it.
        """
        stride = layer.stride[1]
        least = max(-(-_width(layer, width) // self._lanes), -(-width // (stride * self._lanes)))
        wish = self._wishes.get(layer.name, 0)
        return wish if least <= wish <= MAX_GROWTH * least else least

    def _wished(self, layers: Sequence[Layer]) -> dict[str, int]:
        """Return the vectors of a row that suit its strided readers, by the name of the value.

        Layers that keep the size pass the wish on to the layer that sets it.
        """
        widths = {INPUT: self._size[2]}
        wishes: dict[str, int] = {}
        makers = {layer.name: layer for layer in layers}
        for layer in layers:
            if layer.kind not in ("conv", "max_pool"):
                continue
            width = widths[layer.source]
            widths[layer.name] = _width(layer, width)
            if layer.stride[1] > 1 and layer.kernel != (1, 1):
                name = self._setter(layer.source, makers, widths)
                out = -(-widths[layer.name] // self._lanes)
                wishes[name] = max(wishes.get(name, 0), layer.stride[1] * out)
        return wishes

    def _setter(self, name: str, makers: Mapping[str, Layer], widths: Mapping[str, int]) -> str:
        """Return the value that sets the vectors of a row of `name`.

        `name` itself, if to compute some more vectors up to there costs more than to repack it.
        """
        first, connections = name, 0
        while (maker := makers.get(first)) is not None and maker.residual is None:
            if maker.kind != "conv" or widths[maker.source] != widths[first]:
                return first
            connections += maker.num_active
            if (MAX_GROWTH - 1) * connections > self._lanes * makers[name].channels:
                break
            first = maker.source
        return name

    def _add(self, layer: Layer) -> None:
        if layer.kind in ("conv", "max_pool"):
            self._add_window(layer)
            return
        source = self._values[layer.source]
        target = Vector(channels=layer.channels, lanes=self._lanes)
        kind = bindings.MEAN_POOL
        if layer.kind == "linear":
            assert layer.weight is not None
            sparse = layer.num_active < LINEAR_DENSITY * layer.weight.size
            kind = bindings.SPARSE_LINEAR if sparse else bindings.DENSE_LINEAR
        self._values[layer.name] = target
        self.steps.append(Step(kind=kind, source=source, target=target, layer=layer))

    def _add_window(self, layer: Layer) -> None:
        source = self._map_of(layer.source)
        (kh, kw), (sy, sx), (py, px), (dy, dx) = (
            layer.kernel,
            layer.stride,
            layer.padding,
            layer.dilation,
        )
        height, width = _sizes(layer, (source.height, source.width))
        if min(height, width) < 1:
            raise ValueError(
                f"images of {self._size[1]}x{self._size[2]} are too small for this network: "
                f"nothing is left after layer {layer.name!r}"
            )
        grid = self._grid(layer, source, height, width)
        if (sy, sx) != (1, 1) and (kh, kw, py, px) == (1, 1, 0, 0):
            # Only what is read is taken along: the convolution then finds it side by side.
            source = self._repack(source, grid, (sy, sx))
            sy = sx = 1
        elif not _fits(source.grid, grid.scaled((sy, sx))):
            source = self._repack(source, grid.scaled((sy, sx)), (1, 1))
        target = Map(channels=layer.channels, height=height, width=width, grid=grid)
        source.require(
            halo=max(px, reach(source.vectors, grid.vectors, kw, sx, px, dx)),
            top=py,
            bottom=reach(source.rows, grid.rows, kh, sy, py, dy),
        )
        residual = None
        if layer.residual is not None:
            residual = self._map_of(layer.residual)
            if not _fits(residual.grid, grid):
                residual = self._repack(residual, grid, (1, 1))
        self._values[layer.name] = target
        kind = bindings.SPARSE_CONV if layer.kind == "conv" else bindings.MAX_POOL
        step = Step(
            kind=kind,
            source=source,
            target=target,
            residual=residual,
            layer=layer,
            stride=(sy, sx),
        )
        self.steps.append(step)

    def _grid(self, layer: Layer, source: Map, height: int, width: int) -> Grid:
        """Return the grid of a layer's output: of the bands of its input, if they are whole."""
        vectors = self._out_vectors(layer, source.width)
        if source.vectors % layer.stride[1] == 0 and source.grid.bands == 1:
            vectors = max(vectors, source.vectors // layer.stride[1])
        plain = Grid(vectors=vectors, rows=height, lanes=self._lanes)
        grid = source.grid.divided(layer.stride)
        if grid is None or grid.bands == 1 or not grid.holds(height, width):
            if layer.kind == "max_pool":
                return plain
            grid = best_grid(
                max(height, -(-source.height // layer.stride[0])),
                max(width, -(-source.width // layer.stride[1])),
                lanes=self._lanes,
                vectors=vectors,
            )
            if grid.bands == 1:
                grid = plain
            if (height, width) == (source.height, source.width) and layer.stride == (1, 1):
                grid = source.grid
        # Rows beyond a band are copied from its neighbor only.
        rows = grid.rows * layer.stride[0]
        beyond = reach(
            rows, grid.rows, layer.kernel[0], layer.stride[0], layer.padding[0], layer.dilation[0]
        )
        return plain if grid.bands > 1 and max(layer.padding[0], beyond) > rows else grid

    def _map_of(self, name: str) -> Map:
        value = self._values[name]
        assert isinstance(value, Map)
        return value

    def _repack(self, source: Map, grid: Grid, stride: tuple[int, int]) -> Map:
        height, width = (out_size(s, 1, stride[i], 0, 1) for i, s in enumerate(_size(source)))
        if grid.bands == 1:
            grid = Grid(vectors=grid.vectors, rows=height, lanes=grid.lanes)
        key = (id(source), grid, stride)
        if key not in self._repacked:
            target = Map(channels=source.channels, height=height, width=width, grid=grid)
            self._repacked[key] = target
            self.steps.append(
                Step(kind=bindings.REPACK, source=source, target=target, stride=stride)
            )
        return self._repacked[key]

    def _finish(self) -> None:
        """Let the last value be written where the caller wants it."""
        last = self.steps[-1].target
        assert last is not None
        if isinstance(last, Map):
            self.out_shape: tuple[int, ...] = (last.channels, last.height, last.width)
            self.steps.append(Step(kind=bindings.OUTPUT, source=last, target=None))
        else:
            self.out_shape = (last.channels,)
            self.steps[-1].target = None


def arrange(layers: Sequence[Layer], size: tuple[int, int, int], *, lanes: int) -> Arrangement:
    """Return the arrangement of the least estimated cost: of several bands if they gain enough.

    Args and errors are those of `Arrangement`.
    """
    plain = Arrangement(layers, size, lanes=lanes)
    grids = banded_grids(size[1], size[2], lanes=lanes)
    banded = [Arrangement(layers, size, lanes=lanes, grid=grid) for grid in grids]
    best = min(banded, key=Arrangement.cost, default=plain)
    return best if best.cost() <= MAX_COST * plain.cost() else plain


def banded_grids(height: int, width: int, *, lanes: int) -> list[Grid]:
    """Return the grids of several bands that an image fills, and after strides its maps."""
    found = []
    bands = 2
    while bands < lanes:
        for levels in LEVELS:
            grid = Grid(
                vectors=levels * -(-width // (lanes // bands * levels)),
                rows=levels * -(-height // (bands * levels)),
                lanes=lanes,
                bands=bands,
            )
            if grid.vectors * grid.rows * lanes <= MAX_WASTE * height * width:
                found.append(grid)
        bands *= 2
    return found


def _width(layer: Layer, width: int) -> int:
    """Return the width of the output of a convolution or pool."""
    return _sizes(layer, (1, width))[1]


def _sizes(layer: Layer, size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of the output of a convolution or pool."""
    height, width = (
        out_size(
            size[i],
            layer.kernel[i],
            layer.stride[i],
            layer.padding[i],
            layer.dilation[i],
            ceil_mode=layer.ceil_mode,
        )
        for i in (0, 1)
    )
    return height, width


def _fits(found: Grid, wanted: Grid) -> bool:
    """Tell whether a value of a grid can be used as one of another; plain rows may be missing."""
    return found == wanted or (found.bands == wanted.bands == 1 and found.vectors == wanted.vectors)


def _size(value: Map) -> tuple[int, int]:
    return value.height, value.width
