"""Where the values of a network lie in memory, and how much of it they may take."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from sparse.runtime.layout import Value
from sparse.runtime.schedule import Piece, Stage, may_overwrite

CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@functools.cache
def limit() -> int:
    """Return the bytes that a network may take: half of the machine's or the container's memory."""
    try:
        sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, OSError, ValueError):
        sizes = [8 * 2**30]  # where the system does not say
    for path in CGROUPS:
        try:
            sizes.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no control group, or "max"
            continue
    return min(sizes) // 2


class Arena:
    """Gives values a place; a place is reused by values of the same key only."""

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
        """Let others have the place of a value."""
        self._free.setdefault(value.key, []).append(value.position)


def place(steps: Sequence[Stage], groups: Sequence[range], pieces: Sequence[Piece]) -> int:
    """Give every value its place; inside a group nothing but a residual is overwritten.

    Returns:
        Floats that all values take.
    """
    last_use: dict[int, int] = {}
    for i, step in enumerate(steps):
        for value in (step.source, step.residual):
            if value is not None:
                last_use[id(value)] = i
    arena = Arena()
    for members in groups:
        dead: dict[int, Value] = {}
        for i in members:
            step = steps[i]
            for value in (step.source, step.residual):
                if value is not None and last_use[id(value)] == i:
                    dead[id(value)] = value
            if step.target is None:
                continue
            if _sums_in_place(steps, pieces, i, dead):
                assert step.residual is not None
                step.target.position = step.residual.position
                del dead[id(step.residual)]
            else:
                arena.place(step.target)
        for value in dead.values():
            arena.release(value)
    return arena.size


def _sums_in_place(
    steps: Sequence[Stage], pieces: Sequence[Piece], i: int, dead: Mapping[int, Value]
) -> bool:
    """Tell whether a sum can take the place of what is added: a tile reads before it writes."""
    step = steps[i]
    residual, target = step.residual, step.target
    return (
        residual is not None
        and target is not None
        and residual is not step.source
        and id(residual) in dead
        and residual.key == target.key
        and may_overwrite(steps, pieces, i)
    )
