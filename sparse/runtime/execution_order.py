"""The order of execution: layer after layer, or a few rows of several layers in turn.

Activations of high resolution are larger than a core's cache. A layer with few weights then mostly
waits for activations. Successive layers of this kind form a group if all of their weights fit the
cache together. A few rows go through the whole group before the next rows start, so that rows are
read while they are still in the cache.

The first rows of a band border on the last rows of another band. A layer with bands therefore
computes its last rows first.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import bindings
from .layout import Map, Value
from .operation import Operation

GROUP_SHARE = 1 / 5  # share of a core's cache for the weights of a group
CHUNK_SHARE = 1 / 2  # share of a core's cache for the activations of a group in use at a time
MAX_CHUNK_BYTES = 256 * 1024
MAX_WORK = 0.3  # multiply-adds of vectors per byte of activations: with more, layers do not wait
MIN_CHUNK_VECTORS = 7  # per channel of the last member: fewer do not fill a tile


@functools.cache
def core_cache() -> int:
    """Return the bytes of a core's second-level cache; 512 KiB if Linux does not tell."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text()
        return 1024 * int(size.strip().removesuffix("K"))
    except (OSError, ValueError):
        return 512 * 1024


@dataclass(frozen=True)
class Piece:
    """Output rows begin .. end - 1 of an operation, or channels if its output has no rows."""

    operation: int
    """Index of the operation."""
    begin: int
    end: int


def fuse(operations: Sequence[Operation]) -> list[range]:
    """Return the groups of operations, in order; many groups have a single member.

    A group ends where later operations read only one of its values, as at the end of a residual
    block. Successive blocks share a group as long as their weights together are small. A block with
    larger weights is executed one operation at a time.
    """
    groups: list[range] = []
    most = int(GROUP_SHARE * core_cache())
    full = most + 1
    open_bytes = full  # weights of the last group; at first there is no group to join
    for block in _blocks(operations):
        size = sum(_weight_bytes(operations[i]) for i in block)
        if size > most or not _gains(operations, block):
            groups += [range(i, i + 1) for i in block]
            open_bytes = full
        elif open_bytes + size <= most and _is_shallow(operations, groups[-1].start, block.stop):
            groups[-1] = range(groups[-1].start, block.stop)
            open_bytes += size
        else:
            groups.append(block)
            open_bytes = size
    return groups


def _gains(operations: Sequence[Operation], block: range) -> bool:
    """Tell whether a block can be executed row by row, and would else wait for activations."""
    if not all(_by_rows(operations[i]) for i in block):
        return False
    sizes = [4 * value.size for i in block for value in operations[i].maps()]
    work = sum(operations[i].vector_work() for i in block)
    return max(sizes) > core_cache() and work <= MAX_WORK * sum(sizes)


def _is_shallow(operations: Sequence[Operation], begin: int, end: int) -> bool:
    """Tell whether the smallest chunk of a group is small; many layers need many rows."""
    least, row_bytes = _chunk_size(operations, range(begin, end))
    return least * row_bytes <= _chunk_limit()


def _blocks(operations: Sequence[Operation]) -> list[range]:
    """Return the shortest runs of operations of which later operations read a single value."""
    last_use = {id(v.root): i for i, operation in enumerate(operations) for v in operation.inputs()}
    blocks, start, alive = [], 0, set[int]()
    for i, operation in enumerate(operations):
        written = {id(operation.target.root)} if operation.target is not None else set[int]()
        alive = {value for value in alive | written if last_use.get(value, -1) > i}
        if len(alive) <= 1:
            blocks.append(range(start, i + 1))
            start = i + 1
    return blocks


def _chunk_limit() -> float:
    return min(CHUNK_SHARE * core_cache(), MAX_CHUNK_BYTES)


