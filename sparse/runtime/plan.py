"""From layers to operations of the kernels, for images of one size."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sparse.runtime import native
from sparse.runtime.graph import INPUT
from sparse.runtime.layout import Arena, Grid, Map, Value, Vector, best_grid, out_size, reach
from sparse.runtime.lower import Array, Layer
from sparse.runtime.schedule import group, may_overwrite, schedule
from sparse.runtime.tables import dense_table, linear_table, sparse_table

MAX_TILE = 14  # kMaxTile of conv.h
MAX_GROWTH = 1.2  # of a row, to spare its readers a repacking
MIN_TILE = 4  # vectors: fewer sums do not hide the latency of an addition
DENSE_DENSITY = 0.5  # untuned choice: at and above this, the dense kernel
LINEAR_DENSITY = 0.3


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a convolution is computed: what tuning decides."""

    dense: bool = False
    tile_vectors: int = 1
    tile_rows: int = 1
    group: int = 1
    """Output channels that share the loads of their inputs: 1, 2 or 4."""
    num_blocks: int = 1
    """Blocks of connections, between which partial sums are kept."""
    panel: int = 0
    """Output channels computed together, their partial sums being kept; 0 for all."""


@dataclass(kw_only=True, eq=False)
class Step:
    """One operation with what it reads and writes."""

    kind: int
    source: Value | None
    target: Value | None
    residual: Map | None = None
    layer: Layer | None = None
    stride: tuple[int, int] = (1, 1)
    op: native.Op = field(default_factory=native.Op)
    tables: list[Array] = field(default_factory=list)
    """What the pointers of `op` point to."""

    def num_connections(self) -> int:
        """Return the multiply-accumulates of one image that are not with a zero weight."""
        if self.layer is None or self.layer.weight is None:
            return 0
        pixels = self.target.height * self.target.width if isinstance(self.target, Map) else 1
        return int(np.count_nonzero(self.layer.weight)) * pixels


