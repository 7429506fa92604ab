"""Hold the library to input/output pairs of the original implementations.

    python -m tests.golden DIR

reads every .npz and .json file of DIR, prints a line per failure and then "N passed, M failed", and
exits with status 1 if any failed. The name of a file says what it holds:

* tf1_{rigl,set,static,momentum,snip}_*.npz, tf1_gmp*.npz, tf1_drop_fraction_schedules.json:
  google-research/rigl and tensorflow.contrib.model_pruning under TensorFlow 1.15. There, inactive
  variables keep stale values; here they are 0, so weights and momenta are compared where active.
* snfs_*.npz, snfs_index.json: TimDettmers/sparse_learning, one or several updates in a row.
* rigl_erk_densities.{json,npz}: layer densities of ResNet-50 and MobileNet-v1.
* granet_*.npz, granet_{index,schedules}.json: VITA-Group/GraNet, ImageNet and CIFAR code.
* gap_*.npz, gap_{counts,step_lists}.json: boone891214/GaP; index.json: that and AC/DC.
* srigl_*.npz, srigl_{index,tables}.json: calgaryml/condensed-sparsity.
* acdc_{global,uniform,restore,run}*.npz, acdc_{schedules,resnet50_counts}.json: IST-DASLab/ACDC.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import sparse
from sparse.methods import Method, Rigl, RiglReset, Set, Snfs
from sparse.methods.allocation import Allocation
from tests.golden_acdc import acdc_cases, check_pruner, check_restore, check_run
from tests.golden_compare import (
    MismatchError,
    close,
    decimal,
    distribution,
    require,
    same,
    torch_order,
)
from tests.golden_gap import (
    check_cycle,
    check_edges,
    check_one_run,
    check_parallel,
    check_prune,
    check_random,
    check_ratio,
    gap_cases,
)
from tests.golden_gap import index_cases as gap_index_cases
from tests.golden_granet import check_granet, granet_cases, granet_index_cases
from tests.golden_snfs import check_snfs
from tests.golden_srigl import check_srigl, srigl_cases, srigl_index_cases
from tests.golden_tables import (
    Check,
    density_array_cases,
    density_cases,
    index_cases,
    prune_rate_cases,
    schedule_cases,
)

Arrays = Mapping[str, Any]
NAME = "0.weight"


def check_directory(directory: Path) -> Iterator[tuple[str, str | None]]:
    """Yield every case of a directory with None, or with what is wrong."""
    for path in sorted(directory.iterdir()):
        if path.suffix not in (".npz", ".json"):
            continue
        for case, check in cases(path):
            try:
                check()
            except (MismatchError, ValueError, KeyError, RuntimeError, AssertionError) as error:
                yield f"{path.name}: {case}", f"{type(error).__name__}: {error}"
            else:
                yield f"{path.name}: {case}", None


def cases(path: Path) -> Iterator[tuple[str, Check]]:
    """List the cases of a file: most hold one."""
    if path.name == "rigl_erk_densities.npz":
        yield from density_array_cases(path)
    elif path.name == "rigl_erk_densities.json":
        yield from density_cases(path)
    elif path.name == "tf1_drop_fraction_schedules.json":
        yield from schedule_cases(path)
    elif path.name == "tf1_index.json":
        yield from index_cases(path)
    elif path.name == "snfs_index.json":
        yield from prune_rate_cases(path)
    elif path.suffix == ".json" and path.stem.startswith("acdc_"):
        yield from acdc_cases(path)
    elif path.name == "granet_schedules.json":
        yield from granet_cases(path)
    elif path.suffix == ".json" and path.stem.startswith("gap_"):
        yield from gap_cases(path)
    elif path.name == "index.json":
        yield from gap_index_cases(path)
    elif path.name == "srigl_tables.json":
        yield from srigl_cases(path)
    elif path.name == "srigl_index.json":
        yield from srigl_index_cases(path)
    elif path.name == "granet_index.json":
        yield from granet_index_cases(path)
    elif path.suffix == ".npz" and (check := _check_for(path.stem)) is not None:
        yield "update", partial(check, dict(np.load(path)), path)
    else:
        yield "kind", _unknown


def _check_for(stem: str) -> Callable[[Arrays, Path], None] | None:
    checks = {
        r"tf1_rigl_.*_nonoise": check_ties,
        r"tf1_rigl_": check_rigl,
        r"tf1_set_": check_set,
        r"tf1_static_": check_reset,
        r"tf1_momentum_": check_momentum,
        r"tf1_snip_": check_snip,
        r"tf1_gmp": check_gmp,
        r"snfs_": check_snfs,
        r"granet_": check_granet,
        r"srigl_": check_srigl,
        r"gap_prune_": check_prune,
        r"gap_random_": check_random,
        r"gap_cyclic_": check_cycle,
        r"gap_onerun_": check_one_run,
        r"gap_parallel_": check_parallel,
        r"gap_global_ratio_": check_ratio,
        r"gap_edge_": check_edges,
        r"acdc_(global|uniform)_": check_pruner,
        r"acdc_restore_": check_restore,
        r"acdc_run_": check_run,
    }
    return next((check for start, check in checks.items() if re.match(start, stem)), None)


def _unknown() -> None:
    raise MismatchError("no check is known for files of this name")


# One topology update of one layer ----------------------------------------------------------------


def check_rigl(data: Arrays, path: Path) -> None:
    """Check RigL's update, which takes the place of the optimizer step."""
    step = int(data.get("step", 0))
    fraction = float(data.get("drop_fraction", data.get("initial_drop_fraction")))
    anneal = "cosine" if "step" in data else "constant"
    settings = _settings(data, t_end=int(data.get("end_step", 1)), drop_anneal=anneal)
    method = Rigl(**settings | {"drop_fraction": fraction})
    new = sparse.NewConnections(momentum_scale=float(data.get("initial_acc_scale", 0.0)))
    _check_update(data, method, step, [data["dense_grad"]], new)