def _chunk_size(operations: Sequence[Operation], members: range) -> tuple[int, float]:
    """Return the least rows of a chunk, counted in the last member, and the bytes per such row."""
    last = operations[members[-1]].target
    assert isinstance(last, Map)
    row_bytes = 0.0  # what all members store for one row of the last member
    for i in members:
        target = operations[i].target
        assert isinstance(target, Map)
        if operations[i].residual is None:  # a sum mostly overwrites its residual
            row_bytes += 4 * target.share * target.rows / last.rows
    # The number is 0 if all members are sums.
    return -(-MIN_CHUNK_VECTORS // last.vectors), row_bytes or 4 * last.share


def order_pieces(operations: Sequence[Operation], groups: Sequence[range]) -> list[Piece]:
    """Return the pieces of all operations in an order that computes every row before it is read.

    Every row of every operation is in exactly one piece, and the pieces of an operation are in
    order.
    """
    return [piece for members in groups for piece in _pieces(operations, members)]


def _pieces(operations: Sequence[Operation], members: range) -> list[Piece]:
    if len(members) == 1:
        return [Piece(members[0], 0, operations[members[0]].num_rows())]
    least, row_bytes = _chunk_size(operations, members)
    chunk = max(least, int(_chunk_limit() / row_bytes))
    rows = operations[members[-1]].num_rows()
    first = _first_rows(operations, members)
    done = dict(first)
    pieces = []
    for goal in range(chunk, rows + chunk, chunk):
        need = _needs(operations, members, first, min(goal, rows))
        for i in members:
            pieces += _cyclic(i, done[i], need[i], operations[i].num_rows())
            done[i] = need[i]
    return pieces


def _cyclic(operation: int, begin: int, end: int, rows: int) -> list[Piece]:
    """Return the pieces of rows begin .. end - 1, where row -1 is the last row."""
    cut = [Piece(operation, begin + rows, min(end, 0) + rows), Piece(operation, max(begin, 0), end)]
    return [piece for piece in cut if piece.begin < piece.end <= rows]


def _first_rows(operations: Sequence[Operation], members: range) -> dict[int, int]:
    """Return the first row of each member: negative if bands need the last rows of others."""
    first = dict.fromkeys(members, 0)
    for j in reversed(members):
        for i in range(members.start, j):
            if read := rows_read(operations[j], operations[i].target, first[j], first[j] + 1):
                first[i] = max(min(first[i], read.start), -operations[i].num_rows())
    return first


def _needs(
    operations: Sequence[Operation], members: range, first: Mapping[int, int], goal: int
) -> dict[int, int]:
    """Return the end of the rows of each member that rows before `goal` of the last member need.

    The last chunk needs all rows, because readers outside the group may read any of them.
    """
    most = {i: first[i] + operations[i].num_rows() for i in members}
    if goal == operations[members[-1]].num_rows():
        return most
    need = dict(first)
    need[members[-1]] = goal
    for j in reversed(members):
        for i in range(members.start, j):
            if read := rows_read(operations[j], operations[i].target, first[j], need[j]):
                need[i] = max(need[i], min(read.stop, most[i]))
    return need


def rows_read(operation: Operation, value: Value | None, begin: int, end: int) -> range:
    """Return the rows of `value` that an operation reads for its rows begin .. end - 1.

    With bands, rows before row 0 are the last rows of a band, and rows after the last row are the
    first rows of a band.
    """
    if begin >= end or not isinstance(value, Map):
        return range(0)
    if value.overlaps(operation.source) and _reads_all(operation):
        return range(value.rows)
    read = range(begin, end) if value.overlaps(operation.residual) else range(0)
    if value.overlaps(operation.source):
        layer = operation.layer
        kernel, padding, dilation = (1, 0, 1)
        if layer is not None:
            kernel, padding, dilation = layer.kernel[0], layer.padding[0], layer.dilation[0]
        start = begin * operation.stride[0] - padding
        stop = (end - 1) * operation.stride[0] - padding + (kernel - 1) * dilation + 1
        read = range(min(read.start, start), max(read.stop, stop)) if read else range(start, stop)
    if value.grid.bands > 1:
        return read
    if value.fill and read:  # the rows above and below are written with the first and the last one
        read = range(min(read.start, value.rows - 1), max(read.stop, 1))
    return range(max(read.start, 0), min(read.stop, value.rows))


def may_overwrite(operations: Sequence[Operation], pieces: Sequence[Piece], writer: int) -> bool:
    """Tell whether an operation may write its sum over its residual, row by row.

    It may if no other operation reads a row of the residual after the row was overwritten.
    """
    value = operations[writer].residual
    assert value is not None
    written: set[int] = set()
    for piece in pieces:
        if piece.operation == writer:
            written.update(range(piece.begin, piece.end))
        else:
            read = rows_read(operations[piece.operation], value, piece.begin, piece.end)
            if any(y % value.rows in written for y in read):
                return False
    return True


def _reads_all(operation: Operation) -> bool:
    """Tell whether every row of an operation's output needs the whole input.

    This is so if the number of bands changes, or if bands begin with other rows of the image.
    """
    source, target = operation.source, operation.target
    if not (isinstance(source, Map) and isinstance(target, Map)):
        return True
    if operation.kind in (bindings.TOKENS, bindings.ATTENTION) or operation.start() != (0, 0):
        return True
    if source.grid.bands != target.grid.bands:
        return True
    return source.grid.bands > 1 and source.rows != target.rows * operation.stride[0]


def _by_rows(operation: Operation) -> bool:
    return isinstance(operation.target, Map) and (
        operation.source is None or not _reads_all(operation)
    )


def _weight_bytes(operation: Operation) -> int:
    if operation.layer is None or operation.layer.weight is None:
        return 0
    return min(8 * operation.layer.num_active, 4 * operation.layer.weight.size)
