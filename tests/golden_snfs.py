"""Recorded updates of the original SNFS, one or several in a row."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse.methods.allocation import Allocation
from sparse.methods.snfs import Snfs, layer_shares, num_removed
from tests.golden_compare import close, same

Arrays = Mapping[str, Any]


def check_snfs(data: Arrays, path: Path) -> None:
    """Check the original SNFS, whose updates may follow one another with other weights."""
    names = [str(name) for name in data["names"]] if "names" in data else _names(data)
    entry = _index_entry(path)
    state = {"adjustment": torch.tensor(float(data["adjusted_growth_before"])).double()}
    masks = {name: mask.bool() for name, mask in _layers(data, "mask_", names, 0).items()}
    weights = _layers(data, "weights_", names, 0)
    for number in range(len(_rounds(data, "expected_mask_", names[0]))):
        uniforms = _layers(data, "rand_", names, number)
        momenta = _layers(data, "momentum_", names, number)
        rate = float(_entry(data, "prune_rate", "", number))
        # Of the counts only their sum matters: it is what the method holds.
        counts = dict.fromkeys(names, 0) | {names[0]: int(data["baseline_nonzero"])}
        method = Snfs(
            sparsity=0.0,
            t_end=1,
            drop_fraction=rate,
            drop_anneal="constant",
            allocation=Allocation(num_active=counts),
            redistribution=_redistribution(entry, path.stem),
            growth="random" if uniforms else "momentum",
            draw=lambda keys, like, uniforms=uniforms: uniforms,
        )
        weights = {name: weights[name] * masks[name] for name in names}
        _check_statistics(data, number, masks, weights, momenta, method)
        masks = dict(method.update(masks, weights, momenta, 0, state))
        for name in names:
            expected = _output(data, "expected_mask_", name, number)
            same(f"mask {name} of update {number}", masks[name], expected)
        adjustment = _output(data, "adjusted_growth_after", "", number)
        if adjustment is not None:
            close(f"adjustment of update {number}", state["adjustment"], adjustment, 1e-9)
        weights = _layers(data, "weights_before_next_", names, number) or weights


def _check_statistics(
    data: Arrays,
    number: int,
    masks: dict[str, Tensor],
    weights: dict[str, Tensor],
    momenta: dict[str, Tensor],
    method: Snfs,
) -> None:
    active = torch.stack([mask.sum() for mask in masks.values()])
    shares = layer_shares(masks, active, weights, momenta, method.redistribution)
    sizes = [mask.numel() for mask in masks.values()]
    removed = num_removed(active, sizes, shares, method.schedule(0))
    found = [("total_removed", "", removed.sum(), 0.0)]
    for index, name in enumerate(masks):
        found.append(("share_", name, shares[index], 1e-6))
        found.append(("removed_", name, removed[index], 0.0))
    for prefix, name, value, tolerance in found:
        expected = _output(data, prefix, name, number)
        if expected is not None:
            close(f"{prefix}{name} of update {number}", value, expected, tolerance)


def _names(data: Arrays) -> list[str]:
    return [key.removeprefix("mask_") for key in data if key.startswith("mask_")]


def _rounds(data: Arrays, prefix: str, name: str) -> list[str]:
    """List the keys prefix + name of one update after another, marked by "roundK" if several."""
    numbered = {}
    for key in data:
        match = re.search(r"_?round(\d+)_?", key)
        bare = key.replace(match[0], "_" if match[0].count("_") == 2 else "") if match else key
        if bare == prefix + name:
            numbered[int(match[1]) if match else 0] = key
    return [numbered[number] for number in sorted(numbered)]


def _entry(data: Arrays, prefix: str, name: str, number: int) -> Any:
    """Look up prefix + name of the number-th update; one that is given once holds for all."""
    keys = _rounds(data, prefix, name)
    if len(keys) == 1:
        return data[keys[0]]
    return data[keys[number]] if number < len(keys) else None


def _output(data: Arrays, prefix: str, name: str, number: int) -> Any:
    """Look up a result of the number-th update; one that is given once is that of the last."""
    last = len(_rounds(data, "expected_mask_", _names(data)[0])) - 1
    given_once = len(_rounds(data, prefix, name)) == 1
    return None if given_once and number < last else _entry(data, prefix, name, number)


def _layers(data: Arrays, prefix: str, names: Sequence[str], number: int) -> dict[str, Tensor]:
    found = {name: _entry(data, prefix, name, number) for name in names}
    return {name: torch.from_numpy(array) for name, array in found.items() if array is not None}


def _index_entry(path: Path) -> dict[str, Any]:
    index = path.with_name("snfs_index.json")
    if not index.exists():
        return {}
    entries = json.loads(index.read_text())["index"]
    return next((entry for entry in entries if entry["file"] == path.name), {})


def _redistribution(entry: Mapping[str, Any], stem: str) -> str:
    named = entry.get("redistribution")
    if named is None:
        kinds = {"noredist": "none", "magnitude_redist": "magnitude", "nonzero": "nonzero"}
        named = next((kind for text, kind in kinds.items() if text in stem), "momentum")
    return "numel" if named == "none" else str(named)