def check_set(data: Arrays, path: Path) -> None:
    """Check SET with the original's random scores."""
    scores = torch.from_numpy(data["grow_scores"])
    method = Set(**_settings(data), draw=lambda shape, key: scores)
    _check_update(data, method, 0, [data["dense_grad"]])


def check_reset(data: Arrays, path: Path) -> None:
    """Check the method that the RigL repository calls static."""
    _check_update(data, RiglReset(**_settings(data)), 0, [data["dense_grad"]])


def check_momentum(data: Arrays, path: Path) -> None:
    """Check growth by the average of several gradients, the last of which comes with the update."""
    gradients = list(data["dense_grads"])
    last = len(gradients) - 1
    settings = _settings(data, t_start=last, t_end=last + 1)
    method = Snfs(**settings, redistribution="none")
    sparsifier = _check_update(data, method, 0, gradients)
    close("ema", sparsifier.state_dict()["averages"][NAME], data["ema"], 1e-6)


def check_ties(data: Arrays, path: Path) -> None:
    """Check ties with the original's drop noise off: it ranks inactive entries as score 0."""
    mask = torch.from_numpy(data["mask"]).bool()
    weight, gradient = (torch.from_numpy(data[key]) for key in ("weights", "dense_grad"))
    method = Rigl(**_settings(data))
    count = method.num_dropped(NAME, 0)
    new = sparse.drop_and_grow(mask, weight, gradient, count, active_first=False)
    same("mask", new, data["expected_mask"])
    if "zero_active" not in path.stem:  # there, an inactive entry may be kept with a stale value
        _check_update(data, method, 0, [data["dense_grad"]])


def _settings(data: Arrays, **others: Any) -> dict[str, Any]:
    """Give the settings of a method that updates one layer at every step."""
    common = {"sparsity": 0.0, "delta_t": 1, "t_end": 1, "drop_anneal": "constant"}
    if "drop_fraction" in data:
        common["drop_fraction"] = float(data["drop_fraction"])
    return common | {"allocation": Allocation(num_active=_counts(data))} | others