class Plan:
    """The operations of a network for images of one size.

    Args:
        layers: Result of `lower`.
        size: Channels, height and width of the images.
        lanes: Floats per vector of the kernels.
        num_parts: Ranges of output channels that can be computed at the same time.

    Raises:
        ValueError: An image too small for the network.
    """

    def __init__(
        self, layers: Sequence[Layer], size: tuple[int, int, int], *, lanes: int, num_parts: int = 1
    ) -> None:
        self.steps: list[Step] = []
        self._size, self._lanes, self._num_parts = size, lanes, num_parts
        self._values: dict[str, Value] = {}
        self._repacked: dict[tuple[object, ...], Map] = {}
        self._wishes = self._wished(layers)
        self._read_image(layers[0])
        for layer in layers:
            self._add(layer)
        self._finish()
        groups = group(self.steps)
        self.pieces = schedule(self.steps, groups)
        self.arena_size = self._place(groups)
        for step in self.steps:
            self._fill(step)

    def convolutions(self) -> list[Step]:
        """Return the steps that can be tuned."""
        return [step for step in self.steps if step.kind == native.SPARSE_CONV]

    def operations(self) -> ctypes.Array[native.Op]:
        """Return the operations as an array for the kernels; the tables stay this object's."""
        return (native.Op * len(self.steps))(*(step.op for step in self.steps))

    # Layouts.

    def _read_image(self, first: Layer) -> None:
        channels, height, width = self._size
        stride = first.stride[1]
        vectors = stride * self._out_vectors(first, width)
        grid = Grid(vectors=vectors, rows=height, lanes=self._lanes)
        image = Map(channels=channels, height=height, width=width, grid=grid)
        self._values[INPUT] = image
        self.steps.append(Step(kind=native.INPUT, source=None, target=image))

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
            assert maker.weight is not None
            connections += int(np.count_nonzero(maker.weight))
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
        kind = native.MEAN_POOL
        if layer.kind == "linear":
            assert layer.weight is not None
            sparse = np.count_nonzero(layer.weight) < LINEAR_DENSITY * layer.weight.size
            kind = native.SPARSE_LINEAR if sparse else native.DENSE_LINEAR
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
        height = out_size(source.height, kh, sy, py, dy)
        width = _width(layer, source.width)
        if min(height, width) < 1:
            raise ValueError(
                f"images of {self._size[1]}x{self._size[2]} are too small for this network: "
                f"nothing is left after layer {layer.name}"
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
        kind = native.SPARSE_CONV if layer.kind == "conv" else native.MAX_POOL
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
        """Return the grid of a layer's output: that of its input if the size stays."""
        vectors = self._out_vectors(layer, source.width)
        if source.vectors % layer.stride[1] == 0 and source.grid.bands == 1:
            vectors = max(vectors, source.vectors // layer.stride[1])
        plain = Grid(vectors=vectors, rows=height, lanes=self._lanes)
        if layer.kind == "max_pool":
            return plain
        grid = best_grid(
            max(height, -(-source.height // layer.stride[0])),
            max(width, -(-source.width // layer.stride[1])),
            lanes=self._lanes,
            vectors=vectors,
        )
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
            self.steps.append(Step(kind=native.REPACK, source=source, target=target, stride=stride))
        return self._repacked[key]

    def _finish(self) -> None:
        """Let the last value be written where the caller wants it."""
        last = self.steps[-1].target
        assert last is not None
        if isinstance(last, Map):
            self.out_shape: tuple[int, ...] = (last.channels, last.height, last.width)
            self.steps.append(Step(kind=native.OUTPUT, source=last, target=None))
        else:
            self.out_shape = (last.channels,)
            self.steps[-1].target = None

    # Memory.

    def _place(self, groups: Sequence[range]) -> int:
        """Give every value its place; inside a group nothing but a residual is overwritten."""
        last_use: dict[int, int] = {}
        for i, step in enumerate(self.steps):
            for value in (step.source, step.residual):
                if value is not None:
                    last_use[id(value)] = i
        arena = Arena()
        for members in groups:
            dead: dict[int, Value] = {}
            for i in members:
                step = self.steps[i]
                for value in (step.source, step.residual):
                    if value is not None and last_use[id(value)] == i:
                        dead[id(value)] = value
                if step.target is None:
                    continue
                if self._sums_in_place(i, dead):
                    assert step.residual is not None
                    step.target.position = step.residual.position
                    del dead[id(step.residual)]
                else:
                    arena.place(step.target)
            for value in dead.values():
                arena.release(value)
        return arena.size

    def _sums_in_place(self, i: int, dead: Mapping[int, Value]) -> bool:
        """Tell whether a sum can take the place of what is added: a tile reads before it writes."""
        step = self.steps[i]
        residual, target = step.residual, step.target
        return (
            residual is not None
            and target is not None
            and residual is not step.source
            and id(residual) in dead
            and residual.key == target.key
            and may_overwrite(self.steps, self.pieces, i)
        )

    def order(self) -> Array:
        """Return the pieces (step, begin, end) in the order of execution, int64."""
        return np.array([(p.step, p.begin, p.end) for p in self.pieces], np.int64)

    def create(self, kernels: native.Kernels, *, threads: int) -> int | None:
        """Return the kernels' handle of this plan, None without memory or threads."""
        operations, order = self.operations(), self.order()
        handle: int | None = kernels.create(
            ctypes.addressof(operations),
            len(operations),
            order.ctypes.data,
            len(order),
            self.arena_size,
            threads,
        )
        return handle

    # Operations.

    def _fill(self, step: Step) -> None:
        op, layer, source, target = step.op, step.layer, step.source, step.target
        op.kind = step.kind
        op.stride_y, op.stride_x = step.stride
        op.res = -1
        op.num_parts = op.num_blocks = 1
        op.out = -1 if target is None else target.position
        if source is not None:
            op.in_ = source.position
        if isinstance(source, Map):
            op.in_row, op.in_plane = source.row, source.plane
            op.width, op.height, op.in_channels = source.width, source.rows, source.channels
        if isinstance(target, Map):
            op.out_row, op.out_plane, op.halo = target.row, target.plane, target.halo
            op.rows, op.vectors, op.channels = target.rows, target.vectors, target.channels
            mask = target.mask()
            if mask is not None:
                op.mask = self._keep(step, mask)
            if target.grid.bands > 1:
                op.mask_row = target.vectors * target.lanes
                op.pad_top, op.pad_bottom = target.pad_top, target.pad_bottom
                op.moves = self._keep(step, target.grid.moves())
        if layer is not None:
            op.relu, op.channels = layer.relu, layer.channels
            if layer.bias is not None:
                op.bias = self._keep(step, layer.bias)
        _FILL[step.kind](self, step)

    def _keep(self, step: Step, table: Array) -> int:
        table = aligned(table)
        step.tables.append(table)
        return table.ctypes.data

    def _fill_input(self, step: Step) -> None:
        assert isinstance(step.target, Map)
        _, step.op.height, step.op.width = self._size
        columns = step.target.columns(0, step.target.vectors)
        step.op.offsets = self._keep(step, columns.astype(np.int32))

    def _fill_output(self, step: Step) -> None:
        source = step.source
        assert isinstance(source, Map)
        step.op.rows, step.op.vectors = source.rows, source.vectors
        step.op.channels = source.channels
        row, column = source.pixels()
        place = np.where(row < 0, -1, row * source.width + column)
        step.op.width, step.op.height = source.width, source.height
        step.op.offsets = self._keep(step, place.astype(np.int32))

    def _fill_repack(self, step: Step) -> None:
        source, target = step.source, step.target
        assert isinstance(source, Map)
        assert isinstance(target, Map)
        row, column = target.pixels()
        place = source.places(row * step.stride[0], column * step.stride[1])
        place = np.where(row < 0, -1, place)
        whole = _fits(source.grid, target.grid.scaled(step.stride))
        if whole:  # lane by lane; those outside the image are zero in the source too
            y = np.arange(target.rows)[:, None, None] * step.stride[0] * source.row
            vector = np.arange(target.vectors)[:, None] * step.stride[1]
            place = y + vector * source.lanes + np.arange(source.lanes)
        step.op.offsets = self._keep(step, place.astype(np.int32))
        step.op.depth = whole

    def _fill_max_pool(self, step: Step) -> None:
        assert isinstance(step.source, Map)
        assert isinstance(step.target, Map)
        assert step.layer is not None
        window, pad = step.layer.kernel[0], step.layer.padding[0]
        step.op.depth, step.op.pad = window, pad
        count = (step.target.vectors - 1) * step.stride[1] + window
        valid = step.source.columns(-pad, count) >= 0
        step.op.offsets = self._keep(step, np.where(valid, -1, 0).astype(np.int32))

    def _fill_mean_pool(self, step: Step) -> None:
        assert isinstance(step.source, Map)
        step.op.vectors = step.source.vectors
        step.op.depth = step.source.height * step.source.width

    def _fill_linear(self, step: Step) -> None:
        assert step.layer is not None
        assert step.layer.weight is not None
        weight = step.layer.weight
        if step.kind == native.SPARSE_LINEAR:
            begin, connections = linear_table(weight)
            step.op.row_begin = self._keep(step, begin)
            step.op.connections = self._keep(step, connections)
        else:
            depth = -(-weight.shape[1] // self._lanes) * self._lanes
            padded = np.zeros((len(weight), depth), np.float32)
            padded[:, : weight.shape[1]] = weight
            step.op.depth = depth
            step.op.weights = self._keep(step, padded)

    def _fill_conv(self, step: Step) -> None:
        if step.residual is not None:
            step.op.res = step.residual.position
            step.op.res_row, step.op.res_plane = step.residual.row, step.residual.plane
        self.choose(step, default_choice(step))

    def choose(self, step: Step, choice: Choice) -> None:
        """Let a convolution be computed in another way."""
        assert isinstance(step.source, Map)
        assert step.layer is not None
        op, layer = step.op, step.layer
        del step.tables[_num_fixed(op) :]
        parts = min(self._num_parts, -(-layer.channels // 16))
        if choice.panel:
            parts = max(parts, -(-layer.channels // choice.panel))
        op.num_parts = parts
        if choice.dense:
            dense = dense_table(layer, step.source, num_parts=parts)
            op.kind = native.DENSE_CONV
            op.depth = len(dense.offsets)
            op.weights = self._keep(step, dense.weights)
            op.offsets = self._keep(step, dense.offsets)
            op.part_begin = self._keep(step, dense.part_begin)
            return
        table = sparse_table(
            layer, step.source, group=choice.group, num_blocks=choice.num_blocks, num_parts=parts
        )
        op.kind = native.SPARSE_CONV
        op.group, op.num_blocks = choice.group, choice.num_blocks
        op.tile_vectors, op.tile_rows = choice.tile_vectors, choice.tile_rows
        op.row_channel = self._keep(step, table.row_channel)
        op.counts = self._keep(step, table.counts)
        op.part_begin = self._keep(step, table.part_begin)
        op.part_stream = self._keep(step, table.part_stream)
        op.connections = self._keep(step, table.connections)


_FILL: dict[int, Callable[[Plan, Step], None]] = {
    native.INPUT: Plan._fill_input,
    native.SPARSE_CONV: Plan._fill_conv,
    native.MAX_POOL: Plan._fill_max_pool,
    native.MEAN_POOL: Plan._fill_mean_pool,
    native.SPARSE_LINEAR: Plan._fill_linear,
    native.DENSE_LINEAR: Plan._fill_linear,
    native.REPACK: Plan._fill_repack,
    native.OUTPUT: Plan._fill_output,
}


def _width(layer: Layer, width: int) -> int:
    """Return the width of the output of a convolution or pool."""
    return out_size(width, layer.kernel[1], layer.stride[1], layer.padding[1], layer.dilation[1])


def _fits(found: Grid, wanted: Grid) -> bool:
    """Tell whether a value of a grid can be used as one of another; plain rows may be missing."""
    return found == wanted or (found.bands == wanted.bands == 1 and found.vectors == wanted.vectors)


def _size(value: Map) -> tuple[int, int]:
    return value.height, value.width


def _num_fixed(op: native.Op) -> int:
    """Return the tables of a convolution that do not depend on the choice."""
    return (1 if op.mask else 0) + (1 if op.moves else 0) + (1 if op.bias else 0)


def aligned(array: Array) -> Array:
    """Return a contiguous copy that starts at a cache line, as vectors need it."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def density(layer: Layer) -> float:
    """Return the share of weights that are not zero."""
    assert layer.weight is not None
    return float(np.count_nonzero(layer.weight)) / layer.weight.size


def can_be_sparse(step: Step, group: int = 1) -> bool:
    """Tell whether there is a sparse kernel of this stride, for groups of output channels."""
    return step.stride[1] <= (2 if group == 1 else 1)


def default_choice(step: Step) -> Choice:
    """Return a choice without measuring."""
    assert isinstance(step.target, Map)
    assert step.layer is not None
    if not can_be_sparse(step) or (step.layer.groups == 1 and density(step.layer) >= DENSE_DENSITY):
        return Choice(dense=True)
    return tiles(step.target, MAX_TILE)[-1]


def tiles(target: Map, most: int) -> list[Choice]:
    """Return sensible tiles of at most `most` vectors of an output, smallest first.

    A tile is a whole row or a part of one, and as many rows as fit, or fewer.
    """
    found = set()
    least = -(-target.vectors // min(most, 8))
    for count in (least, least + 1):
        vectors = -(-target.vectors // count)
        for rows in range(1, min(most // vectors, 7, target.rows) + 1):
            rows = -(-target.rows // -(-target.rows // rows))  # even cuts
            found.add((vectors, rows))
    largest = max(v * r for v, r in found)
    chosen = [t for t in found if t[0] * t[1] >= min(largest, MIN_TILE)]
    chosen.sort(key=lambda t: (t[0] * t[1], t))
    return [Choice(tile_vectors=v, tile_rows=r) for v, r in chosen]
