"""Plan files: a network with all tables of one execution plan, for programs without Python.

cpp/plan.cpp reads and checks them, and describes the format. docs/embedding.md shows their use.
"""

import hashlib
import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..native.library import LEVELS, check_known, cpu_level, default_cache, family, num_registers
from . import bindings
from .arrays import Array
from .execution_plan import ExecutionPlan
from .format import Compact, read, write_whole
from .header import MAX_IMAGE_SIZE
from .network import layers_of, size_check
from .tune import Tuner

VERSION = 4
"""kPlanVersion of op.h."""
MAX_THREADS = 1024
Size = tuple[int, int, int]

_MAGIC = b"SPARSEPL"
_PART = 64  # bytes to which parts and tables are aligned


def save_plan(
    source: str | Path,
    output: str | Path,
    *,
    level: str | None = None,
    image_size: int | None = None,
    threads: int = 1,
    tune: bool = True,
    cache: str | Path | None = None,
) -> bool:
    """Write the plan of a compact file for the C interface, whole or not at all.

    Args:
        source: The compact file.
        output: Replaced if it exists.
        level: One of `sparse.native.library.LEVELS`, also of another machine; by default this
            processor's best.
        image_size: Side of the images; by default that of the training.
        threads: Number of threads for which the plan is made. It runs on any number.
        tune: Measure how each layer is computed fastest, if this machine runs the level. Otherwise
            a fixed rule decides, and the same input gives the same bytes.
        cache: Directory of compiled kernels and measurements, as for `load`.

    Returns:
        Whether the plan is tuned.

    Raises:
        ValueError: An argument is out of range, or the compact file is damaged; one line.
        BuildError: The plan is to be tuned and the machine cannot compile the kernels.
    """
    level = cpu_level() if level is None else level
    check_known(level)
    if not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"threads must be 1 to {MAX_THREADS}, got {threads}")
    if image_size is not None and not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise ValueError(f"image_size must be 1 to {MAX_IMAGE_SIZE}, got {image_size}")
    compact = read(source)
    header = compact.header
    side = header.image_size if image_size is None else image_size
    size = (header.in_channels, side, side)
    plan = _plan(compact, size, lanes=LEVELS[level][0], threads=threads)
    tune = tune and level in family()[family().index(cpu_level()) :]
    if tune:
        directory = default_cache() if cache is None else Path(cache)
        Tuner(directory).tune(plan, bindings.load(level, directory))
    data = to_bytes(plan, level=level, size=size, threads=threads, mean=header.mean, std=header.std)
    write_whole(Path(output), data)
    return tune


def _plan(compact: Compact, size: Size, *, lanes: int, threads: int) -> ExecutionPlan:
    header = compact.header
    size_check(header.nodes, compact.shapes, size[0], folded=header.folded)(*size[1:])
    return ExecutionPlan(layers_of(compact), size, lanes=lanes, num_parts=threads)


def to_bytes(
    plan: ExecutionPlan,
    *,
    level: str,
    size: Size,
    threads: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> bytes:
    """Return the file of a plan.

    Args:
        plan: Made for the lanes of the level, for the images and for the threads.
        level: One of `sparse.native.library.LEVELS`.
        size: Channels, height and width of the images.
        threads: Number of threads of a call, unless who opens the plan says otherwise.
        mean: Mean of the images, per channel.
        std: Standard deviation of the images, per channel.
    """
    ops, tables = _number_tables(plan)
    pieces = np.array([(p.operation, p.begin, p.end) for p in plan.pieces], np.int64)
    file = io.BytesIO()
    file.write(bytes(_HEADER.size))
    parts = np.array(mean, "<f4"), np.array(std, "<f4"), ops, pieces
    for part in parts:
        _align(file)
        file.write(part.tobytes())
    _align(file)
    begin = file.tell() + 16 * len(tables)
    directory = []
    for table in tables:
        begin = -(-begin // _PART) * _PART
        directory.append((begin, table.nbytes))
        begin += max(table.nbytes, 1)
    file.write(np.array(directory, np.int64).tobytes())
    for table in tables:
        _align(file)
        file.write(table.tobytes() or b"\0")
    _align(file)
    content = file.getbuffer()
    out_shape = (*plan.out_shape, 1, 1)[:3]
    counts = len(ops), len(pieces), len(tables)
    _HEADER.pack_into(
        content,
        0,
        _MAGIC,
        bytes(32),
        VERSION,
        len(content),
        LEVELS[level][0],
        num_registers(level),
        8 * ops.shape[1],
        threads,
        plan.arena_size,
        *size,
        *out_shape,
        *counts,
        level.encode(),
    )
    hashed = len(_MAGIC) + 32
    content[len(_MAGIC) : hashed] = hashlib.sha256(content[hashed:]).digest()
    return bytes(content)


_HEADER = struct.Struct("<8s32s16q16s")


def _number_tables(plan: ExecutionPlan) -> tuple[Array, list[Array]]:
    """Return the tables, and the operations with 1 + the number of a table as each pointer."""
    tables = [table for operation in plan.operations for table in operation.tables]
    numbers = {table.ctypes.data: number for number, table in enumerate(tables, 1)}
    ops = np.array([np.frombuffer(bytes(o.op), np.int64) for o in plan.operations])
    pointers = ops[:, bindings.NUMBERS :]
    pointers[...] = [[numbers[p] if p else 0 for p in row] for row in pointers.tolist()]
    return ops, tables


def _align(file: io.BytesIO) -> None:
    file.write(bytes(-file.tell() % _PART))
