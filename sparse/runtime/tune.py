"""Choose how each convolution is computed by measuring it; remember the result per processor."""

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

from sparse.runtime import bindings
from sparse.runtime.arrange import Step
from sparse.runtime.format import write_whole
from sparse.runtime.layout import Map
from sparse.runtime.plan import Choice, Plan, can_share, dense_choices, density, tiles

L1_BYTES = 32 * 1024  # a guess is enough: it only narrows what is measured
BLOCK_BYTES = (L1_BYTES // 2, L1_BYTES, 2 * L1_BYTES)  # of the input's part of a tile
MIN_CONNECTIONS = 4  # per block and group of channels
PANEL = 128
CPUINFO = Path("/proc/cpuinfo")
MODEL = ("vendor_id", "cpu family", "model", "model name", "CPU implementer", "CPU part")
ROUNDS = (1, 1, 2, 2, 4, 4)
DENSE_FROM = 0.2  # density at which the dense kernel is tried
SHARED_FROM = 0.25  # channels of a group times density at which it is tried


class Tuner:
    """Measures layers, and keeps what it found in a file of the cache directory.

    The file is a help, never a need: what cannot be read, or is no choice of these kernels, is
    measured anew; where it cannot be written, the results last as long as the process.
    """

    _measured: dict[Path, dict[str, Any]] = {}
    """Of this process, by the file that they belong to."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def tune(self, plan: Plan, kernels: bindings.Kernels) -> None:
        """Set every convolution of a plan to the fastest choice found."""
        path = self._directory / f"tuned-{kernels.path.stem}-{processor()}.json"
        known = _read(path) | self._measured.setdefault(path, {})
        chosen: dict[str, Choice] = {}
        missing = {}
        for step in plan.convolutions():
            key = _key(step)
            choice = _choice(known.get(key), step, kernels)
            if choice is None:
                missing[key] = step
            else:
                chosen[key] = choice
        if missing:
            with _Bench(plan, kernels) as bench:
                for key, step in missing.items():
                    chosen[key] = _fastest(plan, step, bench)
            found = {key: dataclasses.asdict(chosen[key]) for key in missing}
            self._measured[path] |= found
            self._write(path, found)
        for step in plan.convolutions():
            plan.choose(step, chosen[_key(step)])

    def _write(self, path: Path, found: dict[str, Any]) -> None:
        """Add to the file; a concurrent writer may win, which costs a measurement later."""
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

    def __init__(self, plan: Plan, kernels: bindings.Kernels) -> None:
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


def _fastest(plan: Plan, step: Step, bench: _Bench) -> Choice:
    """Time all candidates in turn, several times, the slower half of them less often.

    A disturbance then hits all alike, and the least of several times is free of it.
    """
    tried: dict[Choice, tuple[bindings.Op, list[Any]]] = {}
    tabled: tuple[int, ...] | None = None  # what the tables depend on
    for choice in sorted(_candidates(step, bench.max_tiles), key=_tables_of):
        if _tables_of(choice) != tabled:
            tabled = _tables_of(choice)
            plan.choose(step, choice)
        op = bindings.Op.from_buffer_copy(step.op)
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
    found = [
        dataclasses.replace(tile, group=group, num_blocks=count, panel=panel)
        for group, most in max_tiles.items()
        if group == 1 or (can_share(step) and density(step.layer) * group >= SHARED_FROM)
        for tile in tiles(step, most)
        for count in _num_blocks(step, tile, group)
        for panel in ((0, PANEL) if count > 1 and step.target.channels > 2 * PANEL else (0,))
    ]
    if density(step.layer) >= DENSE_FROM:
        found += dense_choices(step)
    return found


def _choice(known: Any, step: Step, kernels: bindings.Kernels) -> Choice | None:
    """Return a remembered choice if the kernels can compute a step so, else None."""
    names = {field.name for field in dataclasses.fields(Choice)}
    if not isinstance(known, dict) or known.keys() != names:
        return None
    if type(known["dense"]) is not bool or not all(
        type(value) is int for name, value in known.items() if name != "dense"
    ):
        return None
    choice = Choice(**known)
    if choice.dense:
        return choice if choice in dense_choices(step) else None
    tile = Choice(tile_vectors=choice.tile_vectors, tile_rows=choice.tile_rows)
    if choice.group not in (kernels.max_tiles if can_share(step) else (1,)):
        return None
    if tile not in tiles(step, kernels.max_tiles[choice.group]):
        return None
    fits = choice.num_blocks in _block_counts(step, tile) and choice.panel in (0, PANEL)
    return choice if fits else None


def _num_blocks(step: Step, tile: Choice, group: int) -> list[int]:
    """Return the counts that leave a block enough connections."""
    layer = step.layer
    assert layer is not None
    assert layer.weight is not None
    most = group * layer.num_active / len(layer.weight) / MIN_CONNECTIONS
    return sorted(count for count in _block_counts(step, tile) if count == 1 or count <= most)


def _block_counts(step: Step, tile: Choice) -> set[int]:
    """Return numbers of blocks whose part of the input of a tile is about a first-level cache."""
    assert isinstance(step.source, Map)
    layer = step.layer
    assert layer is not None
    if layer.groups > 1:
        return {1}
    rows = (tile.tile_rows - 1) * step.stride[0] + layer.kernel[0]
    vectors = min(tile.tile_vectors * step.stride[1], step.source.vectors) + layer.kernel[1] - 1
    size = 4 * rows * vectors * step.source.lanes * step.source.channels
    return {1} | {-(-size // block) for block in BLOCK_BYTES}


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


def processor() -> str:
    """Return a digest of the processor's model: containers and clusters share it, names change."""
    try:
        lines = CPUINFO.read_text().partition("\n\n")[0].splitlines()
    except OSError:
        lines = []
    fields = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    models = [fields[name] for name in MODEL if name in fields]
    name = " ".join([platform.machine(), *(models or [platform.processor()])])
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def _read(path: Path) -> dict[str, Any]:
    """Return earlier results; an unreadable file is as good as none, and is written anew."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
