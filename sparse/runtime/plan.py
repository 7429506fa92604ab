"""From layers to operations of the kernels, for images of one size."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sparse.runtime import bindings, memory
from sparse.runtime.arrange import Step, arrange
from sparse.runtime.check import too_large
from sparse.runtime.layout import Map
from sparse.runtime.lower import Array, Layer
from sparse.runtime.schedule import maps_of
from sparse.runtime.tables import can_pair, dense_table, linear_table, paired_table, sparse_table

MAX_TILE = 14  # kMaxTile of conv.h
MAX_FLOATS = 2**31 - 1  # of a value: tables hold places in 4 bytes
MIN_TILE = 4  # vectors: fewer sums do not hide the latency of an addition
DENSE_DENSITY = 0.5  # untuned choice: at and above this, the dense kernel


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a convolution is computed: what tuning decides."""

    dense: bool = False
    tile_vectors: int = 1
    tile_rows: int = 1
    """Dense: 1, or 2 where `can_pair` of tables.py."""
    group: int = 1
    """Output channels that share the loads of their inputs: 1, 2 or 4."""
    num_blocks: int = 1
    """Blocks of connections, between which partial sums are kept."""
    panel: int = 0
    """Output channels computed together, their partial sums being kept; 0 for all."""


class Plan:
    """The operations of a network for images of one size.

    Args:
        layers: Result of `lower`.
        size: Channels, height and width of the images.
        lanes: Floats per vector of the kernels.
        num_parts: Ranges of output channels that can be computed at the same time.

    Raises:
        ValueError: An image too small for the network, or too large for the memory.
    """

    def __init__(
        self, layers: Sequence[Layer], size: tuple[int, int, int], *, lanes: int, num_parts: int = 1
    ) -> None:
        arrangement = arrange(layers, size, lanes=lanes)
        self.steps, self.pieces = arrangement.steps, arrangement.pieces
        self.arena_size, self.out_shape = arrangement.arena_size, arrangement.out_shape
        self._size, self._lanes, self._num_parts = size, lanes, num_parts
        self._check_memory()
        for step in self.steps:
            self._fill(step)

    def _check_memory(self) -> None:
        largest = max(value.size for step in self.steps for value in maps_of(step))
        if 4 * self.arena_size > memory.limit() or largest > MAX_FLOATS:
            raise too_large(*self._size[1:], 4 * self.arena_size)

    def convolutions(self) -> list[Step]:
        """Return the steps that can be tuned."""
        return [step for step in self.steps if step.kind == bindings.SPARSE_CONV]

    def operations(self) -> ctypes.Array[bindings.Op]:
        """Return the operations as an array for the kernels; the tables stay this object's."""
        return (bindings.Op * len(self.steps))(*(step.op for step in self.steps))

    def order(self) -> Array:
        """Return the pieces (step, begin, end) in the order of execution, int64."""
        return np.array([(p.step, p.begin, p.end) for p in self.pieces], np.int64)

    def create(self, kernels: bindings.Kernels, *, threads: int) -> int | None:
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
        step.op.offsets = self._keep(step, _image_places(step.target)[0])

    def _fill_output(self, step: Step) -> None:
        source = step.source
        assert isinstance(source, Map)
        step.op.rows, step.op.vectors = source.rows, source.vectors
        step.op.channels = source.channels
        step.op.width, step.op.height = source.width, source.height
        step.op.offsets = self._keep(step, _image_places(source))

    def _fill_repack(self, step: Step) -> None:
        source, target = step.source, step.target
        assert isinstance(source, Map)
        assert isinstance(target, Map)
        row, column = target.pixels()
        place = source.places(row * step.stride[0], column * step.stride[1])
        place = np.where(row < 0, -1, place)
        whole = step.moves_whole()
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
        (window_y, window_x), (pad_y, pad_x) = step.layer.kernel, step.layer.padding
        step.op.window_y, step.op.window_x = window_y, window_x
        step.op.pad_y, step.op.pad_x = pad_y, pad_x
        num_columns = (step.target.vectors - 1) * step.stride[1] + window_x
        num_rows = (step.target.rows - 1) * step.stride[0] + window_y
        columns = step.source.columns(-pad_x, num_columns)
        rows = step.source.row_numbers(-pad_y, num_rows)
        valid = np.concatenate([columns, rows]) >= 0
        step.op.offsets = self._keep(step, np.where(valid, -1, 0).astype(np.int32))
        step.op.width = num_columns

    def _fill_mean_pool(self, step: Step) -> None:
        assert isinstance(step.source, Map)
        step.op.vectors = step.source.vectors
        step.op.depth = step.source.height * step.source.width

    def _fill_linear(self, step: Step) -> None:
        assert step.layer is not None
        assert step.layer.weight is not None
        weight = step.layer.weight
        if step.kind == bindings.SPARSE_LINEAR:
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
        op.row_channel = op.counts = op.part_begin = op.part_stream = None
        op.connections = op.weights = op.offsets = None
        parts = min(self._num_parts, -(-layer.channels // 16))
        if choice.panel:
            parts = max(parts, -(-layer.channels // choice.panel))
        op.num_parts = parts
        if choice.dense:
            table_of = paired_table if choice.tile_rows == 2 else dense_table
            dense = table_of(layer, step.source, num_parts=parts)
            op.kind = bindings.DENSE_CONV
            op.tile_rows = choice.tile_rows
            op.depth = len(dense.offsets)
            if dense.counts is not None:
                op.counts = self._keep(step, dense.counts)
            op.weights = self._keep(step, dense.weights)
            op.offsets = self._keep(step, dense.offsets)
            op.part_begin = self._keep(step, dense.part_begin)
            return
        table = sparse_table(
            layer, step.source, group=choice.group, num_blocks=choice.num_blocks, num_parts=parts
        )
        op.kind = bindings.SPARSE_CONV
        op.group, op.num_blocks = choice.group, choice.num_blocks
        op.tile_vectors, op.tile_rows = choice.tile_vectors, choice.tile_rows
        op.row_channel = self._keep(step, table.row_channel)
        op.counts = self._keep(step, table.counts)
        op.part_begin = self._keep(step, table.part_begin)
        op.part_stream = self._keep(step, table.part_stream)
        op.connections = self._keep(step, table.connections)


_FILL: dict[int, Callable[[Plan, Step], None]] = {
    bindings.INPUT: Plan._fill_input,
    bindings.SPARSE_CONV: Plan._fill_conv,
    bindings.MAX_POOL: Plan._fill_max_pool,
    bindings.MEAN_POOL: Plan._fill_mean_pool,
    bindings.SPARSE_LINEAR: Plan._fill_linear,
    bindings.DENSE_LINEAR: Plan._fill_linear,
    bindings.REPACK: Plan._fill_repack,
    bindings.OUTPUT: Plan._fill_output,
}


def _image_places(value: Map) -> Array:
    """Return where in a plane of the image each lane's pixel lies, -1 outside; int32."""
    row, column = value.pixels()
    return np.where(row < 0, -1, row * value.width + column).astype(np.int32)


def _num_fixed(op: bindings.Op) -> int:
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
    return layer.num_active / layer.weight.size


def can_share(step: Step) -> bool:
    """Tell whether sparse kernels of this stride compute several output channels together."""
    return step.stride[1] == 1


def default_choice(step: Step) -> Choice:
    """Return a choice without measuring."""
    assert step.layer is not None
    if step.layer.groups == 1 and density(step.layer) >= DENSE_DENSITY:
        return dense_choices(step)[-1]
    return tiles(step, MAX_TILE)[-1]


def dense_choices(step: Step) -> list[Choice]:
    """Return the ways to compute a convolution with all its weights: by rows or pairs of rows.

    None if it has groups, which the dense kernels do not know.
    """
    assert isinstance(step.target, Map)
    assert step.layer is not None
    if step.layer.groups > 1:
        return []
    rows = (1, 2) if can_pair(step.layer, step.target.rows) else (1,)
    return [Choice(dense=True, tile_rows=count) for count in rows]


def tiles(step: Step, most: int) -> list[Choice]:
    """Return sensible tiles of at most `most` vectors of an output, smallest first.

    A tile is a whole row or a part of one, and as many rows as fit, or fewer; with a stride above 2
    one row.
    """
    target = step.target
    assert isinstance(target, Map)
    most_rows = min(target.rows, 7 if step.stride[1] <= 2 else 1)
    found = set()
    least = -(-target.vectors // min(most, 8))
    for count in (least, least + 1):
        vectors = -(-target.vectors // count)
        for rows in range(1, min(most // vectors, most_rows) + 1):
            rows = -(-target.rows // -(-target.rows // rows))  # even cuts
            found.add((vectors, rows))
    largest = max(v * r for v, r in found)
    chosen = [t for t in found if t[0] * t[1] >= min(largest, MIN_TILE)]
    chosen.sort(key=lambda t: (t[0] * t[1], t))
    return [Choice(tile_vectors=v, tile_rows=r) for v, r in chosen]
