"""The execution plan of a network: the operations of its layers, for images of one size."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from . import bindings, memory
from .arrange import arrange
from .arrays import Array
from .check import too_large
from .graph import ACTIVATIONS
from .layout import Map, Vector
from .lower import Layer
from .operation import Operation
from .sized import sized
from .tables import (
    bias_table,
    can_pair,
    dense_table,
    linear_table,
    paired_table,
    sparse_table,
    window_table,
)

MAX_TILE = 14  # kMaxTile of conv.h
MAX_FLOATS = 2**31 - 1  # size of a value: tables hold places in 4 bytes
MIN_TILE = 4  # vectors; with fewer sums the latency of an addition shows
DENSE_DENSITY = 0.5  # without tuning, the dense kernel computes layers of this density or more


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a convolution is computed. Tuning decides this."""

    dense: bool = False
    tile_vectors: int = 1
    tile_rows: int = 1
    """With `dense`: 1, or 2 if `can_pair` of tables.py allows it."""
    group: int = 1
    """Output channels that share the loads of their inputs: 1, 2 or 4."""
    num_blocks: int = 1
    """Blocks of connections. Partial sums are kept between blocks."""
    panel: int = 0
    """Output channels whose partial sums are kept at the same time; 0 for all."""


class ExecutionPlan:
    """The operations of a network for images of one size.

    Args:
        layers: Result of `lower`.
        size: Channels, height and width of the images.
        lanes: Floats per vector of the kernels.
        num_parts: Ranges of output channels that can be computed at the same time.

    Raises:
        ValueError: The images are too small for the network, or too large for the memory.
    """

    def __init__(
        self, layers: Sequence[Layer], size: tuple[int, int, int], *, lanes: int, num_parts: int = 1
    ) -> None:
        arrangement = arrange(sized(layers, size), size, lanes=lanes)
        self.operations, self.pieces = arrangement.operations, arrangement.pieces
        self.arena_size, self.out_shape = arrangement.arena_size, arrangement.out_shape
        self._size, self._lanes, self._num_parts = size, lanes, num_parts
        self._check_memory()
        for operation in self.operations:
            self._fill(operation)

    def _check_memory(self) -> None:
        largest = max(map_.root.size for operation in self.operations for map_ in operation.maps())
        scratch = max(_attention_floats(o) for o in self.operations) * self._num_parts
        num_bytes = 4 * (self.arena_size + scratch)
        if num_bytes > memory.limit() or largest > MAX_FLOATS:
            raise too_large(*self._size[1:], num_bytes)

    def convolutions(self) -> list[Operation]:
        """Return the operations that can be tuned."""
        return [
            operation
            for operation in self.operations
            if operation.kind in (bindings.SPARSE_CONV, bindings.QUANT_CONV)
        ]

    def create(self, kernels: bindings.Kernels, *, threads: int) -> int | None:
        """Return a handle of the kernels for this plan; None if memory or threads are lacking.

        The tables stay in this object, which must live as long as the handle.
        """
        ops = (bindings.Op * len(self.operations))(*(o.op for o in self.operations))
        pieces = np.array([(p.operation, p.begin, p.end) for p in self.pieces], np.int64)
        handle: int | None = kernels.create(
            ctypes.addressof(ops),
            len(ops),
            pieces.ctypes.data,
            len(pieces),
            self.arena_size,
            threads,
        )
        return handle

    def _fill(self, operation: Operation) -> None:
        op, layer, source, target = (
            operation.op,
            operation.layer,
            operation.source,
            operation.target,
        )
        op.kind = operation.kind
        op.stride_y, op.stride_x = operation.stride
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
                op.mask = self._keep(operation, mask)
            op.fill = target.fill
            if target.grid.bands == 1:
                op.fill_top, op.fill_bottom = target.pad_top, target.pad_bottom
            else:
                op.mask_row = target.vectors * target.lanes
                op.pad_top, op.pad_bottom = target.pad_top, target.pad_bottom
                op.moves = self._keep(operation, target.grid.moves())
        if layer is not None:
            op.channels = layer.channels
            if layer.activation is not None:
                op.activation = 1 + ACTIVATIONS.index(layer.activation)
            if layer.bias is not None:
                op.bias = self._keep(operation, layer.bias)
            if layer.integers is not None:
                for name in ("scales", "rescale"):
                    table = getattr(layer.integers, name)
                    if table is not None:
                        setattr(op, name, self._keep(operation, table))
        _FILL[operation.kind](self, operation)

    def _keep(self, operation: Operation, table: Array) -> int:
        table = aligned(table)
        operation.tables.append(table)
        return table.ctypes.data

    def _fill_input(self, operation: Operation) -> None:
        assert isinstance(operation.target, Map)
        _, operation.op.height, operation.op.width = self._size
        operation.op.offsets = self._keep(operation, _image_places(operation.target)[0])

    def _fill_quant_input(self, operation: Operation) -> None:
        self._fill_input(operation)
        operation.op.in_channels = self._size[0]

    def _fill_quantize(self, operation: Operation) -> None:
        if isinstance(operation.source, Vector):
            operation.op.in_channels = operation.source.channels
        else:
            operation.op.num_parts = operation.op.channels

    def _fill_lookup(self, operation: Operation) -> None:
        assert operation.layer is not None
        assert operation.layer.weight is not None
        operation.op.weights = self._keep(operation, operation.layer.weight)
        if isinstance(operation.source, Vector):  # as a map of one row
            op, size = operation.op, operation.source.size
            op.rows = op.channels = 1
            op.vectors = size // self._lanes
            op.in_row = op.in_plane = op.out_row = op.out_plane = size

    def _fill_output(self, operation: Operation) -> None:
        source = operation.source
        assert isinstance(source, Map)
        operation.op.rows, operation.op.vectors = source.rows, source.vectors
        operation.op.channels = source.channels
        operation.op.width, operation.op.height = source.width, source.height
        operation.op.offsets = self._keep(operation, _image_places(source))

    def _fill_repack(self, operation: Operation) -> None:
        source, target = operation.source, operation.target
        assert isinstance(source, Map)
        assert isinstance(target, Map)
        (row, column), (y, x), (down, right) = target.pixels(), operation.start(), operation.stride
        outside = row < 0
        row, column = y + row * down, x + column * right
        outside |= (row >= source.height) | (column >= source.width)
        place = np.where(outside, -1, source.places(row, column))
        whole = operation.moves_whole()
        if whole:  # lanes outside the image are copied too: in the source they are zero
            above = (y + np.arange(target.rows)[:, None, None] * down) * source.row
            vector = x + np.arange(target.vectors)[:, None] * right
            place = above + vector * source.lanes + np.arange(source.lanes)
        operation.op.offsets = self._keep(operation, place.astype(np.int32))
        operation.op.depth = whole
        layer = operation.layer
        if layer is not None and layer.kind == "shuffle":
            order = np.arange(layer.channels).reshape(layer.groups, -1).T.ravel()
            operation.op.row_channel = self._keep(operation, order.astype(np.int32))

    def _fill_max_pool(self, operation: Operation) -> None:
        assert isinstance(operation.source, Map)
        assert isinstance(operation.target, Map)
        assert operation.layer is not None
        (window_y, window_x), (pad_y, pad_x) = operation.layer.kernel, operation.layer.padding
        operation.op.window_y, operation.op.window_x = window_y, window_x
        operation.op.pad_y, operation.op.pad_x = pad_y, pad_x
        num_columns = (operation.target.vectors - 1) * operation.stride[1] + window_x
        num_rows = (operation.target.rows - 1) * operation.stride[0] + window_y
        columns = operation.source.columns(-pad_x, num_columns)
        rows = operation.source.row_numbers(-pad_y, num_rows)
        valid = np.concatenate([columns, rows]) >= 0
        operation.op.offsets = self._keep(operation, np.where(valid, -1, 0).astype(np.int32))
        operation.op.width = num_columns

    def _fill_scale(self, operation: Operation) -> None:
        assert operation.factor is not None
        operation.op.res = operation.factor.position

    def _fill_mean_pool(self, operation: Operation) -> None:
        assert isinstance(operation.source, Map)
        operation.op.vectors = operation.source.vectors
        operation.op.depth = operation.source.height * operation.source.width

    def _fill_layer_norm(self, operation: Operation) -> None:
        assert operation.layer is not None
        assert operation.layer.weight is not None
        op, target = operation.op, operation.target
        op.eps = operation.layer.eps
        op.weights = self._keep(operation, operation.layer.weight)
        if isinstance(target, Map) and not (target.halo or target.pad_top or target.pad_bottom):
            op.num_parts = target.vectors  # no borders need whole rows

    def _fill_tokens(self, operation: Operation) -> None:
        source, target, layer = operation.source, operation.target, operation.layer
        assert isinstance(source, Map)
        assert isinstance(target, Map)
        assert layer is not None
        assert layer.weight is not None
        row, column = target.pixels()
        number = np.where(row < 0, -1, row * target.width + column)
        added = layer.weight[:, np.maximum(number, 0)] * (number >= 0)
        first = target.height * target.width - source.height * source.width
        y, x = np.divmod(np.maximum(number - first, 0), source.width)
        place = np.where(number < first, -1, source.places(y, x))
        operation.op.weights = self._keep(operation, added.astype(np.float32))
        operation.op.offsets = self._keep(operation, place.astype(np.int32))

    def _fill_token(self, operation: Operation) -> None:
        source, layer = operation.source, operation.layer
        assert isinstance(source, Map)
        assert layer is not None
        y, x = divmod(layer.index, source.width)
        operation.op.in_ = source.position + int(source.places(np.array(y), np.array(x)))

    def _fill_attention(self, operation: Operation) -> None:
        source, target, layer = operation.source, operation.target, operation.layer
        assert isinstance(source, Map)
        assert isinstance(target, Map)
        assert layer is not None
        op, windows = operation.op, operation.windows()
        op.heads, op.score_scale = layer.heads, layer.score_scale
        op.depth = layer.channels // layer.heads
        op.num_windows, op.num_tokens = len(windows), windows.tokens
        op.offsets = self._keep(operation, window_table(windows, source, target))
        if layer.head_scale is not None:
            op.weights = self._keep(operation, layer.head_scale)
        bias = bias_table(windows, layer, lanes=self._lanes)
        if bias is not None:
            op.bias, op.counts = (self._keep(operation, table) for table in bias)

    def _fill_linear(self, operation: Operation) -> None:
        assert operation.layer is not None
        assert operation.layer.weight is not None
        weight = operation.layer.weight
        if operation.kind == bindings.SPARSE_LINEAR:
            begin, connections = linear_table(weight, groups=operation.layer.groups)
            operation.op.row_begin = self._keep(operation, begin)
            operation.op.connections = self._keep(operation, connections)
        else:
            self._fill_dense_linear(operation, weight)

    def _fill_dense_linear(self, operation: Operation, weight: Array) -> None:
        depth = -(-weight.shape[1] // self._lanes) * self._lanes
        padded = np.zeros((len(weight), depth), np.float32)
        padded[:, : weight.shape[1]] = weight
        operation.op.depth = depth
        operation.op.weights = self._keep(operation, padded)

    def _fill_quant_linear(self, operation: Operation) -> None:
        layer = operation.layer
        assert layer is not None
        assert layer.weight is not None
        operation.op.channels = len(layer.weight)
        self._fill_dense_linear(operation, layer.weight)

    def _fill_conv(self, operation: Operation) -> None:
        assert operation.layer is not None
        assert operation.layer.weight is not None
        operation.op.channels = len(operation.layer.weight)
        if operation.residual is not None:
            operation.op.res = operation.residual.position
            operation.op.res_row, operation.op.res_plane = (
                operation.residual.row,
                operation.residual.plane,
            )
        self.choose(operation, default_choice(operation))

    def choose(self, operation: Operation, choice: Choice) -> None:
        """Set how a convolution is computed."""
        assert isinstance(operation.source, Map)
        assert operation.layer is not None
        assert operation.layer.weight is not None
        op, layer = operation.op, operation.layer
        channels = len(operation.layer.weight)
        del operation.tables[_num_fixed(op) :]
        op.row_channel = op.counts = op.part_begin = op.part_stream = None
        op.connections = op.weights = op.offsets = None
        parts = min(self._num_parts, -(-channels // 16))
        if choice.panel:
            parts = max(parts, -(-channels // choice.panel))
        op.num_parts = parts
        if choice.dense:
            table_of = paired_table if choice.tile_rows == 2 else dense_table
            dense = table_of(layer, operation.source, num_parts=parts)
            op.kind = bindings.DENSE_CONV
            op.tile_rows = choice.tile_rows
            op.depth = len(dense.offsets)
            if dense.counts is not None:
                op.counts = self._keep(operation, dense.counts)
            op.weights = self._keep(operation, dense.weights)
            op.offsets = self._keep(operation, dense.offsets)
            op.part_begin = self._keep(operation, dense.part_begin)
            return
        table = sparse_table(
            layer,
            operation.source,
            group=choice.group,
            num_blocks=choice.num_blocks,
            num_parts=parts,
        )
        op.kind = operation.kind
        op.group, op.num_blocks = choice.group, choice.num_blocks
        op.tile_vectors, op.tile_rows = choice.tile_vectors, choice.tile_rows
        op.row_channel = self._keep(operation, table.row_channel)
        op.counts = self._keep(operation, table.counts)
        op.part_begin = self._keep(operation, table.part_begin)
        op.part_stream = self._keep(operation, table.part_stream)
        op.connections = self._keep(operation, table.connections)


_FILL: dict[int, Callable[[ExecutionPlan, Operation], None]] = {
    bindings.INPUT: ExecutionPlan._fill_input,
    bindings.SPARSE_CONV: ExecutionPlan._fill_conv,
    bindings.MAX_POOL: ExecutionPlan._fill_max_pool,
    bindings.MEAN_POOL: ExecutionPlan._fill_mean_pool,
    bindings.SPARSE_LINEAR: ExecutionPlan._fill_linear,
    bindings.DENSE_LINEAR: ExecutionPlan._fill_linear,
    bindings.REPACK: ExecutionPlan._fill_repack,
    bindings.SCALE: ExecutionPlan._fill_scale,
    bindings.OUTPUT: ExecutionPlan._fill_output,
    bindings.LAYER_NORM: ExecutionPlan._fill_layer_norm,
    bindings.VECTOR_NORM: ExecutionPlan._fill_layer_norm,
    bindings.TOKENS: ExecutionPlan._fill_tokens,
    bindings.TOKEN: ExecutionPlan._fill_token,
    bindings.ATTENTION: ExecutionPlan._fill_attention,
    bindings.QUANT_INPUT: ExecutionPlan._fill_quant_input,
    bindings.QUANT_CONV: ExecutionPlan._fill_conv,
    bindings.QUANT_MAX_POOL: ExecutionPlan._fill_max_pool,
    bindings.QUANT_MEAN_POOL: ExecutionPlan._fill_mean_pool,
    bindings.QUANT_LINEAR: ExecutionPlan._fill_quant_linear,
    bindings.QUANT_LOOKUP: ExecutionPlan._fill_lookup,
    bindings.QUANTIZE: ExecutionPlan._fill_quantize,
    bindings.QUANTIZE_VECTOR: ExecutionPlan._fill_quantize,
}


def _image_places(value: Map) -> Array:
    """Return the index of each lane's pixel in a plane of the image, or -1 outside it; int32."""
    row, column = value.pixels()
    return np.where(row < 0, -1, row * value.width + column).astype(np.int32)


def _attention_floats(operation: Operation) -> int:
    """Return about how many floats a thread needs for keys, values and scores of an attention."""
    if operation.kind != bindings.ATTENTION:
        return 0
    source, layer = operation.source, operation.layer
    assert isinstance(source, Map)
    assert layer is not None
    tile = 6 * source.lanes  # kDenseVectors of conv.h
    depth = layer.channels // layer.heads
    return operation.windows().tokens * (2 * depth + tile) + depth * tile


def _num_fixed(op: bindings.Op) -> int:
    """Return the number of tables of a convolution that do not depend on the choice."""
    tables = (op.mask, op.moves, op.bias, op.scales, op.rescale)
    return sum(1 for table in tables if table)


def aligned(array: Array) -> Array:
    """Return a contiguous copy that starts at a cache line, as the vectors require."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def density(layer: Layer) -> float:
    """Return the share of weights that are not zero."""
    assert layer.weight is not None
    return layer.num_active / layer.weight.size


def can_share(operation: Operation) -> bool:
    """Tell whether sparse kernels of this stride can compute several output channels together."""
    return operation.stride[1] == 1


def default_choice(operation: Operation) -> Choice:
    """Return the choice that is used without tuning."""
    assert operation.layer is not None
    dense = dense_choices(operation)
    if dense and density(operation.layer) >= DENSE_DENSITY:
        return dense[-1]
    return tiles(operation, MAX_TILE)[-1]


def dense_choices(operation: Operation) -> list[Choice]:
    """Return the choices that use all weights of a convolution: by rows, or by pairs of rows.

    The list is empty for grouped convolutions and for int8, which the dense kernels do not compute.
    """
    assert isinstance(operation.target, Map)
    assert operation.layer is not None
    if operation.layer.groups > 1 or operation.layer.integers is not None:
        return []
    rows = (1, 2) if can_pair(operation.layer, operation.target.rows) else (1,)
    return [Choice(dense=True, tile_rows=count) for count in rows]


def tiles(operation: Operation, most: int) -> list[Choice]:
    """Return sensible tiles of at most `most` vectors of an output, smallest first.

    A tile spans a row or a part of a row, and any number of rows that fits. With a stride above 2
    it has one row.
    """
    target = operation.target
    assert isinstance(target, Map)
    most_rows = min(target.rows, 7 if operation.stride[1] <= 2 else 1)
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
