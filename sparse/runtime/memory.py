"""Give the values of a network a place in memory, and limit how much memory they take."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from .execution_order import Piece, may_overwrite
from .layout import Value
from .operation import Operation

CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@functools.cache
def limit() -> int:
    """Return the bytes that a network may take: half the memory of the machine or container."""
    try:
        sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, OSError, ValueError):
        sizes = [8 * 2**30]  # if the system does not tell
    for path in CGROUPS:
        try:
            sizes.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no control group, or "max"
            continue
    return min(sizes) // 2


class Arena:
    """Gives values a place. Only values of the same key reuse a place."""

    def __init__(self) -> None:
        self.size = 0
        self._free: dict[tuple[object, ...], list[int]] = {}

    def place(self, value: Value) -> None:
        """Set the position of a value."""
        free = self._free.get(value.key)
        if free:
            value.position = free.pop()
        else:
            value.position = self.size + value.start
            self.size += value.size

    def release(self, value: Value) -> None:
        """Free the place of a value for other values."""
        self._free.setdefault(value.key, []).append(value.position)


def place(operations: Sequence[Operation], groups: Sequence[range], pieces: Sequence[Piece]) -> int:
    """Give every value its place; inside a group only residuals are overwritten.

    Returns:
        The number of floats that all values take.
    """
    last_use: dict[int, int] = {}
    for i, operation in enumerate(operations):
        for value in operation.inputs():
            last_use[id(value.root)] = i
    arena = Arena()
    placed = set[int]()
    for members in groups:
        dead: dict[int, Value] = {}
        for i in members:
            operation = operations[i]
            for value in operation.inputs():
                if last_use[id(value.root)] == i:
                    dead[id(value.root)] = value.root
            if operation.target is None or id(operation.target.root) in placed:
                continue
            placed.add(id(operation.target.root))
            if _sums_in_place(operations, pieces, i, dead):
                assert operation.residual is not None
                operation.target.position = operation.residual.position
                del dead[id(operation.residual)]
            else:
                arena.place(operation.target.root)
        for value in dead.values():
            arena.release(value)
    return arena.size


def _sums_in_place(
    operations: Sequence[Operation], pieces: Sequence[Piece], i: int, dead: Mapping[int, Value]
) -> bool:
    """Tell whether a sum can overwrite its residual: each tile reads it before it writes."""
    operation = operations[i]
    residual, target = operation.residual, operation.target
    return (
        residual is not None
        and target is not None
        and residual.root is residual
        and target.root is target
        and not residual.overlaps(operation.source)
        and id(residual) in dead
        and residual.key == target.key
        and may_overwrite(operations, pieces, i)
    )
