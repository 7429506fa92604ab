"""Choose how each convolution is computed by measuring it; remember the result per machine."""

import ctypes
import dataclasses
import hashlib
import json
import math
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from sparse.runtime import native
from sparse.runtime.layout import Map
from sparse.runtime.plan import Choice, Plan, Step, can_be_sparse, density, tiles

BLOCK_SIZES = (16, 32, 64, 128, 256)
L1_BYTES = 32 * 1024  # a guess is enough: it only narrows what is measured
PANEL = 128
ROUNDS = (1, 1, 2, 2, 4, 4)
DENSE_FROM = 0.2  # density at which the dense kernel is tried


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
    tabled: tuple[bool, int, int] | None = None  # what the tables depend on
    for choice in sorted(_candidates(step), key=lambda c: (c.dense, c.block_size, c.panel)):
        if (choice.dense, choice.block_size, choice.panel) != tabled:
            tabled = (choice.dense, choice.block_size, choice.panel)
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


def _candidates(step: Step) -> list[Choice]:
    assert isinstance(step.source, Map)
    assert isinstance(step.target, Map)
    assert step.layer is not None
    found: list[Choice] = []
    if can_be_sparse(step):
        found = [
            dataclasses.replace(tile, block_size=size, panel=panel)
            for tile in tiles(step.target)
            for size in _block_sizes(step, tile)
            for panel in ((0, PANEL) if size and step.target.channels > 2 * PANEL else (0,))
        ]
    if not found or (step.layer.groups == 1 and density(step.layer) >= DENSE_FROM):
        found.append(Choice(dense=True))
    return found


def _block_sizes(step: Step, tile: Choice) -> list[int]:
    """Return numbers of input channels whose part of a tile is about a first-level cache."""
    assert isinstance(step.source, Map)
    assert step.layer is not None
    if step.layer.groups > 1:
        return [0]
    rows = (tile.tile_rows - 1) * step.stride[0] + step.layer.kernel[0]
    vectors = (
        min(tile.tile_vectors * step.stride[1], step.source.vectors) + step.layer.kernel[1] - 1
    )
    channel = 4 * rows * vectors * step.source.lanes
    sizes = [s for s in BLOCK_SIZES if L1_BYTES // 4 <= s * channel <= 2 * L1_BYTES]
    return [0, *(s for s in sizes if s < step.source.channels)]


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
        f"out {target.height}x{target.vectors} add {step.residual is not None} "
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
