"""Recorded masks of the original GaP: pruning, random masks, and the cycle of its partitions.

Where the original prunes all weights that tie with its threshold, what it keeps must be among what
is kept here. It empties layers of sparsity 0.999 and more, and leaves layers of sparsity below 0.1
without a mask; here a layer has the sparsity it was given, so that those are not compared.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cli.combine import merge
from sparse.methods import Gap
from sparse.methods.gap import magnitude_sparsities, num_kept, num_random
from tests.golden_compare import Check, close, require, same

Arrays = Mapping[str, Any]


def gap_cases(path: Path) -> Iterator[tuple[str, Check]]:
    """List the cases of the tables. Partitions drawn at random are not offered here."""
    content = json.loads(path.read_text())
    if path.name == "gap_counts.json":
        for size, entries in content.items():
            yield f"{size} weights", partial(_check_counts, int(size), entries)
    else:
        for case, entry in content["cyclic"].items():
            yield case, partial(_check_steps, content["layers"], entry)


def _check_counts(size: int, entries: Mapping[str, int]) -> None:
    for sparsity, kept in entries.items():
        found = num_kept(size, float(sparsity))
        require(found == kept, f"{found} of {size} weights are kept at {sparsity}, not {kept}")


def _method(
    parts: Sequence[Sequence[str]], sparsities: Mapping[str, float], phases: int
) -> tuple[Gap, dict[str, str]]:
    """Give the method for layers of one weight each by the names that it knows them by."""
    names = [name for part in parts for name in part]
    known = {name: f"{index}.weight" for index, name in enumerate(names)}
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in names))
    method = Gap(
        sparsity=0.5,
        partitions=[",".join(known[name] for name in part) for part in parts],
        sparsity_map={known[name]: sparsities[name] for name in names},
        phase=1,
        num_phases=phases,
    )
    return method.fitted_to(model), known


def _check_steps(layers: Sequence[str], entry: Mapping[str, Any]) -> None:
    parts, steps = entry["partitions"], entry["steps"]
    method, known = _method(parts, dict.fromkeys(layers, entry["sparsity"]), 10**6)
    for number, step in enumerate(steps):
        grown = {name for name in layers if known[name] in method.grown_at(number - 1)}
        masked = [name for name in layers if name not in grown]
        require(masked == step["masked"], f"step {number}: {masked} are masked")
        before = {name for name in layers if known[name] in method.grown_at(number - 2)}
        if number > 0:
            found = [name for name in layers if name in before - grown]
            require(found == step["prune"], f"step {number}: {found} are pruned")


def _prune(weights: Tensor, sparsity: float) -> Tensor:
    """Prune a layer as the library does at the end of a phase."""
    method, known = _method([["a"], ["b"]], {"a": sparsity, "b": 0.5}, 1)
    masks = {known["a"]: weights != 0, known["b"]: torch.ones(1, 1, dtype=torch.bool)}
    values = {known["a"]: weights, known["b"]: torch.ones(1, 1)}
    return method.update(masks, values, {}, 0, {})[known["a"]]


def check_prune(data: Arrays, path: Path) -> None:
    """Check the pruning of one layer."""
    weights, sparsity = torch.from_numpy(data["weights"]), float(data["sparsity"])
    found, expected = _prune(weights, sparsity), torch.from_numpy(data["expected_mask"])
    wanted = min(num_kept(weights.numel(), sparsity), int(torch.count_nonzero(weights)))
    require(int(found.sum()) == wanted, f"{int(found.sum())} weights are kept, not {wanted}")
    require(not (expected & ~found).any(), "the original kept other weights")
    require(int(expected.sum()) == int(data["expected_kept"]), "the file contradicts itself")


def check_random(data: Arrays, path: Path) -> None:
    """Check the numbers of random masks; their places come from NumPy's generator."""
    for name in _names(data, "expected_mask_"):
        mask = data[f"expected_mask_{name}"]
        found = num_random(mask.size, float(data["sparsity"]))
        require(found == int(mask.sum()), f"{name}: {found} weights, not {int(mask.sum())}")


def _names(data: Arrays, prefix: str) -> list[str]:
    return [key.removeprefix(prefix) for key in data if key.startswith(prefix)]


def check_cycle(data: Arrays, path: Path) -> None:
    """Check the masks of all steps, of which the last one prunes what is dense."""
    names = [str(name).removesuffix(".weight") for name in data["layers"]]
    owner = dict(zip(names, np.atleast_1d(data["partition_of"]).tolist(), strict=True))
    values = np.broadcast_to(data["sparsity"], len(names)).tolist()
    parts = [[n for n in names if owner[n] == part] for part in sorted(set(owner.values()))]
    last = max(int(key[4:].split("_")[0]) for key in data if key.startswith("step"))
    method, known = _method(parts, dict(zip(names, values, strict=True)), last)
    masks: dict[str, Tensor] = {}
    for step in range(last + 1):
        expected = _all(data, f"step{step}_expected_mask_", names)
        weights = _all(data, f"step{step}_weights_before_", names)
        if step > 0 or "magnitude" in path.stem:
            if not masks:  # the original prunes all partitions but the first at its start
                masks = {name: torch.ones_like(mask) for name, mask in expected.items()}
            masks = _step(method, known, masks, weights, step - 1)
            for name in names:
                same(f"step {step}, {name}", masks[name], expected[name].numpy())
        masks = expected


