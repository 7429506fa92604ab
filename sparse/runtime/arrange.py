"""Decide how every value of a network lies in vectors, and in which order layers are computed."""

from collections.abc import Mapping, Sequence

from . import bindings
from .execution_order import fuse, order_pieces
from .graph import INPUT
from .layout import Grid, Map, Value, Vector, best_grid, out_size, reach
from .lower import Layer
from .memory import place
from .operation import Operation

WINDOWS = ("conv", "max_pool")
MAPS = (*WINDOWS, "scale", "layer_norm", "tokens", "attention")
"""Kinds of layers whose value is a map."""
MAX_GROWTH = 1.2  # factor by which a row may grow if its readers then need no repacking
LINEAR_DENSITY = 0.3  # below this density a linear layer is computed as a sparse one
BYTES_PER_VECTOR = 20  # bytes that the caches move while one vector is multiplied and added
LEVELS = (4, 8)  # rows and vectors of a band are multiples of these, which strides divide
MAX_TIME = 0.99  # bands must save this much time at least: the estimate is not more exact
MAX_WASTE = 1.02  # most lanes per pixel of an image with several bands
REPACK_TIME = 16  # time of a vector that is put together lane by lane, in multiply-adds


class Arrangement:
    """The operations of a network for images of one size, with a place in memory for every value.

    Args:
        layers: Result of `lower`.
        size: Channels, height and width of the images.
        lanes: Floats per vector of the kernels.
        grid: Grid of the image. The layers keep its bands as far as they can. The default is one
            band.

    Attributes:
        operations: In the order of the layers.
        groups: Groups of operations that are executed together, a few rows at a time.
        pieces: The order of execution.
        arena_size: Number of floats that all values take (memory.py).
        out_shape: Shape of the result of one image.

    Raises:
        ValueError: The images are too small for the network.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        size: tuple[int, int, int],
        *,
        lanes: int,
        grid: Grid | None = None,
    ) -> None:
        self.operations: list[Operation] = []
        self._size, self._lanes = size, lanes
        self._values: dict[str, Value] = {}
        self._repacked: dict[tuple[object, ...], Map] = {}
        self._borderless: set[int] = set()  # ids of maps whose borders nobody fills
        self._wishes = self._wished_vectors(layers)
        self._read_image(layers[0], grid)
        for layer in layers:
            self._add(layer)
        self._finish()
        self.groups = fuse(self.operations)
        self.pieces = order_pieces(self.operations, self.groups)
        self.arena_size = place(self.operations, self.groups, self.pieces)

    def estimated_time(self) -> float:
        """Return an estimate of the time of one image, in multiply-adds of vectors.

        A layer is limited by its multiply-adds. A layer outside a group may instead be limited by
        the memory that it reads and writes.
        """
        alone = {members.start for members in self.groups if len(members) == 1}
        total = 0.0
        for i, operation in enumerate(self.operations):
            sizes = [4 * value.size for value in operation.maps()]
            moved = sum(sizes) / BYTES_PER_VECTOR if i in alone else 0
            work, target = operation.vector_work(), operation.target
            if operation.layer is None and isinstance(target, Map) and not operation.moves_whole():
                work = REPACK_TIME * target.channels * target.rows * target.vectors
            total += max(work, moved)
        return total

    def _read_image(self, first: Layer, grid: Grid | None) -> None:
        channels, height, width = self._size
        if grid is None:
            vectors = first.stride[1] * self._out_vectors(first, width)
            grid = Grid(vectors=vectors, rows=height, lanes=self._lanes)
        image = Map(channels=channels, height=height, width=width, grid=grid)
        self._values[INPUT] = image
        self.operations.append(Operation(kind=bindings.INPUT, source=None, target=image))

    def _out_vectors(self, layer: Layer, width: int) -> int:
        """Return the number of vectors of an output row.

        This is the smallest number that holds the output row and, times the stride, the input row.
        A slightly larger number is returned if a reader then need not repack the row.
        """
        stride = layer.stride[1]
        least = max(-(-_width(layer, width) // self._lanes), -(-width // (stride * self._lanes)))
        wish = self._wishes.get(layer.name, 0)
        return wish if least <= wish <= MAX_GROWTH * least else least

    def _wished_vectors(self, layers: Sequence[Layer]) -> dict[str, int]:
        """Return the number of vectors per row that suits the strided readers of each value.

        The keys are names of values. If the layers before a value keep the width, the number is
        noted for the value that sets the width.
        """
        widths = {INPUT: self._size[2]}
        wishes: dict[str, int] = {}
        makers = {layer.name: layer for layer in layers}
        for layer in layers:
            if layer.kind not in MAPS or layer.source not in widths:
                continue
            width = widths[layer.source]
            widths[layer.name] = _width(layer, width)
            if layer.kind not in WINDOWS:
                continue
            if layer.stride[1] > 1 and layer.kernel != (1, 1):
                name = self._setter(layer.source, makers, widths)
                out = -(-widths[layer.name] // self._lanes)
                wishes[name] = max(wishes.get(name, 0), layer.stride[1] * out)
        return wishes

    def _setter(self, name: str, makers: Mapping[str, Layer], widths: Mapping[str, int]) -> str:
        """Return the name of the value that sets the number of vectors per row of `name`.

        This is `name` itself if the additional vectors of the layers before cost more than a
        repacking.
        """
        first, connections = name, 0
        while (maker := makers.get(first)) is not None and maker.residual is None:
            if maker.kind == "max_pool" or widths[maker.source] != widths[first]:
                return first
            connections += maker.num_active
            if (MAX_GROWTH - 1) * connections > self._lanes * makers[name].channels:
                break
            first = maker.source
        return name

    def _add(self, layer: Layer) -> None:
        source = self._values[layer.source]
        if layer.kind in WINDOWS:
            self._add_window(layer)
            return
        if layer.kind == "scale":
            self._add_scale(layer)
            return
        if layer.kind in MAPS and isinstance(source, Map):
            self._add_map(layer, source)
            return
        target = Vector(channels=layer.channels, lanes=self._lanes)
        kind = bindings.MEAN_POOL
        if layer.kind == "linear":
            assert layer.weight is not None
            sparse = layer.groups > 1 or layer.num_active < LINEAR_DENSITY * layer.weight.size
            kind = bindings.SPARSE_LINEAR if sparse else bindings.DENSE_LINEAR
        elif layer.kind == "layer_norm":
            kind = bindings.VECTOR_NORM
        elif layer.kind == "token":
            kind = bindings.TOKEN
        self._values[layer.name] = target
        self.operations.append(Operation(kind=kind, source=source, target=target, layer=layer))

    def _add_map(self, layer: Layer, source: Map) -> None:
        """Add an operation on maps without a window."""
        height, width = _sizes(layer, (source.height, source.width))
        grid = source.grid
        if (height, width) != (source.height, source.width):
            vectors = -(-width // self._lanes)
            grid = Grid(vectors=vectors, rows=height, lanes=self._lanes)
        target = Map(channels=layer.channels, height=height, width=width, grid=grid)
        self._values[layer.name] = target
        kind = {
            "layer_norm": bindings.LAYER_NORM,
            "tokens": bindings.TOKENS,
            "attention": bindings.ATTENTION,
        }[layer.kind]
        self.operations.append(Operation(kind=kind, source=source, target=target, layer=layer))
        if layer.kind == "attention":
            self._borderless.add(id(target))

    def _add_scale(self, layer: Layer) -> None:
        source = self._map_of(layer.source)
        factor = self._values[layer.factor or ""]
        assert isinstance(factor, Vector)
        target = Map(
            channels=source.channels, height=source.height, width=source.width, grid=source.grid
        )
        self._values[layer.name] = target
        self.operations.append(
            Operation(kind=bindings.SCALE, source=source, target=target, factor=factor, layer=layer)
        )

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
            # The repacking keeps only the pixels that are read, so that they become neighbors.
            source = self._repack(source, grid, (sy, sx))
            sy = sx = 1
        elif not source.grid.fits(grid.scaled((sy, sx))):
            source = self._repack(source, grid.scaled((sy, sx)), (1, 1))
        target = Map(channels=layer.channels, height=height, width=width, grid=grid)
        borders = {
            "halo": max(px, reach(source.vectors, grid.vectors, kw, sx, px, dx)),
            "top": py,
            "bottom": reach(source.rows, grid.rows, kh, sy, py, dy),
        }
        if id(source) in self._borderless and any(borders.values()):
            source = self._repack(source, source.grid, (1, 1))
        source.require(**borders)
        residual = None
        if layer.residual is not None:
            residual = self._map_of(layer.residual)
            if not residual.grid.fits(grid):
                residual = self._repack(residual, grid, (1, 1))
        self._values[layer.name] = target
        kind = bindings.SPARSE_CONV if layer.kind == "conv" else bindings.MAX_POOL
        operation = Operation(
            kind=kind,
            source=source,
            target=target,
            residual=residual,
            layer=layer,
            stride=(sy, sx),
        )
        self.operations.append(operation)

    def _grid(self, layer: Layer, source: Map, height: int, width: int) -> Grid:
        """Return the grid of a layer's output, with the bands of its input if the stride allows."""
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
        # Rows beyond a band can be copied from the next band only, and not from farther ones.
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
            self.operations.append(
                Operation(kind=bindings.REPACK, source=source, target=target, stride=stride)
            )
        return self._repacked[key]

    def _finish(self) -> None:
        """Let the last value be written to the memory of the logits."""
        last = self.operations[-1].target
        assert last is not None
        if isinstance(last, Map):
            self.out_shape: tuple[int, ...] = (last.channels, last.height, last.width)
            self.operations.append(Operation(kind=bindings.OUTPUT, source=last, target=None))
        else:
            self.out_shape = (last.channels,)
            self.operations[-1].target = None


def arrange(layers: Sequence[Layer], size: tuple[int, int, int], *, lanes: int) -> Arrangement:
    """Return the fastest arrangement by estimate: with several bands if they save enough time.

    Args and errors are those of `Arrangement`.
    """
    plain = Arrangement(layers, size, lanes=lanes)
    grids = banded_grids(size[1], size[2], lanes=lanes)
    banded = [Arrangement(layers, size, lanes=lanes, grid=grid) for grid in grids]
    best = min(banded, key=Arrangement.estimated_time, default=plain)
    return best if best.estimated_time() <= MAX_TIME * plain.estimated_time() else plain


def banded_grids(height: int, width: int, *, lanes: int) -> list[Grid]:
    """Return the grids of several bands that an image fills, and its maps after strided layers."""
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
    """Return the width of the output of a layer whose value is a map."""
    return _sizes(layer, (1, width))[1]


def _sizes(layer: Layer, size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of the output of a layer whose value is a map."""
    if layer.kind == "tokens":
        return layer.size
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


def _size(value: Map) -> tuple[int, int]:
    return value.height, value.width
