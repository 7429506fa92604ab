"""Recorded updates of the original SRigL: fan-in, ablated rows, and the weights after them.

Where the index calls a result arbitrary, because the original chose among equals, the rows and
their numbers of weights are compared.
"""

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sparse
from sparse.methods import Srigl
from sparse.methods.allocation import Allocation
from sparse.topology.distributions import layer_sparsities
from tests.golden_compare import Check, case_of, close, indexed_cases, require, same

Arrays = Mapping[str, Any]


def _budget(shape: list[int], sparsity: float) -> int:
    """Compute the weights of a layer as the original does."""
    return int(math.prod(shape) * (1 - sparsity))


def _method(
    config: Mapping[str, Any], shapes: Mapping[str, Any], sparsities: Mapping[str, float]
) -> Srigl:
    ablates = config.get("dynamic", True)
    budgets = {f"{n}.weight": _budget(shape, sparsities[n]) for n, shape in shapes.items()}
    counts = {
        f"{name}.weight": budgets[f"{name}.weight"] // shape[0] * shape[0]
        for name, shape in shapes.items()
    }
    return Srigl(
        sparsity=0.5,
        delta_t=config.get("delta", 5),
        t_end=config.get("T_end", config.get("t_end", 40)),
        drop_fraction=config.get("alpha", 0.3),
        min_salient=float(config["gamma"]) if ablates else 0.0,
        min_salient_of="sparse" if config.get("sparse_fan", True) else "dense",
        gradient_steps=config.get("accum", 1),
        allocation=Allocation(num_active=counts),
        budgets=budgets,
        whole={f"{name}.weight" for name in config.get("no_ablation", ())},
    )


def srigl_cases(path: Path) -> Iterator[tuple[str, Check]]:
    """List the cases of the tables."""
    content = json.loads(path.read_text())
    for entry in content.get("fan_in", ()):
        yield f"fan-in {entry}", partial(_check_fan_in, entry)
    for number, clock in enumerate(content.get("clocks", ())):
        yield f"clock {number}", partial(_check_clock, clock)
    for name, network in content.get("networks", {}).items():
        yield name, partial(_check_network, network)


def _check_fan_in(entry: Mapping[str, Any]) -> None:
    """Check the share of a row when others are ablated, by an update that ablates them."""
    shape, ablated, expected = entry["shape"], entry["ablated"], entry["fan_in"]
    budget, rows = _budget(shape, entry["sparsity"]), shape[0]
    share = budget // (rows - ablated)
    require(share == (0 if isinstance(expected, str) else expected), f"it has {share}")


