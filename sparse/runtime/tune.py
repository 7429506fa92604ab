"""Choose how each convolution is computed by measuring it; remember the result per machine."""

import ctypes
import dataclasses
import hashlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse.runtime import native
from sparse.runtime.arrange import Step
from sparse.runtime.layout import Map
from sparse.runtime.plan import Choice, Plan, can_be_sparse, dense_choices, density, tiles

L1_BYTES = 32 * 1024  # a guess is enough: it only narrows what is measured
BLOCK_BYTES = (L1_BYTES // 2, L1_BYTES, 2 * L1_BYTES)  # of the input's part of a tile
MIN_CONNECTIONS = 4  # per block and group of channels
PANEL = 128
ROUNDS = (1, 1, 2, 2, 4, 4)
DENSE_FROM = 0.2  # density at which the dense kernel is tried
SHARED_FROM = 0.25  # channels of a group times density at which it is tried


class Tuner:
    """Measures layers, and keeps what it found in a file of the cache directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def tune(self, plan: Plan, kernels: native.Kernels) -> None:
        """Set every convolution of a plan to the fastest choice found."""
        path = self._directory / f"tuned-{kernels.path.stem}-{_machine()}.json"
        known = _read(path)
        steps = [(step, _key(step)) for step in plan.convolutions()]
        missing = {key for _, key in steps if key not in known}
        if missing:
            with _Bench(plan, kernels) as bench:
                for step, key in steps:
                    if key not in known:
                        known[key] = dataclasses.asdict(_fastest(plan, step, bench))
            self._write(path, known)
        for step, key in steps:
            plan.choose(step, Choice(**known[key]))

    def _write(self, path: Path, known: dict[str, Any]) -> None:
        """Add to the file; a concurrent writer may win, which costs a measurement later."""
        merged = _read(path) | known
        with tempfile.NamedTemporaryFile("w", dir=self._directory, delete=False) as file:
            json.dump(merged, file, indent=1)
        os.replace(file.name, path)


class _Bench:
    """An arena in which single operations are timed."""

    def __init__(self, plan: Plan, kernels: native.Kernels) -> None:
        self._kernels = kernels
        self.max_tiles = kernels.max_tiles
        self._handle = plan.create(kernels, threads=1)
        if not self._handle:
            raise MemoryError(f"no memory for {4 * plan.arena_size} bytes")

    def __enter__(self) -> "_Bench":
        return self

    def __exit__(self, *_: object) -> None:
        self._kernels.destroy(self._handle)

    def seconds(self, op: native.Op, repetitions: int) -> float:
        return float(self._kernels.time(self._handle, ctypes.addressof(op), repetitions))


def _fastest(plan: Plan, step: Step, bench: _Bench) -> Choice:
    """Time all candidates in turn, several times, the slower half of them less often.

    A disturbance then hits all alike, and the least of several times is free of it.
    """
    tried: dict[Choice, tuple[native.Op, list[Any]]] = {}
    tabled: tuple[int, ...] | None = None  # what the tables depend on
    for choice in sorted(_candidates(step, bench.max_tiles), key=_tables_of):
        if _tables_of(choice) != tabled:
            tabled = _tables_of(choice)
            plan.choose(step, choice)
        op = native.Op.from_buffer_copy(step.op)
        op.tile_vectors, op.tile_rows = choice.tile_vectors, choice.tile_rows
        tried[choice] = (op, list(step.tables))
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


def _candidates(step: Step, max_tiles: Mapping[int, int]) -> list[Choice]:
    assert isinstance(step.target, Map)
    assert step.layer is not None
    found: list[Choice] = []
    if can_be_sparse(step):
        found = [
            dataclasses.replace(tile, group=group, num_blocks=count, panel=panel)
            for group, most in max_tiles.items()
            if group == 1
            or (can_be_sparse(step, group) and density(step.layer) * group >= SHARED_FROM)
            for tile in tiles(step.target, most)
            for count in _num_blocks(step, tile, group)
            for panel in ((0, PANEL) if count > 1 and step.target.channels > 2 * PANEL else (0,))
        ]
    if not found or (step.layer.groups == 1 and density(step.layer) >= DENSE_FROM):
        found += dense_choices(step)
    return found


def _num_blocks(step: Step, tile: Choice, group: int) -> list[int]:
    """Return numbers of blocks whose part of the input of a tile is about a first-level cache."""
    assert isinstance(step.source, Map)
    layer = step.layer
    assert layer is not None
    assert layer.weight is not None
    if layer.groups > 1:
        return [1]
    rows = (tile.tile_rows - 1) * step.stride[0] + layer.kernel[0]
    vectors = min(tile.tile_vectors * step.stride[1], step.source.vectors) + layer.kernel[1] - 1
    size = 4 * rows * vectors * step.source.lanes * step.source.channels
    most = group * layer.num_active / len(layer.weight) / MIN_CONNECTIONS
    counts = {-(-size // block) for block in BLOCK_BYTES}
    return sorted({1} | {count for count in counts if count <= most})


def _key(step: Step) -> str:
    """Return what the speed of a convolution depends on."""
    layer, source, target = step.layer, step.source, step.target
    assert layer is not None
    assert layer.weight is not None
    assert isinstance(source, Map)
    assert isinstance(target, Map)
    return (
        f"{'x'.join(map(str, layer.weight.shape))} groups {layer.groups} stride {step.stride} "
        f"dilation {layer.dilation} in {source.vectors}+{source.halo} "
        f"out {target.rows}x{target.vectors} add {step.residual is not None} "
        f"density {density(layer):.2g}"
    )


def _machine() -> str:
    """Return a digest of the processor's name."""
    name = platform.processor() + platform.machine() + platform.node()
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def _read(path: Path) -> dict[str, Any]:
    """Return earlier results; an unreadable file is as good as none, and is written anew."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
