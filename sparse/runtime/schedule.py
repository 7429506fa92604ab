"""The order of execution: layers one after the other, or a few rows of several layers in turn.

Activations of high resolution are larger than a core's cache. Where the weights of successive
layers fit the cache together, and are few enough to wait for activations, the layers form a group,
and a few rows go through the whole group before the next rows: what a layer writes is read while it
is still near. With bands, whose first rows border on the last of others, a layer begins with its
last rows.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sparse.runtime.layout import Map, Value
from sparse.runtime.lower import Layer

GROUP_SHARE = 1 / 5  # of a core's cache: weights of a group
CHUNK_SHARE = 1 / 2  # of it: activations of a group that are in use at a time
MAX_CHUNK_BYTES = 256 * 1024
MAX_WORK = 0.3  # multiply-adds of vectors per byte of activations, beyond which they do not wait
MIN_CHUNK_VECTORS = 7  # per channel of the last member: less does not fill a tile


@functools.cache
def core_cache() -> int:
    """Return the bytes of a core's second-level cache, 512 KiB where Linux does not say."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text()
        return 1024 * int(size.strip().removesuffix("K"))
    except (OSError, ValueError):
        return 512 * 1024


class Stage(Protocol):
    """What scheduling needs to know of a step of a plan."""

    source: Value | None
    target: Value | None
    residual: Map | None
    layer: Layer | None
    stride: tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """Output rows begin .. end - 1 of a step; channels of a step that has no rows."""

    step: int
    begin: int
    end: int


def group(steps: Sequence[Stage]) -> list[range]:
    """Return the steps in groups that are executed in turn.

    A group ends where one value alone is read later on, as at the end of a residual block, so that
    the last of its rows are all that others wait for. Successive blocks share a group as long as
    their weights are small together; one with larger weights is executed step by step.
    """
    groups: list[range] = []
    most = int(GROUP_SHARE * core_cache())
    full = most + 1
    open_bytes = full  # of the last group; nothing can join at first
    for block in _blocks(steps):
        size = sum(_weight_bytes(steps[i]) for i in block)
        if size > most or not _gains(steps, block):
            groups += [range(i, i + 1) for i in block]
            open_bytes = full
        elif open_bytes + size <= most and _is_shallow(steps, groups[-1].start, block.stop):
            groups[-1] = range(groups[-1].start, block.stop)
            open_bytes += size
        else:
            groups.append(block)
            open_bytes = size
    return groups


def _gains(steps: Sequence[Stage], block: range) -> bool:
    """Tell whether a block can be executed row by row, and waits for activations if it is not."""
    if not all(_by_rows(steps[i]) for i in block):
        return False
    sizes = [4 * value.size for i in block for value in maps_of(steps[i])]
    work = sum(work_of(steps[i]) for i in block)
    return max(sizes) > core_cache() and work <= MAX_WORK * sum(sizes)


def maps_of(step: Stage) -> list[Map]:
    """Return the maps that a step reads and writes."""
    values = (step.source, step.residual, step.target)
    return [value for value in values if isinstance(value, Map)]


def work_of(step: Stage) -> int:
    """Return the multiply-adds of vectors of a step."""
    target = step.target
    vectors = target.rows * target.vectors if isinstance(target, Map) else 1
    return step.layer.num_active * vectors if step.layer is not None else 0


def _is_shallow(steps: Sequence[Stage], begin: int, end: int) -> bool:
    """Tell whether the least chunk of a group is small: one of many layers needs many rows."""
    least, row_bytes = _chunk_size(steps, range(begin, end))
    return least * row_bytes <= _chunk_limit()


def _blocks(steps: Sequence[Stage]) -> list[range]:
    """Return the shortest runs of steps that leave a single value to later ones."""
    last_use = {id(v): i for i, s in enumerate(steps) for v in (s.source, s.residual) if v}
    blocks, start, alive = [], 0, set[int]()
    for i, step in enumerate(steps):
        alive = {value for value in alive | {id(step.target)} if last_use.get(value, -1) > i}
        if len(alive) <= 1:
            blocks.append(range(start, i + 1))
            start = i + 1
    return blocks


def _chunk_limit() -> float:
    return min(CHUNK_SHARE * core_cache(), MAX_CHUNK_BYTES)


