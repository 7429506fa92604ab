"""Hold the library to input/output pairs of the original implementations.

    python -m tests.golden DIR

reads every .npz and .json file of DIR, prints a line per failure and then "N passed, M failed", and
exits with status 1 if any failed. The name of a file says what it holds:

* tf1_{rigl,set,static,momentum,snip}_*.npz, tf1_gmp*.npz, tf1_drop_fraction_schedules.json:
  google-research/rigl and tensorflow.contrib.model_pruning under TensorFlow 1.15. There, inactive
  variables keep stale values; here they are 0, so weights and momenta are compared where active.
* snfs_*.npz, snfs_index.json: TimDettmers/sparse_learning, one or several updates in a row.
* rigl_erk_densities.{json,npz}: layer densities of ResNet-50 and MobileNet-v1.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sparse
from sparse.methods import GradientMomentum, Method, Rigl, RiglReset, Set
from sparse.redistribution import Snfs, layer_shares, num_removed

Arrays = Mapping[str, Any]
Check = Callable[[], None]
NAME = "0.weight"


class MismatchError(Exception):
    """The library and the original disagree."""


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
        yield from _density_array_cases(path)
    elif path.name == "rigl_erk_densities.json":
        yield from _density_cases(path)
    elif path.name == "tf1_drop_fraction_schedules.json":
        yield from _schedule_cases(path)
    elif path.name == "tf1_index.json":
        yield from _index_cases(path)
    elif path.name == "snfs_index.json":
        yield from _prune_rate_cases(path)
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
    drop = sparse.DropFraction(fraction, 0, int(data.get("end_step", 1)), anneal)
    method = Rigl(_counts(data), sparse.Window(1, step, step + 1), drop)
    new = sparse.NewConnections(momentum_scale=float(data.get("initial_acc_scale", 0.0)))
    _check_update(data, method, step, [data["dense_grad"]], new)


def check_set(data: Arrays, path: Path) -> None:
    """Check SET with the original's random scores."""
    scores = torch.from_numpy(data["grow_scores"])
    method = Set(_counts(data), WINDOW, _constant(data), draw=lambda shape, key: scores)
    _check_update(data, method, 0, [data["dense_grad"]])


def check_reset(data: Arrays, path: Path) -> None:
    """Check the method that the RigL repository calls static."""
    _check_update(data, RiglReset(_counts(data), WINDOW, _constant(data)), 0, [data["dense_grad"]])


def check_momentum(data: Arrays, path: Path) -> None:
    """Check growth by the average of several gradients, the last of which comes with the update."""
    gradients = list(data["dense_grads"])
    last = len(gradients) - 1
    drop = sparse.DropFraction(float(data["drop_fraction"]), 0, last + 1, "constant")
    method = GradientMomentum(_counts(data), sparse.Window(1, last, last + 1), drop)
    sparsifier = _check_update(data, method, 0, gradients)
    _close("ema", sparsifier.state_dict()["averages"][NAME], data["ema"], 1e-6)


def check_ties(data: Arrays, path: Path) -> None:
    """Check ties with the original's drop noise off: it ranks inactive entries as score 0."""
    mask = torch.from_numpy(data["mask"]).bool()
    weight, gradient = (torch.from_numpy(data[key]) for key in ("weights", "dense_grad"))
    method = Rigl(_counts(data), WINDOW, _constant(data))
    count = method.num_dropped(NAME, 0)
    new = sparse.drop_and_grow(mask, weight, gradient, count, active_first=False)
    _same("mask", new, data["expected_mask"])
    if "zero_active" not in path.stem:  # there, an inactive entry may be kept with a stale value
        _check_update(data, method, 0, [data["dense_grad"]])


WINDOW = sparse.Window(1, 0, 1)


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
    _require(sparsifier.num_updates == 1, f"{sparsifier.num_updates} updates instead of one")
    active = sparsifier.masks[NAME]
    _same("mask", active, data["expected_mask"])
    if "n_new" in data:
        count = int((active & ~old).sum())
        _require(count == int(data["n_new"]), f"{count} new connections, not {data['n_new']}")
    _close("weights", weight.detach()[active], data["expected_weights"][active.numpy()], 0.0)
    momentum = optimizer.state[weight].get("momentum_buffer", torch.zeros_like(weight))
    _close("momentum", momentum[active], data["expected_momentum"][active.numpy()], 1e-6)
    for what, tensor in (("weights", weight.detach()), ("momentum", momentum)):
        _require(not tensor[~active].any(), f"inactive {what} are not zero")
    return sparsifier


