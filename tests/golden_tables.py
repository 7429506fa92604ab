"""Recorded schedules, layer densities and indices, one case per entry of a file."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import sparse
from tests.golden_compare import Check, close, distribution, require, torch_shape


def schedule_cases(path: Path) -> Iterator[tuple[str, Check]]:
    for case, values in json.loads(path.read_text()).items():
        anneal, window = case.split("/")
        begin, end = map(int, re.findall(r"\d+", window))
        name, _, power = anneal.partition("_")
        exponent = float(power or 1) if name == "exponential" else None
        drop = sparse.DropFraction(0.3, begin, end, name, exponent)
        yield case, partial(_check_schedule, drop, values.items(), FLOAT32)


def prune_rate_cases(path: Path) -> Iterator[tuple[str, Check]]:
    for case, values in json.loads(path.read_text()).items():
        if match := re.fullmatch(r"cosine_prune_rate_T(\d+)", case):
            drop = sparse.DropFraction(0.5, 0, int(match[1]), "cosine", minimum=0.005)
            yield case, partial(_check_schedule, drop, values, 1e-9)


FLOAT32 = 2e-7  # the original computes schedules in float32, here they are doubles


def _check_schedule(
    drop: sparse.DropFraction, values: Iterable[tuple[Any, float]], tolerance: float
) -> None:
    for step, value in values:
        close(f"at step {step}", drop(int(step)), value, tolerance)


def density_cases(path: Path) -> Iterator[tuple[str, Check]]:
    content = json.loads(path.read_text())
    for case, expected in content.items():
        if not case.endswith("_layers"):
            parts = case.split("/")
            layers = content[f"{parts[0]}_layers"]
            density, nnz = expected["density"], expected.get("nnz")
            yield case, partial(_check_densities, parts, layers, density, nnz)


def density_array_cases(path: Path) -> Iterator[tuple[str, Check]]:
    content = json.loads(path.with_suffix(".json").read_text())  # it has the shapes
    arrays = np.load(path)
    for case in arrays.files:
        if not case.endswith("_names"):
            parts = case.split("__")
            layers = content[f"{parts[0]}_layers"]
            yield case, partial(_check_densities, parts, layers, arrays[case].tolist(), None)


def _check_densities(
    case: Sequence[str], layers: Sequence[Any], density: list[float], nnz: list[int] | None
) -> None:
    _, kind, sparsity, where = case
    kind, _, power = kind.partition("_pow")
    shapes = {layer["name"]: torch_shape(layer["shape"]) for layer in layers}
    dense = ["conv1"] if "first_dense" in where else []
    dense += ["*.dw"] if "dw" in where else []
    arguments: dict[str, Any] = {
        "sparsity": float(sparsity),
        "distribution": distribution(kind),
        "power_scale": float(power or 1.0),
        "dense_layers": dense,
    }
    found = [1.0 - value for value in sparse.layer_sparsities(shapes, **arguments).values()]
    require(found == density, "densities are not bit-identical")
    if nnz is not None:
        require(list(sparse.allocate(shapes, **arguments).values()) == nnz, "counts differ")


def index_cases(path: Path) -> Iterator[tuple[str, Check]]:
    for entry in json.loads(path.read_text()):
        yield entry["file"], partial(_check_index, path.with_name(entry["file"]), entry)


def _check_index(path: Path, entry: Mapping[str, Any]) -> None:
    if not path.exists():
        return  # an index may list more files than a selection of them has
    data = np.load(path)
    for key in ("n_ones", "n_new"):
        if key in entry:
            require(int(data[key]) == entry[key], f"{key} is not that of the file")