def _check_update(
    data: Arrays,
    method: Method,
    step: int,
    gradients: Sequence[Any],
    new_connections: sparse.NewConnections | None = None,
) -> sparse.Sparsifier:
    """Run the optimizer steps of a case and compare mask, weights and momentum after them."""
    model, optimizer = _model([data["weights"]], [data.get("momentum")])
    old = torch.from_numpy(data["mask"]).bool()
    sparsifier = sparse.Sparsifier(
        model,
        optimizer,
        method,
        num_active=_counts(data),
        maskable=[NAME],
        masks={NAME: old},
        new_connections=new_connections,
    )
    sparsifier.load_state_dict(sparsifier.state_dict() | {"step": step})
    weight = next(model.parameters())
    for gradient in gradients:
        weight.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    require(sparsifier.num_updates == 1, f"{sparsifier.num_updates} updates instead of one")
    active = sparsifier.masks[NAME]
    same("mask", active, data["expected_mask"])
    if "n_new" in data:
        count = int((active & ~old).sum())
        require(count == int(data["n_new"]), f"{count} new connections, not {data['n_new']}")
    close("weights", weight.detach()[active], data["expected_weights"][active.numpy()], 0.0)
    momentum = optimizer.state[weight].get("momentum_buffer", torch.zeros_like(weight))
    close("momentum", momentum[active], data["expected_momentum"][active.numpy()], 1e-6)
    for what, tensor in (("weights", weight.detach()), ("momentum", momentum)):
        require(not tensor[~active].any(), f"inactive {what} are not zero")
    return sparsifier


def _counts(data: Arrays) -> dict[str, int]:
    return {NAME: int(data["mask"].sum())}


def _model(weights: Sequence[Any], momenta: Sequence[Any]) -> tuple[nn.Module, torch.optim.SGD]:
    """Build layers with the given weights and SGD as the originals ran it: Nesterov, lr 0."""
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in weights))
    for layer, weight in zip(model, weights, strict=True):
        layer.weight = nn.Parameter(torch.from_numpy(weight.copy()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, nesterov=True)
    for layer, momentum in zip(model, momenta, strict=True):
        if momentum is not None:
            buffer = torch.from_numpy(momentum.copy())
            optimizer.state[layer.weight]["momentum_buffer"] = buffer
    return model, optimizer


# Whole networks ----------------------------------------------------------------------------------


def check_snip(data: Arrays, path: Path) -> None:
    """Check SNIP, layer by layer, before the first step."""
    count = sum(key.startswith("weights_") for key in data)
    weights, gradients, expected = (
        [torch_order(data[f"{key}_{layer}"]) for layer in range(count)]
        for key in ("weights", "grad", "expected_mask")
    )
    model, optimizer = _model(weights, [None] * count)
    for layer, gradient in zip(model.children(), gradients, strict=True):
        layer.weight.grad = torch.from_numpy(gradient.copy())
    kind = path.stem.removeprefix("tf1_snip_")
    sparsifier = sparse.snip(
        model,
        optimizer,
        sparsity=decimal(data["sparsity"]),
        distribution=distribution(kind),
        dense_layers=(),
        sparsity_map={"0": 0.5} if kind == "random" else None,
    )
    optimizer.step()
    require(sparsifier.step == int(data["global_step_after_snip"]), "SNIP's batch counts as a step")
    for layer, mask in enumerate(expected):
        same(f"mask {layer}", sparsifier.masks[f"{layer}.weight"], mask)
    optimizer.step()
    require(sparsifier.step == int(data["global_step_after_next"]), "the next step does not count")


def check_gmp(data: Arrays, path: Path) -> None:
    """Check gradual pruning along its ramp."""
    model, optimizer = _model([data["weights"]], [None])
    begin, end, target = int(data["begin"]), int(data["end"]), decimal(data["target"])
    sparsifier = sparse.gmp(
        model,
        optimizer,
        sparsity=target,
        distribution="uniform",
        dense_layers=(),
        prune_start=begin,
        prune_end=end,
        prune_every=int(data["frequency"]),
    )
    weight = next(model.parameters())
    for index, step in enumerate(data["steps"].tolist()):
        sparsifier.load_state_dict(sparsifier.state_dict() | {"step": step})
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        same(f"mask after step {step}", sparsifier.masks[NAME], data["masks"][index])
        ramp = sparse.cubic_sparsity(step, begin, end, target)
        close(f"sparsity at step {step}", ramp, data["sparsity_function"][index], 1e-6)


def main() -> int:
    """Check the directory named on the command line."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print("usage: python -m tests.golden DIR", file=sys.stderr)
        return 2
    results = list(check_directory(Path(sys.argv[1])))
    failures = [(case, reason) for case, reason in results if reason is not None]
    for case, reason in failures:
        print(f"FAILED {case}: {reason}")
    print(f"{len(results) - len(failures)} passed, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