def _counts(data: Arrays) -> dict[str, int]:
    return {NAME: int(data["mask"].sum())}


def _constant(data: Arrays) -> sparse.DropFraction:
    return sparse.DropFraction(float(data["drop_fraction"]), 0, 1, "constant")


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
        [_torch_order(data[f"{key}_{layer}"]) for layer in range(count)]
        for key in ("weights", "grad", "expected_mask")
    )
    model, optimizer = _model(weights, [None] * count)
    for layer, gradient in zip(model.children(), gradients, strict=True):
        layer.weight.grad = torch.from_numpy(gradient.copy())
    kind = path.stem.removeprefix("tf1_snip_")
    sparsifier = sparse.snip(
        model,
        optimizer,
        sparsity=_decimal(data["sparsity"]),
        distribution=_distribution(kind),
        dense_layers=(),
        sparsity_map={"0": 0.5} if kind == "random" else None,
    )
    optimizer.step()
    _require(
        sparsifier.step == int(data["global_step_after_snip"]), "SNIP's batch counts as a step"
    )
    for layer, mask in enumerate(expected):
        _same(f"mask {layer}", sparsifier.masks[f"{layer}.weight"], mask)
    optimizer.step()
    _require(sparsifier.step == int(data["global_step_after_next"]), "the next step does not count")


def check_gmp(data: Arrays, path: Path) -> None:
    """Check gradual pruning along its ramp."""
    model, optimizer = _model([data["weights"]], [None])
    begin, end, target = int(data["begin"]), int(data["end"]), _decimal(data["target"])
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
        _same(f"mask after step {step}", sparsifier.masks[NAME], data["masks"][index])
        ramp = sparse.cubic_sparsity(step, begin, end, target)
        _close(f"sparsity at step {step}", ramp, data["sparsity_function"][index], 1e-6)


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
        method = Snfs(
            baseline=float(data["baseline_nonzero"]),
            window=WINDOW,
            drop=sparse.DropFraction(rate, 0, 1, "constant"),
            layers=tuple(names),
            redistribution=_redistribution(entry, path.stem),
            growth="random" if uniforms else "momentum",
            draw=lambda shape, key, device, uniforms=uniforms: uniforms[names[key[2]]],
        )
        weights = {name: weights[name] * masks[name] for name in names}
        _check_statistics(data, number, masks, weights, momenta, method)
        masks = dict(method.update(masks, weights, momenta, 0, state))
        for name in names:
            expected = _output(data, "expected_mask_", name, number)
            _same(f"mask {name} of update {number}", masks[name], expected)
        adjustment = _output(data, "adjusted_growth_after", "", number)
        if adjustment is not None:
            _close(f"adjustment of update {number}", state["adjustment"], adjustment, 1e-9)
        weights = _layers(data, "weights_before_next_", names, number) or weights


def _check_statistics(
    data: Arrays,
    number: int,
    masks: dict[str, Tensor],
    weights: dict[str, Tensor],
    momenta: dict[str, Tensor],
    method: Snfs,
) -> None:
    shares = layer_shares(masks, weights, momenta, method.redistribution)
    active = torch.stack([mask.sum() for mask in masks.values()])
    sizes = [mask.numel() for mask in masks.values()]
    removed = num_removed(active, sizes, shares, method.drop(0))
    found = [("total_removed", "", removed.sum(), 0.0)]
    for index, name in enumerate(masks):
        found.append(("share_", name, shares[index], 1e-6))
        found.append(("removed_", name, removed[index], 0.0))
    for prefix, name, value, tolerance in found:
        expected = _output(data, prefix, name, number)
        if expected is not None:
            _close(f"{prefix}{name} of update {number}", value, expected, tolerance)


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


# Schedules, densities and indices ----------------------------------------------------------------


