"""Recorded events of the original AC/DC: compressions, decompressions, and steps after them.

Where the original prunes all weights that tie with its threshold, fewer are left than there should
be. There, what it kept must be among what is kept here.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sparse
from sparse.methods import Acdc
from sparse.methods.allocation import Allocation
from tests.golden_compare import Check, close, require, same

Arrays = Mapping[str, Any]


def schedule_settings(compressions: list[int], decompressions: list[int], end: int) -> Any:
    """Tell the settings by two lists of events."""
    first, second = compressions[:2]
    return {
        "total_steps": end,
        "dense_warmup": first,
        "sparse_phase": decompressions[0] - first,
        "dense_phase": second - decompressions[0],
        "last_dense": compressions[-1] - decompressions[-1],
        "last_sparse": end - compressions[-1],
    }


AT_ONCE = schedule_settings([1, 3], [2], 4)  # a compression after step 0, a decompression after 1


def acdc_cases(path: Path) -> Iterator[tuple[str, Check]]:
    """List the cases of the tables."""
    content = json.loads(path.read_text())
    if path.name == "acdc_schedules.json":
        for length, entry in content.items():
            yield length, partial(_check_schedule, int(length), entry)
        return
    shapes = content["shapes"]
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    inner = {name: size for name, size in sizes.items() if name not in ("conv1", "fc")}
    for kind, of in (("global54", sizes), ("global52", inner)):
        for sparsity, kept in content.get(kind, {}).items():
            yield (
                f"{kind} {sparsity}",
                partial(_check_count, {"all": sum(of.values())}, sparsity, {"all": kept}),
            )
    for sparsity, layers in content.get("uniform52", {}).items():
        yield f"uniform52 {sparsity}", partial(_check_count, sizes, sparsity, layers)
    dense = content["forward_flops"]["0.0"]["total"]
    for sparsity, ratios in content["train_flops_vs_100_dense_epochs_derived"].items():
        pruned = content["forward_flops"][sparsity]["total"]
        for length, ratio in ratios.items():
            yield (
                f"training {sparsity} {length}",
                partial(_check_cost, int(length), dense, pruned, ratio),
            )


def _check_schedule(length: int, entry: Mapping[str, Any]) -> None:
    given = entry["compress_at"], entry["decompress_at"], length
    method = Acdc(sparsity=0.5, **schedule_settings(*given))
    expected = dict.fromkeys(entry["compress_at"], True)
    expected |= dict.fromkeys(entry["decompress_at"], False)
    require(method.events == expected, "the events are at other steps")
    is_sparse, phases = False, ""
    for step in range(length):
        is_sparse = method.events.get(step, is_sparse)
        phases += "S" if is_sparse else "D"
    require(phases == entry["phases"], "the phases are others")


def _check_count(sizes: Mapping[str, int], sparsity: str, expected: Mapping[str, int]) -> None:
    method = Acdc(sparsity=float(sparsity), **AT_ONCE)
    for name, kept in expected.items():
        found = method.num_final(sizes[name], float(sparsity))
        require(found == kept, f"{name}: {found} of {sizes[name]} weights are kept, not {kept}")


def _check_cost(length: int, dense: float, pruned: float, ratio: float) -> None:
    """Check the costs of the published schedule: 10, 5, 5, 10 and 15 epochs."""
    compressions = [*range(10, length - 29, 10), length - 15]
    decompressions = [*range(15, length - 34, 10), length - 25]
    method = Acdc(sparsity=0.5, **schedule_settings(compressions, decompressions, length))
    close("training", method.step_flops(dense, pruned) / (3 * dense) * length / 100, ratio, 1e-6)


def check_pruner(data: Arrays, path: Path) -> None:
    """Check one compression."""
    names = [str(name) for name in data["order"]]
    weights = {name: torch.from_numpy(data[f"weights_{name}"]) for name in names}
    masks = {name: torch.from_numpy(data[f"mask_before_{name}"]) for name in names}
    sparsity = float(data["sparsity"])
    scope = "global" if path.stem.startswith("acdc_global") else "layer"
    allocation = Allocation(sparsities=dict.fromkeys(names, sparsity))
    method = Acdc(sparsity=sparsity, scope=scope, allocation=allocation, **AT_ONCE)
    masked = {name: weights[name] * masks[name] for name in names}
    new = method.update(masks, masked, {}, 0, {})
    groups = [names] if scope == "global" else [[name] for name in names]
    for group in groups:
        numel = sum(masks[name].numel() for name in group)
        active = sum(int(masks[name].sum()) for name in group)
        kept = sum(int(new[name].sum()) for name in group)
        wanted = min(method.num_final(numel, sparsity), active)
        require(kept == wanted, f"{kept} weights are kept, not {wanted}")
    for name in names:
        expected = torch.from_numpy(data[f"expected_mask_{name}"])
        require(not (expected & ~new[name]).any(), f"{name}: the original kept other weights")
        kept = int(data[f"expected_kept_{name}"])
        require(int(expected.sum()) == kept, f"{name}: the file contradicts itself")


def _names(data: Arrays, prefix: str) -> list[str]:
    return [key.removeprefix(prefix) for key in data if key.startswith(prefix)]


def _network(
    weights: Mapping[str, Any], momentum: float = 0.875, weight_decay: float = 0.0
) -> tuple[nn.Module, dict[str, nn.Parameter], torch.optim.SGD]:
    """Build layers with some weights, a bias beside them, and SGD at rate 0."""
    layers = [nn.Linear(1, 1, bias=index == 0) for index in range(len(weights))]
    model = nn.Sequential(*layers)
    for layer, weight in zip(layers, weights.values(), strict=True):
        layer.weight = nn.Parameter(torch.from_numpy(weight.copy()))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.0, momentum=momentum, weight_decay=weight_decay
    )
    found = {name: layer.weight for name, layer in zip(weights, layers, strict=True)}
    return model, found, optimizer


def _attach(
    model: nn.Module,
    optimizer: torch.optim.SGD,
    method: Acdc,
    masks: Mapping[str, Any],
    pruned: list[int],
    step: int,
) -> sparse.Sparsifier:
    sizes = {name: weight.numel() for name, weight in sparse.prunable(model).items()}
    counts = dict(sizes)
    first = {f"{index}.weight": torch.from_numpy(mask) for index, mask in masks.items()}
    counts |= {name: int(mask.sum()) for name, mask in first.items()}
    sparsifier = sparse.Sparsifier(
        model,
        optimizer,
        method,
        num_active=counts,
        maskable=[f"{index}.weight" for index in pruned],
        masks=first,
    )
    sparsifier.load_state_dict(sparsifier.state_dict() | {"step": step, "num_updates": 1})
    return sparsifier


def check_restore(data: Arrays, path: Path) -> None:
    """Check a decompression: all weights active, those that were not at 0."""
    names = _names(data, "mask_before_")
    model, weights, optimizer = _network({n: data[f"weights_before_{n}"] for n in names})
    masks = {index: data[f"mask_before_{name}"] for index, name in enumerate(names)}
    method = Acdc(sparsity=0.5, **AT_ONCE)
    sparsifier = _attach(model, optimizer, method, masks, list(masks), 1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for index, name in enumerate(names):
        same(name, sparsifier.masks[f"{index}.weight"], data[f"expected_mask_{name}"])
        close(name, weights[name].detach(), data[f"expected_weights_{name}"], 0.0)


def check_run(data: Arrays, path: Path) -> None:
    """Check the events of a run and the steps after them, each event by itself."""
    events = [(int(epoch), str(kind) == "compress") for epoch, kind in data["events"]]
    names = _names(data, f"e{events[0][0]}_before_weights_")
    modules = [str(name) for name in data["modules"]]
    pruned = [index for index, name in enumerate(names) if name in modules]
    sparsity = float(data["sparsity"])
    method = Acdc(
        sparsity=sparsity,
        scope="global" if "global" in path.stem else "layer",
        allocation=Allocation(sparsities={f"{index}.weight": sparsity for index in pruned}),
        **AT_ONCE,
    )
    for epoch, is_sparse in events:
        run = _Event(data, names, pruned, method, epoch, is_sparse)
        run.check_masks()
        if f"e{epoch}_step0_lr" in data:
            run.check_steps()


class _Event:
    """One event of a run."""

    def __init__(
        self,
        data: Arrays,
        names: list[str],
        pruned: list[int],
        method: Acdc,
        epoch: int,
        is_sparse: bool,
    ) -> None:
        self._data, self._names, self._epoch, self._is_sparse = data, names, epoch, is_sparse
        self._model, self._weights, self._optimizer = _network(
            self._all("before_weights"), float(data["momentum_factor"]), float(data["weight_decay"])
        )
        key = f"e{epoch}_before_mask_"
        shapes = {index: self._weights[names[index]].shape for index in pruned}
        masks = {
            index: data.get(key + names[index], np.ones(shape, dtype=bool))
            for index, shape in shapes.items()
        }
        self._sparsifier = _attach(
            self._model, self._optimizer, method, masks, pruned, 0 if is_sparse else 1
        )
        self._put_momentum("step0_pre_momentum")
        for parameter in self._model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            self._optimizer.state[parameter].setdefault(
                "momentum_buffer", parameter.detach().clone()
            )
        self._optimizer.step()

    def _all(self, what: str) -> dict[str, Any]:
        found = {name: f"e{self._epoch}_{what}_{name}" for name in self._names}
        return {name: self._data[key] for name, key in found.items() if key in self._data}

    def _put_momentum(self, what: str) -> None:
        for name, value in self._all(what).items():
            weight, mask = self._weights[name], self._mask(name)
            buffer = torch.from_numpy(value.copy()) * mask
            self._optimizer.state[weight]["momentum_buffer"] = buffer

    def _mask(self, name: str) -> Tensor:
        return self._sparsifier.masks[f"{self._names.index(name)}.weight"]

    def check_masks(self) -> None:
        expected = self._all("after_mask")
        for name in self._names:
            wanted = expected.get(name)
            same(f"epoch {self._epoch}, {name}", self._mask(name), wanted) if (
                wanted is not None
            ) else require(bool(self._mask(name).all()), f"{name} is not dense")
            before = torch.from_numpy(self._data[f"e{self._epoch}_before_weights_{name}"])
            close(name, self._weights[name].detach(), before * self._mask(name), 0.0)
        held = [state for state in self._optimizer.state.values() if state]
        require(bool(held) == self._is_sparse, "momentum is reset at a decompression alone")

    def check_steps(self) -> None:
        """Take the steps after the event; without the original's reset momentum is another."""
        if not self._is_sparse and not self._data[f"e{self._epoch}_step0_reset_requested"]:
            return
        if self._is_sparse:
            self._put_momentum("step0_pre_momentum")
        state = self._sparsifier.state_dict() | {"step": 10**6}  # no event comes any more
        self._sparsifier.load_state_dict(state)
        for number in (0, 1):
            step = f"step{number}"
            self._optimizer.param_groups[0]["lr"] = float(self._data[f"e{self._epoch}_{step}_lr"])
            gradients = self._all(f"{step}_grad")
            self._optimizer.zero_grad()
            for name, gradient in gradients.items():
                self._weights[name].grad = torch.from_numpy(gradient.copy())
            self._optimizer.step()
            for what, expected in (
                ("weights", self._all(f"{step}_post_weights")),
                ("momentum", self._all(f"{step}_post_momentum")),
            ):
                for name, value in expected.items():
                    weight, mask = self._weights[name], self._mask(name)
                    state = self._optimizer.state[weight]["momentum_buffer"]
                    found = weight.detach() if what == "weights" else state
                    label = f"epoch {self._epoch}, {step}, {what} of {name}"
                    close(label, found, torch.from_numpy(value) * mask, 5e-8)