def _chunk_size(steps: Sequence[Stage], members: range) -> tuple[int, float]:
    """Return the least rows of the last member of a chunk, and the bytes of one in all members."""
    last = steps[members[-1]].target
    assert isinstance(last, Map)
    row_bytes = 0.0  # that one row of the last member needs of all members
    for i in members:
        target = steps[i].target
        assert isinstance(target, Map)
        if steps[i].residual is None:  # else it mostly takes the place of its residual
            row_bytes += 4 * target.row * target.rows / last.rows
    # All of them may be sums.
    return -(-MIN_CHUNK_VECTORS // last.vectors), row_bytes or 4 * last.row


def schedule(steps: Sequence[Stage], groups: Sequence[range]) -> list[Piece]:
    """Return the pieces of all steps in an order in which everything is computed before it is read.

    Every row of every step is in exactly one piece, and the pieces of a step are in order.
    """
    return [piece for members in groups for piece in _pieces(steps, members)]


def _pieces(steps: Sequence[Stage], members: range) -> list[Piece]:
    if len(members) == 1:
        return [Piece(members[0], 0, num_rows(steps[members[0]]))]
    least, row_bytes = _chunk_size(steps, members)
    chunk = max(least, int(_chunk_limit() / row_bytes))
    rows = num_rows(steps[members[-1]])
    first = _first_rows(steps, members)
    done = dict(first)
    pieces = []
    for goal in range(chunk, rows + chunk, chunk):
        need = _needs(steps, members, first, min(goal, rows))
        for i in members:
            pieces += _cyclic(i, done[i], need[i], num_rows(steps[i]))
            done[i] = need[i]
    return pieces


def _cyclic(step: int, begin: int, end: int, rows: int) -> list[Piece]:
    """Return the pieces of rows begin .. end - 1, of which -1 is the last."""
    cut = [Piece(step, begin + rows, min(end, 0) + rows), Piece(step, max(begin, 0), end)]
    return [piece for piece in cut if piece.begin < piece.end <= rows]


def _first_rows(steps: Sequence[Stage], members: range) -> dict[int, int]:
    """Return the row with which each member begins: a band's first rows need another's last."""
    first = dict.fromkeys(members, 0)
    for j in reversed(members):
        for i in range(members.start, j):
            if read := rows_read(steps[j], steps[i].target, first[j], first[j] + 1):
                first[i] = max(min(first[i], read.start), -num_rows(steps[i]))
    return first


def _needs(
    steps: Sequence[Stage], members: range, first: Mapping[int, int], goal: int
) -> dict[int, int]:
    """Return the end of the rows of each member that are read, directly or not, for the last's.

    The last chunk asks for all rows, so that nothing is left for readers outside the group.
    """
    most = {i: first[i] + num_rows(steps[i]) for i in members}
    if goal == num_rows(steps[members[-1]]):
        return most
    need = dict(first)
    need[members[-1]] = goal
    for j in reversed(members):
        for i in range(members.start, j):
            if read := rows_read(steps[j], steps[i].target, first[j], need[j]):
                need[i] = max(need[i], min(read.stop, most[i]))
    return need


def rows_read(step: Stage, value: Value | None, begin: int, end: int) -> range:
    """Return the rows of `value` that a step reads for its rows begin .. end - 1.

    With bands, rows before the first are the last of a band, and those after the last the first.
    """
    if begin >= end or not isinstance(value, Map):
        return range(0)
    if value is step.source and _reads_all(step):
        return range(value.rows)
    read = range(begin, end) if value is step.residual else range(0)
    if value is step.source:
        layer = step.layer
        kernel, padding, dilation = (1, 0, 1)
        if layer is not None:
            kernel, padding, dilation = layer.kernel[0], layer.padding[0], layer.dilation[0]
        start = begin * step.stride[0] - padding
        stop = (end - 1) * step.stride[0] - padding + (kernel - 1) * dilation + 1
        read = range(min(read.start, start), max(read.stop, stop)) if read else range(start, stop)
    if value.grid.bands > 1:
        return read
    return range(max(read.start, 0), min(read.stop, value.rows))


def may_overwrite(steps: Sequence[Stage], pieces: Sequence[Piece], writer: int) -> bool:
    """Tell whether a step may write its sum over its residual, row by row.

    It may if no other step reads a row of the residual after it was overwritten.
    """
    value = steps[writer].residual
    assert value is not None
    written: set[int] = set()
    for piece in pieces:
        if piece.step == writer:
            written.update(range(piece.begin, piece.end))
        else:
            read = rows_read(steps[piece.step], value, piece.begin, piece.end)
            if any(y % value.rows in written for y in read):
                return False
    return True


def num_rows(step: Stage) -> int:
    """Return the rows of a step's output, or its channels if it has none."""
    if isinstance(step.target, Map):
        return step.target.rows
    if step.layer is not None:
        return step.layer.channels
    assert isinstance(step.source, Map)
    return step.source.rows


def _reads_all(step: Stage) -> bool:
    """Tell whether any rows of a step's output need all of its input, as where bands change.

    Bands of other rows begin with other rows of the image.
    """
    source, target = step.source, step.target
    if not (isinstance(source, Map) and isinstance(target, Map)):
        return True
    if source.grid.bands != target.grid.bands:
        return True
    return source.grid.bands > 1 and source.rows != target.rows * step.stride[0]


def _by_rows(step: Stage) -> bool:
    return isinstance(step.target, Map) and (step.source is None or not _reads_all(step))


def _weight_bytes(step: Stage) -> int:
    if step.layer is None or step.layer.weight is None:
        return 0
    return min(8 * step.layer.num_active, 4 * step.layer.weight.size)
