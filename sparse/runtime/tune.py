"""Measure how each convolution is computed fastest, and remember the result per processor."""

import ctypes
import dataclasses
import hashlib
import json
import math
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import bindings
from .execution_plan import (
    Choice,
    ExecutionPlan,
    can_share,
    dense_choices,
    density,
    tiles,
)
from .format import write_whole
from .layout import Map
from .operation import Operation

L1_BYTES = 32 * 1024  # a guess is enough, because it only limits what is measured
BLOCK_BYTES = (L1_BYTES // 2, L1_BYTES, 2 * L1_BYTES)  # input that a block of a tile reads
MIN_CONNECTIONS = 4  # per block and group of channels
PANEL = 128
CPUINFO = Path("/proc/cpuinfo")
MODEL = ("vendor_id", "cpu family", "model", "model name", "CPU implementer", "CPU part")
ROUNDS = (1, 1, 2, 2, 4, 4)
DENSE_FROM = 0.2  # the dense kernel is measured from this density on
SHARED_FROM = 0.25  # a group is measured from this product of its channels and the density on


class Tuner:
    """Measures layers, and keeps the results in a file of the cache directory.

    The runtime works without this file. Results that cannot be read, or that these kernels cannot
    compute, are measured anew. If the file cannot be written, the results last as long as the
    process.
    """

    _measured: dict[Path, dict[str, Any]] = {}
    """Results of this process, by the file to which they belong."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def tune(self, plan: ExecutionPlan, kernels: bindings.Kernels) -> None:
        """Set every convolution of a plan to its fastest choice."""
        path = self._directory / f"tuned-{kernels.path.stem}-{processor()}.json"
        known = _read(path) | self._measured.setdefault(path, {})
        chosen: dict[str, Choice] = {}
        missing = {}
        for operation in plan.convolutions():
            key = _key(operation)
            choice = _choice(known.get(key), operation, kernels)
            if choice is None:
                missing[key] = operation
            else:
                chosen[key] = choice
        if missing:
            with _Bench(plan, kernels) as bench:
                for key, operation in missing.items():
                    chosen[key] = _fastest(plan, operation, bench)
            found = {key: dataclasses.asdict(chosen[key]) for key in missing}
            self._measured[path] |= found
            self._write(path, found)
        for operation in plan.convolutions():
            plan.choose(operation, chosen[_key(operation)])

    def _write(self, path: Path, found: dict[str, Any]) -> None:
        """Add results to the file. If two processes write at once, one measures again later."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(_read(path) | found, indent=1).encode())
        except OSError as error:
            warnings.warn(
                f"every process has to measure the layers anew, {path.parent} cannot be written: "
                f"{error.strerror or error}",
                stacklevel=7,
            )


class _Bench:
    """An arena in which single operations are timed."""

    def __init__(self, plan: ExecutionPlan, kernels: bindings.Kernels) -> None:
        self._kernels = kernels
        self.max_tiles = kernels.max_tiles
        self._handle = plan.create(kernels, threads=1)
        if not self._handle:
            raise MemoryError(f"no memory for {4 * plan.arena_size} bytes")

    def __enter__(self) -> "_Bench":
        return self

    def __exit__(self, *_: object) -> None:
        self._kernels.destroy(self._handle)

    def seconds(self, op: bindings.Op, repetitions: int) -> float:
        return float(self._kernels.time(self._handle, ctypes.addressof(op), repetitions))


def _fastest(plan: ExecutionPlan, operation: Operation, bench: _Bench) -> Choice:
    """Return the fastest choice. The candidates are timed in turn, over several rounds.

    Later rounds keep only the faster half, then the fastest quarter. A disturbance thus hits all
    candidates alike, and the smallest of several times is free of it.
    """
    tried: dict[Choice, tuple[bindings.Op, list[Any]]] = {}
    tabled: tuple[int, ...] | None = None  # for which the tables were made
    for choice in sorted(_candidates(operation, bench.max_tiles), key=_tables_of):
        if _tables_of(choice) != tabled:
            tabled = _tables_of(choice)
            plan.choose(operation, choice)
        op = bindings.Op.from_buffer_copy(operation.op)
        op.tile_vectors, op.tile_rows = choice.tile_vectors, choice.tile_rows
        tried[choice] = (op, list(operation.tables))
    seconds = dict.fromkeys(tried, math.inf)
    for repetitions in ROUNDS:
        for choice in sorted(seconds, key=lambda c: seconds[c])[: -(-len(tried) // repetitions)]:
            least = bench.seconds(tried[choice][0], repetitions)
            seconds[choice] = min(seconds[choice], least)
    return min(seconds, key=lambda c: seconds[c])


def _tables_of(choice: Choice) -> tuple[int, ...]:
    if choice.dense:
        return (choice.tile_rows,)
    return (0, choice.group, choice.num_blocks, choice.panel)


def _candidates(operation: Operation, max_tiles: Mapping[int, int]) -> list[Choice]:
    assert operation.layer is not None
    assert operation.layer.weight is not None
    channels = len(operation.layer.weight)
    found = [
        dataclasses.replace(tile, group=group, num_blocks=count, panel=panel)
        for group, most in max_tiles.items()
        if group == 1 or (can_share(operation) and density(operation.layer) * group >= SHARED_FROM)
        for tile in tiles(operation, most)
        for count in _num_blocks(operation, tile, group)
        for panel in ((0, PANEL) if count > 1 and channels > 2 * PANEL else (0,))
    ]
    if density(operation.layer) >= DENSE_FROM:
        found += dense_choices(operation)
    return found


def _choice(known: Any, operation: Operation, kernels: bindings.Kernels) -> Choice | None:
    """Return a remembered choice if the kernels can compute the operation so, else None."""
    names = {field.name for field in dataclasses.fields(Choice)}
    if not isinstance(known, dict) or known.keys() != names:
        return None
    if type(known["dense"]) is not bool or not all(
        type(value) is int for name, value in known.items() if name != "dense"
    ):
        return None
    choice = Choice(**known)
    if choice.dense:
        return choice if choice in dense_choices(operation) else None
    tile = Choice(tile_vectors=choice.tile_vectors, tile_rows=choice.tile_rows)
    if choice.group not in (kernels.max_tiles if can_share(operation) else (1,)):
        return None
    if tile not in tiles(operation, kernels.max_tiles[choice.group]):
        return None
    fits = choice.num_blocks in _block_counts(operation, tile) and choice.panel in (0, PANEL)
    return choice if fits else None


def _num_blocks(operation: Operation, tile: Choice, group: int) -> list[int]:
    """Return the numbers of blocks with enough connections in each block."""
    layer = operation.layer
    assert layer is not None
    assert layer.weight is not None
    most = group * layer.num_active / len(layer.weight) / MIN_CONNECTIONS
    return sorted(count for count in _block_counts(operation, tile) if count == 1 or count <= most)


def _block_counts(operation: Operation, tile: Choice) -> set[int]:
    """Return numbers of blocks whose part of a tile's input about fits the first-level cache."""
    assert isinstance(operation.source, Map)
    layer = operation.layer
    assert layer is not None
    if layer.groups > 1:
        return {1}
    rows = (tile.tile_rows - 1) * operation.stride[0] + layer.kernel[0]
    vectors = (
        min(tile.tile_vectors * operation.stride[1], operation.source.vectors) + layer.kernel[1] - 1
    )
    size = 4 * rows * vectors * operation.source.lanes * operation.source.channels
    return {1} | {-(-size // block) for block in BLOCK_BYTES}


def _key(operation: Operation) -> str:
    """Return a name of everything on which the speed of a convolution depends."""
    layer, source, target = operation.layer, operation.source, operation.target
    assert layer is not None
    assert layer.weight is not None
    assert isinstance(source, Map)
    assert isinstance(target, Map)
    precision = "" if layer.integers is None else " int8"
    if layer.integers is not None and layer.integers.rescale is None:
        precision = " int8 to float32"
    return (
        f"{'x'.join(map(str, layer.weight.shape))} groups {layer.groups} stride {operation.stride} "
        f"dilation {layer.dilation} in {source.vectors}+{source.halo} "
        f"out {target.rows}x{target.vectors} add {operation.residual is not None} "
        f"density {density(layer):.2g}{precision}"
    )


def processor() -> str:
    """Return a digest of the processor's model. Containers and nodes of a cluster share it."""
    try:
        lines = CPUINFO.read_text().partition("\n\n")[0].splitlines()
    except OSError:
        lines = []
    fields = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    models = [fields[name] for name in MODEL if name in fields]
    name = " ".join([platform.machine(), *(models or [platform.processor()])])
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def _read(path: Path) -> dict[str, Any]:
    """Return earlier results; none if the file cannot be read, which is then written anew."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
