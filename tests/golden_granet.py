"""Recorded updates of the original GraNet: what it prunes, drops and grows, update by update.

Its CIFAR code keeps one weight less than it says, or prunes every layer to the same density. There,
what it prunes is checked by the counts that it met, and what it regrows from what was left.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparse
from sparse.methods import Granet
from sparse.topology.selection import largest_in_layers, largest_together
from tests.golden_compare import Check, case_of, close, indexed_cases, require, same

Arrays = Mapping[str, Any]


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the arguments of the original."""
    loader = config.get("loader") or config["batches_per_epoch"]
    steps = config.get("T_max") or config.get("epochs", 0) * loader or config["steps"]
    return {
        "sparsity": float(1 - Decimal(str(config["final_density"]))),
        "initial_sparsity": float(1 - Decimal(str(config["init_density"]))),
        "delta_t": config["freq"],
        "t_start": config.get("init_epoch", 0) * loader,
        "prune_end": config["final_epoch"] * loader,
        "t_end": steps,
        "drop_fraction": config.get("prune_rate", 0.5),
    }


def granet_cases(path: Path) -> Iterator[tuple[str, Check]]:
    """List the cases of the schedules."""
    for case, entry in json.loads(path.read_text()).items():
        if case == "drop_fraction":
            for number, curve in enumerate(entry):
                yield f"{case} {number}", partial(_check_cosine, curve)
        elif "rows" in entry:
            yield case, partial(_check_targets, case, entry)
        else:
            yield case, partial(_check_counts, entry)


def _check_cosine(curve: Mapping[str, Any]) -> None:
    method = Granet(
        sparsity=0.8,
        t_end=curve["T_max"],
        prune_end=1,
        drop_fraction=curve["initial"],
        drop_fraction_min=curve["eta_min"],
    )
    for step, value in curve["rows"]:
        close(f"after {step} steps", method.fraction_at(step - 1), value, 1e-9)


def _check_targets(case: str, entry: Mapping[str, Any]) -> None:
    """Check the sparsity that the ramp asks for, by the number of weights it keeps of many."""
    first, last = (float(word) for word in case.split("epochs ")[1].split(":")[0].split("->"))
    config = {
        "init_density": first,
        "final_density": last,
        "freq": entry["update_frequency"],
        "init_epoch": entry["init_prune_epoch"],
        "final_epoch": entry["final_prune_epoch"],
        "batches_per_epoch": entry["batches_per_epoch"],
        "steps": 100 * entry["batches_per_epoch"],
    }
    method = Granet(**settings_of(config))
    for step, target in entry["rows"]:
        require(method.due(step - 1), f"no update after {step} steps")
        if target is not None:
            expected = int(25_502_912 * (1 - target))
            require(method.num_kept(25_502_912, step - 1) == expected, f"{step}: other count")


def _check_counts(entry: Mapping[str, Any]) -> None:
    config = entry["config"]
    method, spare = Granet(**settings_of(config)), config["variant"] == "cifar"
    for update in entry["updates"]:
        step, active = update["step"] - 1, update["ones_before"]
        require(method.due(step), f"no update after {step + 1} steps")
        close("drop fraction", method.fraction_at(step), update["drop_fraction"], 1e-9)
        if update["num_params_to_keep"] is not None:
            kept = method.num_kept(config["numel"], step)
            require(kept == update["num_params_to_keep"], f"{step + 1}: {kept} weights are kept")
            require(min(kept - spare, active) == update["ones_pruned"], "another number is left")


def granet_index_cases(path: Path) -> Iterator[tuple[str, Check]]:
    """List the files of an index."""
    return indexed_cases(path, _check_entry)


def _check_entry(data: Arrays, entry: Mapping[str, Any]) -> None:
    """Check the counts of the original by ours."""
    for number, update in enumerate(entry["updates"]):
        for name, count in update["ones_after"].items():
            found = int(data[f"mask_after__{name}"][number].sum())
            require(found == count, f"update {number}: {name} has {found} weights, not {count}")