def _check_clock(clock: Mapping[str, Any]) -> None:
    every = {"sparsity": 0.5, "delta_t": clock["delta"], "t_end": clock["T_end"]}
    steps = clock["grad_accumulation_n"]
    method = Srigl(**every, drop_fraction=clock["alpha"], gradient_steps=steps)
    recorded = clock.get("updates_step_and_drop_fraction") or clock["first"] + clock["last"]
    for step, fraction in recorded:
        require(method.due(step - 1), f"no update after {step} steps")
        close(f"after {step} steps", method.fraction_at(step - 1), fraction, 1e-12)
    updates = [step for step in range(clock["T_end"] + 100) if method.due(step)]
    number = clock.get("num_updates", len(clock.get("updates_step_and_drop_fraction", ())))
    require(len(updates) == number, f"{len(updates)} updates, not {number}")
    if "batches_accumulated_0based" in clock:
        # The original also gathers for an update that its end cuts off.
        expected = {b for b in clock["batches_accumulated_0based"] if b <= updates[-1]}
        model = nn.Linear(4, 4, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        counts = {"weight": 8}
        free = {"allocation": Allocation(num_active=counts), "budgets": counts}
        method = Srigl(**every, gradient_steps=steps, min_salient=0.0, **free)
        sparsifier = sparse.Sparsifier(model, optimizer, method, num_active=counts)
        found = set()
        for step in range(clock["total_steps"]):
            found |= {step} if sparsifier.needs_dense_gradients else set()
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
        require(found == expected, f"gradients of other batches are gathered: {found ^ expected}")


def _check_network(network: Mapping[str, Any]) -> None:
    head, *layers = network["layers"]
    layers = [dict(zip(head, layer, strict=True)) for layer in layers]
    shapes = {layer["name"]: tuple(layer["shape"]) for layer in layers}
    found = layer_sparsities(
        shapes,
        sparsity=1 - network["dense_allocation"],
        distribution=network["distribution"],
        dense_layers=[layers[0]["name"]] if network["keep_first_layer_dense"] else [],
    )
    total = 0
    for layer in layers:
        name, shape = layer["name"], layer["shape"]
        size = math.prod(shape)
        close(f"sparsity of {name}", found[name], max(layer["sparsity"], 0.0), 1e-6)
        budget = size - math.ceil(found[name] * size)
        require(budget // shape[0] == layer["fan_in"], f"{name}: {budget // shape[0]} a row")
        total += budget // shape[0] * shape[0]
    require(total == network["active_after_flooring"], f"{total} weights in all")


def srigl_index_cases(path: Path) -> Iterator[tuple[str, Check]]:
    """List the files of an index."""
    return indexed_cases(path, _check_entry)


def _check_entry(data: Arrays, entry: Mapping[str, Any]) -> None:
    """Check what the index says of a file."""
    for number, update in enumerate(entry["updates"]):
        for name, layer in update["layers"].items():
            mask = data[f"mask_after__{name}"][number]
            rows = mask.reshape(len(mask), -1).sum(1)
            label = f"update {number}, {name}"
            require(rows.sum() == layer["n_ones_after"], f"{label}: {rows.sum()} weights")
            require(np.flatnonzero(rows == 0).tolist() == layer["ablated"], f"{label}: other rows")


def check_srigl(data: Arrays, path: Path) -> None:
    """Check all updates of a file."""
    entry = case_of(path, "srigl_index.json")
    for number in range(len(data["step"])):
        _Update(data, number, entry).check()


class _Update:
    """One update of a run."""

    def __init__(self, data: Arrays, number: int, entry: Mapping[str, Any]) -> None:
        self._data, self._number, self._exact = data, number, entry["reproducible"]
        self._shapes, self._label = entry["sparse_layers"], f"update {number}"
        self._layers = entry["updates"][number]["layers"]
        self._step = int(data["step"][number])
        self._method = _method(entry["config"], self._shapes, entry["sparsities"])
        require(self._method.due(self._step - 1), f"no update after {self._step} steps")
        fraction = float(data["drop_fraction"][number])
        close("drop fraction", self._method.fraction_at(self._step - 1), fraction, 1e-12)

    def _all(self, what: str) -> dict[str, Tensor]:
        keys = {name: f"{what}__{name}" for name in self._shapes}
        return {
            name: torch.from_numpy(self._data[key][self._number].copy())
            for name, key in keys.items()
            if key in self._data
        }

    def check(self) -> None:
        masks = self._all("mask_before")
        layers = {name: nn.Linear(1, 1, bias=False) for name in self._shapes}
        for name, weight in self._all("weights_before").items():
            layers[name].weight = nn.Parameter(weight)
        model = nn.ModuleDict(layers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        for name, momentum in self._all("momentum_before").items():
            optimizer.state[layers[name].weight]["momentum_buffer"] = momentum * masks[name]
        sparsifier = sparse.Sparsifier(
            model,
            optimizer,
            self._method,
            num_active={f"{name}.weight": int(mask.sum()) for name, mask in masks.items()},
            maskable=[f"{name}.weight" for name in masks],
            masks={f"{name}.weight": mask for name, mask in masks.items()},
            hooks=False,
        )
        batches = self._all("batch_grads")
        if not batches:
            batches = {name: grad[None] for name, grad in self._all("dense_grad").items()}
        number = len(next(iter(batches.values())))
        state = sparsifier.state_dict() | {"step": self._step - number}
        sparsifier.load_state_dict(state)
        for index in range(number):
            for name, gradients in batches.items():
                layers[name].weight.grad = gradients[index].clone()
            sparsifier.before_step()
            sparsifier.after_step()
        require(sparsifier.num_updates == 1, f"{sparsifier.num_updates} updates instead of one")
        for name, expected in self._all("mask_after").items():
            self._compare(name, sparsifier.masks[f"{name}.weight"], expected)
            if self._exact:
                weight = layers[name].weight.detach()
                close(f"{self._label}, {name}", weight, self._all("weights_after")[name], 0.0)
        for name, expected in self._all("momentum_after").items() if self._exact else ():
            buffer = optimizer.state[layers[name].weight]["momentum_buffer"]
            close(f"{self._label}, momentum of {name}", buffer, expected, 0.0)

    def _compare(self, name: str, found: Tensor, expected: Tensor) -> None:
        label, known = f"{self._label}, {name}", self._layers[name]
        rows = found.flatten(1).sum(1)
        ablated = (rows == 0).nonzero().flatten().tolist()
        require(ablated == known["ablated"], f"{label}: rows {ablated} are ablated")
        require(set(rows.tolist()) <= {0, known["fan_in"]}, f"{label}: another fan-in")
        require(int(found.sum()) == known["n_ones_after"], f"{label}: another number of weights")
        if self._exact:
            same(label, found, expected.numpy())