def _schedule_cases(path: Path) -> Iterator[tuple[str, Check]]:
    for case, values in json.loads(path.read_text()).items():
        anneal, window = case.split("/")
        begin, end = map(int, re.findall(r"\d+", window))
        name, _, power = anneal.partition("_")
        exponent = float(power or 1) if name == "exponential" else None
        drop = sparse.DropFraction(0.3, begin, end, name, exponent)
        yield case, partial(_check_schedule, drop, values.items(), FLOAT32)


def _prune_rate_cases(path: Path) -> Iterator[tuple[str, Check]]:
    for case, values in json.loads(path.read_text()).items():
        if match := re.fullmatch(r"cosine_prune_rate_T(\d+)", case):
            drop = sparse.DropFraction(0.5, 0, int(match[1]), "cosine", minimum=0.005)
            yield case, partial(_check_schedule, drop, values, 1e-9)


FLOAT32 = 2e-7  # the original computes schedules in float32, here they are doubles


def _check_schedule(
    drop: sparse.DropFraction, values: Iterable[tuple[Any, float]], tolerance: float
) -> None:
    for step, value in values:
        _close(f"at step {step}", drop(int(step)), value, tolerance)


def _density_cases(path: Path) -> Iterator[tuple[str, Check]]:
    content = json.loads(path.read_text())
    for case, expected in content.items():
        if not case.endswith("_layers"):
            parts = case.split("/")
            layers = content[f"{parts[0]}_layers"]
            density, nnz = expected["density"], expected.get("nnz")
            yield case, partial(_check_densities, parts, layers, density, nnz)


def _density_array_cases(path: Path) -> Iterator[tuple[str, Check]]:
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
    shapes = {layer["name"]: _torch_shape(layer["shape"]) for layer in layers}
    dense = ["conv1"] if "first_dense" in where else []
    dense += ["*.dw"] if "dw" in where else []
    arguments: dict[str, Any] = {
        "sparsity": float(sparsity),
        "distribution": _distribution(kind),
        "power_scale": float(power or 1.0),
        "dense_layers": dense,
    }
    found = [1.0 - value for value in sparse.layer_sparsities(shapes, **arguments).values()]
    _require(found == density, "densities are not bit-identical")
    if nnz is not None:
        _require(list(sparse.allocate(shapes, **arguments).values()) == nnz, "counts differ")


def _index_cases(path: Path) -> Iterator[tuple[str, Check]]:
    for entry in json.loads(path.read_text()):
        yield entry["file"], partial(_check_index, path.with_name(entry["file"]), entry)


def _check_index(path: Path, entry: Mapping[str, Any]) -> None:
    if not path.exists():
        return  # an index may list more files than a selection of them has
    data = np.load(path)
    for key in ("n_ones", "n_new"):
        if key in entry:
            _require(int(data[key]) == entry[key], f"{key} is not that of the file")


def _distribution(kind: str) -> str:
    names = {"random": "uniform", "erdos_renyi": "er", "erdos_renyi_kernel": "erk"}
    return names.get(kind, kind)


def _torch_shape(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[-1], shape[-2], *shape[:-2])


def _torch_order(array: Any) -> Any:
    """Bring a TensorFlow kernel (..., inputs, outputs) into PyTorch's order."""
    axes = range(array.ndim)
    return np.ascontiguousarray(array.transpose(_torch_shape(axes)))


def _decimal(value: Any) -> float:
    """Give the decimal number that a float32 stands for, such as 0.8."""
    return float(str(np.float32(value)))


# Comparing ---------------------------------------------------------------------------------------


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise MismatchError(message)


def _same(what: str, found: Tensor, expected: Any) -> None:
    different = int((found != torch.from_numpy(expected).bool()).sum())
    _require(different == 0, f"{what}: {different} entries differ")


def _close(what: str, found: Any, expected: Any, tolerance: float) -> None:
    distance = np.abs(np.asarray(found, dtype=np.float64) - np.asarray(expected, dtype=np.float64))
    worst = float(distance.max(initial=0.0))
    _require(worst <= tolerance, f"{what}: off by {worst:.3g}")


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
