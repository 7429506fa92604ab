"""Decide how every value of a network lies in vectors, and in which order layers are computed."""

from collections.abc import Mapping, Sequence

from . import bindings
from .execution_order import fuse, order_pieces
from .graph import INPUT, VECTORS
from .layout import Grid, Map, Value, Vector, best_grid, out_size, reach
from .lower import Layer
from .memory import place
from .operation import Operation
from .sized import layer_size

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
        self._flattened: dict[int, Vector] = {}
        self._places = places_in_concats(layers, size[0])
        self._channels = {layer.name: layer.channels for layer in layers}
        self._wholes: dict[str, Map] = {}
        quantize = layers[0] if layers[0].name == INPUT else None
        layers = layers[1:] if quantize else layers
        self._wishes = self._wished_vectors(layers)
        self._read_image(quantize, layers[0], grid)
        for layer in layers:
            self._add(layer)
        self._finish(layers[-1].name)
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

    def _read_image(self, quantize: Layer | None, first: Layer, grid: Grid | None) -> None:
        channels, height, width = self._size
        if grid is None:
            vectors = first.stride[1] * self._out_vectors(first, width)
            grid = Grid(vectors=vectors, rows=height, lanes=self._lanes)
        image = Map(channels=channels, height=height, width=width, grid=grid)
        kind = bindings.INPUT
        if quantize is not None:
            image = _map(quantize, height, width, grid)
            kind = bindings.QUANT_INPUT
        self._values[INPUT] = image
        self.operations.append(Operation(kind=kind, source=None, target=image, layer=quantize))

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
            if layer.kind in VECTORS or layer.source not in widths:
                continue
            width = widths[layer.source]
            widths[layer.name] = _width(layer, width)
            if layer.kind not in _WINDOWS:
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
            if (
                maker.kind not in ("conv", "scale", "quantize")
                or widths[maker.source] != widths[first]
            ):
                return first
            connections += maker.num_active
            if (MAX_GROWTH - 1) * connections > self._lanes * makers[name].channels:
                break
            first = maker.source
        return name

    def _add(self, layer: Layer) -> None:
        if layer.kind in _WINDOWS:
            self._add_window(layer)
            return
        if layer.kind in _REGROUPING:
            _REGROUPING[layer.kind](self, layer)
            return
        source = self._values[layer.source]
        if layer.kind in _MAP_KINDS and isinstance(source, Map):
            self._add_map(layer, source)
            return
        if layer.kind == "linear" and isinstance(source, Map):
            source = self._flatten(source)
        target = Vector(channels=layer.channels, lanes=self._lanes)
        kind = bindings.MEAN_POOL
        if layer.integers is not None:
            kind = _INT8_VECTORS[layer.kind]
        elif layer.kind == "linear":
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
        """Add a layer of a map that has no window."""
        height, width = layer_size(layer, (source.height, source.width))
        grid = source.grid
        if (height, width) != (source.height, source.width):
            vectors = -(-width // self._lanes)
            grid = Grid(vectors=vectors, rows=height, lanes=self._lanes)
        target = self._target(layer, height, width, grid)
        if layer.kind == "attention":  # nobody fills its borders, so it has its own memory
            target = _map(layer, height, width, grid)
            self._borderless.add(id(target))
        kind = _MAP_KINDS[layer.kind]
        self._compute(Operation(kind=kind, source=source, target=target, layer=layer))

    def _add_scale(self, layer: Layer) -> None:
        source = self._map_of(layer.source)
        factor = self._values[layer.factor or ""]
        assert isinstance(factor, Vector)
        target = self._target(layer, source.height, source.width, source.grid)
        self._compute(
            Operation(kind=bindings.SCALE, source=source, target=target, factor=factor, layer=layer)
        )

    def _add_shuffle(self, layer: Layer) -> None:
        source = self._map_of(layer.source)
        target = self._target(layer, source.height, source.width, source.grid)
        self._compute(Operation(kind=bindings.REPACK, source=source, target=target, layer=layer))

    def _add_slice(self, layer: Layer) -> None:
        source = self._map_of(layer.source)
        height, width = layer.output
        grid = self._grid(layer, source, height, width)
        target = self._target(layer, height, width, grid)
        stride = layer.stride
        self._compute(
            Operation(
                kind=bindings.REPACK, source=source, target=target, layer=layer, stride=stride
            )
        )

    def _add_chunk(self, layer: Layer) -> None:
        source = self._map_of(layer.source)
        self._values[layer.name] = source.part(layer.index * layer.channels, layer.channels)

    def _add_concat(self, layer: Layer) -> None:
        """Copy the parts that have not been written into the whole."""
        whole, first = self._places[layer.name]
        for name in layer.parts:
            value = self._map_of(name)
            if self._places.get(name) != (whole, first):
                place = self._place(whole, first, value)
                self.operations.append(Operation(kind=bindings.REPACK, source=value, target=place))
            first += value.channels
        first = self._places[layer.name][1]
        self._values[layer.name] = self._wholes[whole].part(first, layer.channels)

    def _place(self, whole: str, first: int, like: Map) -> Map:
        """Return the channels of a concat that a value takes; the first value sets the grid."""
        if whole not in self._wholes:
            self._wholes[whole] = Map(
                channels=self._channels[whole],
                height=like.height,
                width=like.width,
                grid=like.grid,
                fill=like.fill,
            )
        return self._wholes[whole].part(first, like.channels)

    def _target(self, layer: Layer, height: int, width: int, grid: Grid) -> Map:
        """Return the map of a layer: where a concat wants it, if the grids agree."""
        target = _map(layer, height, width, grid)
        if layer.name not in self._places:
            return target
        place = self._place(*self._places[layer.name], target)
        return place if place.grid == grid else target

    def _compute(self, operation: Operation) -> None:
        """Append the operation of a layer, and what copies its value to where a concat wants it."""
        assert operation.layer is not None
        name, target = operation.layer.name, operation.target
        assert isinstance(target, Map)
        self._values[name] = target
        self.operations.append(operation)
        if name in self._places and target.root is not self._wholes[self._places[name][0]]:
            place = self._place(*self._places[name], target)
            self.operations.append(Operation(kind=bindings.REPACK, source=target, target=place))

    def _flatten(self, source: Map) -> Vector:
        """Return the pixels of a map, channel by channel."""
        if id(source) not in self._flattened:
            size = source.channels * source.height * source.width
            target = self._flattened[id(source)] = Vector(channels=size, lanes=self._lanes)
            self.operations.append(Operation(kind=bindings.OUTPUT, source=source, target=target))
        return self._flattened[id(source)]

    def _add_window(self, layer: Layer) -> None:
        source = self._map_of(layer.source)
        (kh, kw), (sy, sx), (py, px), (dy, dx) = (
            layer.kernel,
            layer.stride,
            layer.padding,
            layer.dilation,
        )
        height, width = layer_size(layer, (source.height, source.width))
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
        target = self._target(layer, height, width, grid)
        borders = {
            "halo": max(px, reach(source.vectors, grid.vectors, kw, sx, px, dx)),
            "top": py,
            "bottom": reach(source.rows, grid.rows, kh, sy, py, dy),
        }
        if id(source.root) in self._borderless and any(borders.values()):
            source = self._repack(source, source.grid, (1, 1))
        source.require(**borders)
        residual = None
        if layer.residual is not None:
            residual = self._map_of(layer.residual)
            if not residual.grid.fits(grid):
                residual = self._repack(residual, grid, (1, 1))
        kind = _WINDOWS[layer.kind][layer.integers is not None]
        operation = Operation(
            kind=kind,
            source=source,
            target=target,
            residual=residual,
            layer=layer,
            stride=(sy, sx),
        )
        self._compute(operation)

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
            target = Map(
                channels=source.channels, height=height, width=width, grid=grid, fill=source.fill
            )
            self._repacked[key] = target
            self.operations.append(
                Operation(kind=bindings.REPACK, source=source, target=target, stride=stride)
            )
        return self._repacked[key]

    def _finish(self, name: str) -> None:
        """Let the last value be written to the memory of the logits."""
        last = self._values[name]
        if isinstance(last, Map):
            self.out_shape: tuple[int, ...] = (last.channels, last.height, last.width)
            self.operations.append(Operation(kind=bindings.OUTPUT, source=last, target=None))
        else:
            self.out_shape = (last.channels,)
            self.operations[-1].target = None


_WINDOWS = {
    "conv": (bindings.SPARSE_CONV, bindings.QUANT_CONV),
    "max_pool": (bindings.MAX_POOL, bindings.QUANT_MAX_POOL),
}
_INT8_VECTORS = {
    "linear": bindings.QUANT_LINEAR,
    "mean_pool": bindings.QUANT_MEAN_POOL,
    "lookup": bindings.QUANT_LOOKUP,
    "quantize": bindings.QUANTIZE_VECTOR,
}
# Layers without a window whose value is a map, if they read one.
_MAP_KINDS = {
    "lookup": bindings.QUANT_LOOKUP,
    "quantize": bindings.QUANTIZE,
    "layer_norm": bindings.LAYER_NORM,
    "tokens": bindings.TOKENS,
    "attention": bindings.ATTENTION,
}
_REGROUPING = {
    "scale": Arrangement._add_scale,
    "shuffle": Arrangement._add_shuffle,
    "chunk": Arrangement._add_chunk,
    "slice": Arrangement._add_slice,
    "concat": Arrangement._add_concat,
}


def places_in_concats(layers: Sequence[Layer], in_channels: int) -> dict[str, tuple[str, int]]:
    """Return where values lie that concats join: the concat that is the whole, and the channel.

    A value has one place only. Where other concats join the same values in the same order, as in
    DenseNet, they are ranges of the channels of the longest one.
    """
    channels = {INPUT: in_channels} | {layer.name: layer.channels for layer in layers}
    has_memory = {layer.name for layer in layers if layer.kind != "chunk"}
    places: dict[str, tuple[str, int]] = {}
    concats = [layer for layer in layers if layer.kind == "concat"]
    # A concat comes before those that are parts of it.
    for layer in sorted(concats, key=lambda concat: -concat.channels):
        whole, start = places.get(layer.parts[0], (layer.name, 0))
        wanted = dict(zip(layer.parts, _starts(layer, channels, start), strict=True))
        if layer.name not in places and all(
            places.get(name) == (whole, first) for name, first in wanted.items()
        ):
            places[layer.name] = whole, start
            continue
        whole, start = places.setdefault(layer.name, (layer.name, 0))
        for name, first in zip(layer.parts, _starts(layer, channels, start), strict=True):
            if name in has_memory and name not in places:
                places[name] = whole, first
    return places


def _starts(concat: Layer, channels: Mapping[str, int], start: int) -> list[int]:
    """Return the first channel of each part."""
    sizes = [channels[name] for name in concat.parts]
    return [start + sum(sizes[:i]) for i in range(len(sizes))]


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
    return layer_size(layer, (1, width))[1]


def _map(layer: Layer, height: int, width: int, grid: Grid) -> Map:
    """Return the map of a layer's value."""
    fill = 0 if layer.integers is None else layer.integers.zero_point
    return Map(channels=layer.channels, height=height, width=width, grid=grid, fill=fill)


def _size(value: Map) -> tuple[int, int]:
    return value.height, value.width