def check_one_run(data: Arrays, path: Path) -> None:
    """Check the masks of a run in one process."""
    entry = json.loads(path.with_name("index.json").read_text())["cases"][path.stem]
    names = _names(data, "epoch0_mask_before_")
    cuts = [0, *entry["cut"], len(names)]
    parts = [names[start:end] for start, end in itertools.pairwise(cuts)]
    method, known = _method(parts, dict.fromkeys(names, entry["sparsity"]), 10**6)
    for number, event in enumerate(entry["events"]):
        epoch = f"epoch{event['epoch']}"
        masks = _all(data, f"{epoch}_mask_before_", names)
        weights = _all(data, f"{epoch}_weights_before_", names)
        found = _step(method, known, masks, weights, number - 1)
        for name, expected in _all(data, f"{epoch}_expected_mask_", names).items():
            same(f"{epoch}, {name}", found[name], expected.numpy())


def _all(data: Arrays, prefix: str, names: Sequence[str]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(data[prefix + name]) for name in names}


def _step(
    method: Gap,
    known: Mapping[str, str],
    masks: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    step: int,
) -> dict[str, Tensor]:
    """Compute the masks that a step leads to."""
    old = {known[name]: mask for name, mask in masks.items()}
    values = {known[name]: weight * masks[name] for name, weight in weights.items()}
    new = method.update(old, values, {}, step, {})
    return {name: new[known[name]] for name in masks}


def check_parallel(data: Arrays, path: Path) -> None:
    """Check P-GaP: every partition is taken from the copy in which it was dense, then pruned."""
    names = [str(name) for name in data["layers"]]
    size, sparsity = int(data["weights_per_layer"]), float(data["sparsity"])
    owner = data["partition_of"].tolist()
    parts = [[n for n, part in zip(names, owner, strict=True) if part == i] for i in set(owner)]
    for number in range(sum(key.endswith("_combined_weights") for key in data)):
        copies = [
            dict(zip(names, torch.from_numpy(data[key]).split(size), strict=True))
            for key in (f"round{number}_copy{i}_trained_weights" for i in range(len(parts)))
        ]
        merged = merge(copies, parts)
        found = torch.cat([merged[name] for name in names])
        close("combined", found, data[f"round{number}_combined_weights"], 0.0)
        pruned = torch.cat([merged[name] * _prune(merged[name], sparsity) for name in names])
        close("pruned", pruned, data[f"round{number}_expected_pruned_weights"], 0.0)


def check_ratio(data: Arrays, path: Path) -> None:
    """Check sparsities that follow the magnitudes of all layers together."""
    every = [str(name).removesuffix(".weight") for name in data["layers"]]
    names = [name for name in every if float(data[f"expected_ratio_{name}"]) >= 0]
    weights = {name: torch.from_numpy(data[f"weights_before_{name}"]) for name in names}
    found = magnitude_sparsities(weights, float(data["sparsity"]))
    for name in names:
        ratio = float(data[f"expected_ratio_{name}"])
        close(name, found[name], ratio, 1e-12)
        if 0.0 < ratio < 0.999:
            expected = data[f"expected_weights_nonzero_{name}"]
            same(name, _prune(weights[name], ratio), expected)


def check_edges(data: Arrays, path: Path) -> None:
    """Check sparsities of all sizes, but for those that the original treats otherwise."""
    ratios = data["ratios"].tolist()
    for name, ratio in zip(map(str, data["layers"]), ratios, strict=True):
        if 0.0 < ratio < 0.999:
            weights = torch.from_numpy(data[f"weights_before_{name.removesuffix('.weight')}"])
            expected = data[f"expected_weights_{name.removesuffix('.weight')}"] != 0
            same(name, _prune(weights, ratio), expected)


def index_cases(path: Path) -> Iterator[tuple[str, Check]]:
    """List the numbers of weights that an index says of its files."""
    for stem, entry in json.loads(path.read_text())["cases"].items():
        yield stem, partial(_check_entry, path.with_name(f"{stem}.npz"), entry)


def _check_entry(path: Path, entry: Mapping[str, Any]) -> None:
    """Check an entry; an index may list more files than there are."""
    if not path.exists():
        return
    data, kept = np.load(path), entry.get("kept")
    total = data.get("expected_kept_total_of_pruned", data.get("expected_kept"))
    if isinstance(kept, int) and total is not None:
        require(int(total) == kept, f"it says {kept}, the file {total}")