def check_granet(data: Arrays, path: Path) -> None:
    """Check all updates of a file."""
    entry = case_of(path, "granet_index.json")
    config, updates = entry["config"], entry["updates"]
    names = [key.removeprefix("init_mask__") for key in data if key.startswith("init_mask__")]
    for number in range(len(data["step"])):
        _Update(data, names, number, config, updates[number]).check()


class _Update:
    """One update of a run."""

    def __init__(
        self,
        data: Arrays,
        names: list[str],
        number: int,
        config: Mapping[str, Any],
        entry: Mapping[str, Any],
    ) -> None:
        self._data, self._names, self._number = data, names, number
        self._label, self._entry, self._config = f"update {number}", entry, config
        self._step = int(data["step"][number])
        planned = Granet(**settings_of(config))
        require(planned.due(self._step - 1), f"no update after {self._step} steps")
        recorded = float(data["drop_fraction"][number])
        close("drop fraction", planned.fraction_at(self._step - 1), recorded, 1e-9)
        # The original's own fraction from here on: products with it are rounded up.
        options = {"drop_fraction": recorded, "drop_anneal": "constant", "drop_fraction_min": 0.0}
        self._method = dataclasses.replace(planned, **options)

    def _all(self, what: str) -> dict[str, Tensor]:
        keys = {name: f"{what}__{name}" for name in self._names}
        return {
            name: torch.from_numpy(self._data[key][self._number].copy())
            for name, key in keys.items()
            if key in self._data
        }

    def check(self) -> None:
        masks, weights = self._all("mask_before"), self._all("weights_before")
        pruned, ramps = self._all("mask_pruned"), self._entry["ramp_applied"]
        if ramps and self._config["variant"] == "imagenet":
            numel = sum(mask.numel() for mask in masks.values())
            kept = self._method.num_kept(numel, self._step - 1)
            require(kept == self._entry["num_params_to_keep"], f"{self._label}: {kept} are kept")
            found = self._method.survivors(masks, weights, self._step - 1)
        else:
            # Ours goes on to the final count, or keeps another: begin with what the original left.
            options = {"t_start": self._step, "prune_end": 10**9, "t_end": 10**9}
            self._method = dataclasses.replace(self._method, **options)
            counts = {name: int(mask.sum()) for name, mask in pruned.items()}
            if self._config.get("method") == "GraNet_uniform":
                found = largest_in_layers(weights, counts, masks)
            else:
                found = largest_together(weights, sum(counts.values()), masks)
            masks, weights = found, {name: weights[name] * found[name] for name in found}
        for name in self._names:
            same(f"{self._label}, {name} pruned", found[name], pruned[name].numpy())
        self._update(masks, weights)

    def _update(self, masks: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        layers = {name: nn.Linear(1, 1, bias=False) for name in self._names}
        for name, layer in layers.items():
            layer.weight = nn.Parameter(weights[name].clone())
        model = nn.ModuleDict(layers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        for name, momentum in self._all("momentum_before").items():
            buffer = momentum * masks[name]
            optimizer.state[layers[name].weight]["momentum_buffer"] = buffer
        sparsifier = sparse.Sparsifier(
            model,
            optimizer,
            self._method,
            num_active={f"{name}.weight": int(mask.sum()) for name, mask in masks.items()},
            maskable=[f"{name}.weight" for name in masks],
            masks={f"{name}.weight": mask for name, mask in masks.items()},
            hooks=False,
        )
        sparsifier.load_state_dict(sparsifier.state_dict() | {"step": self._step - 1})
        for name, gradient in self._all("grad").items():
            layers[name].weight.grad = gradient
        sparsifier.before_step()
        sparsifier.after_step()
        require(sparsifier.num_updates == 1, f"{sparsifier.num_updates} updates instead of one")
        weights_after, momenta = self._all("weights_after"), self._all("momentum_after")
        for name, mask in self._all("mask_after").items():
            label, weight = f"{self._label}, {name}", layers[name].weight
            same(f"{label}: mask", sparsifier.masks[f"{name}.weight"], mask.numpy())
            close(f"{label}: weights", weight.detach(), weights_after[name], 0.0)
            if name in momenta:
                state = optimizer.state[weight]["momentum_buffer"]
                close(f"{label}: momentum", state, momenta[name], 0.0)
