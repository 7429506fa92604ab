"""The sparse flags of main.py, the factory arguments they give, and the planned costs."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import nn

import sparse
from image_classification.flags import flag, ineffective
from sparse import costs
from sparse.methods.allocation import plan_layers


@dataclass(frozen=True, kw_only=True)
class SparseFlags:
    """How the network is made and kept sparse."""

    sparse_method: (
        Literal["dense", "static", "set", "rigl", "snfs", "snip", "gmp", "rigl_reset"] | None
    ) = flag(None, "how the network becomes sparse; dense by default (docs/methods.md)")
    static_topo: int = flag(0, "1: --sparse-method static (spelling of the earlier port)")
    sparsity: float | None = flag(None, "fraction of zero weights, in [0, 1)")
    dense_allocation: float | None = flag(None, "1 - sparsity (spelling of the earlier port)")
    distribution: Literal["uniform", "er", "erk"] | None = flag(
        None, "how sparsity is spread over layers; erk by default", "--sp-distribution"
    )
    power_scale: float = flag(1.0, "exponent of the ERK ratio", "--erk-power-scale")
    dense_layers: list[str] | None = flag(
        None, "globs of layers kept dense; by default uniform's first layer", nargs="*"
    )
    sparsity_map: str | None = flag(None, "YAML file of layer globs and their sparsities")
    delta_t: int = flag(100, "optimizer steps between topology updates", "--delta")
    t_start: int = flag(0, "optimizer step of the first topology update")
    t_end_fraction: float = flag(
        0.75, "share of all steps after which the topology is frozen", "--T-end-percent"
    )
    t_end: int | None = flag(None, "the same as an optimizer step, in place of the fraction")
    drop_fraction: float = flag(0.3, "first share of connections replaced", "--alpha")
    drop_anneal: Literal["cosine", "constant", "linear", "exponential"] = flag(
        "cosine", "how the drop fraction falls"
    )
    drop_power: float | None = flag(None, "exponent of --drop-anneal exponential")
    drop_fraction_min: float = flag(0.0, "what the cosine of snfs ends at")
    drop_noise: float = flag(0.0, "standard deviation of noise on |w| when dropping")
    grow_init: Literal["zeros", "gradient", "random"] = flag("zeros", "weights of new connections")
    initial_acc_scale: float = flag(0.0, "momentum of rigl's new connections per gradient")
    redistribution: Literal["momentum", "magnitude", "nonzero", "numel", "none"] = flag(
        "momentum", "what a layer's share of snfs's growth follows; none: counts stay"
    )
    growth: Literal["momentum", "random"] = flag("momentum", "where snfs grows")
    scope: Literal["layer", "global"] = flag(
        "layer", "rank weights within layers or over all (snip, gmp)", "--snip-scope", "--gmp-scope"
    )
    prune_start: int = flag(0, "optimizer step at which gmp starts")
    prune_end: int | None = flag(None, "step of gmp's final sparsity; by default --t-end-fraction")
    prune_every: int = flag(100, "optimizer steps between gmp's prunings")
    drop_masks: bool = flag(
        False,
        "take the weights of a sparse --resume or --pretrained-from-file without its masks",
    )
    grad_compress: Literal["none", "active", "bf16", "active+bf16"] = flag(
        "none", "what several processes send of their gradients: active weights only, or bfloat16"
    )


LAYER_FLAGS = "sparsity distribution power_scale dense_layers sparsity_map "
UPDATE_FLAGS = LAYER_FLAGS + (
    "delta_t t_start t_end t_end_fraction drop_fraction drop_anneal drop_power "
)
METHOD_FLAGS = {  # the flags that have an effect, named as the arguments of sparse's factories
    "dense": "",
    "static": LAYER_FLAGS,
    "set": UPDATE_FLAGS + "drop_noise grow_init",
    "rigl": UPDATE_FLAGS + "drop_noise grow_init initial_acc_scale",
    "rigl_reset": UPDATE_FLAGS + "drop_noise",
    "snfs": UPDATE_FLAGS + "drop_fraction_min redistribution growth grow_init",
    "snip": LAYER_FLAGS + "scope",
    "gmp": LAYER_FLAGS + "scope prune_start prune_end prune_every t_end_fraction",
}

SENDS_ALL = {  # methods for which sending only active weights saves nothing
    "dense": "whose weights are all active",
    "snfs": "which needs the gradients of all weights at every step",
}


def resolve(flags: SparseFlags) -> SparseFlags:
    """Return `flags` with the earlier port's spellings replaced and everything checked.

    Raises:
        ValueError: A value out of range, a contradiction, or a flag without effect; one line.
    """
    method, sparsity = flags.sparse_method, flags.sparsity
    if flags.dense_allocation is not None:
        if sparsity is not None:
            raise ValueError("--sparsity and --dense-allocation say the same: give one of them")
        sparsity = float(1 - Decimal(str(flags.dense_allocation)))
        method = method or ("static" if flags.static_topo else "rigl")
    if flags.static_topo not in (0, 1):
        raise ValueError(f"--static-topo must be 0 or 1, got {flags.static_topo}")
    if flags.static_topo and method != "static":
        raise ValueError("--static-topo 1 needs --dense-allocation; or use --sparse-method static")
    method = method or "dense"
    used = METHOD_FLAGS[method].split()
    resolved = dataclasses.replace(flags, sparse_method=method, sparsity=sparsity)
    names = {f.name for f in dataclasses.fields(flags)} - {"sparse_method", "static_topo", *used}
    names -= {"dense_allocation", "drop_masks", "grad_compress"}
    unused = ineffective(
        resolved, [(False, " ".join(sorted(names)), f"another --sparse-method than {method}")]
    )
    if unused:
        raise ValueError("; ".join(unused))
    if "active" in flags.grad_compress and method in SENDS_ALL:
        raise ValueError(
            f"--grad-compress {flags.grad_compress} has no effect with --sparse-method {method}, "
            f"{SENDS_ALL[method]}; use none or bf16"
        )
    if "sparsity" in used and sparsity is None:
        raise ValueError(f"--sparse-method {method} needs --sparsity")
    if flags.t_end is not None and flags.t_end_fraction != SparseFlags.t_end_fraction:
        raise ValueError("--t-end and --t-end-fraction say the same: give one of them")
    if not 0 < flags.t_end_fraction <= 1:
        raise ValueError(f"--t-end-fraction must be in (0, 1], got {flags.t_end_fraction}")
    return resolved


def arguments(flags: SparseFlags, total_steps: int) -> dict[str, Any]:
    """Return the arguments of the method's factory that `flags` decide.

    Raises:
        ValueError: The topology would change beyond the run, or the sparsity map cannot be read.
    """
    assert flags.sparse_method is not None
    used = {n: getattr(flags, n) for n in METHOD_FLAGS[flags.sparse_method].split()}
    if fraction := used.pop("t_end_fraction", None):
        end = "prune_end" if flags.sparse_method == "gmp" else "t_end"
        if used[end] is None:
            used[end] = int(fraction * total_steps)
        elif used[end] > total_steps:
            name = "--" + end.replace("_", "-")
            raise ValueError(f"{name} {used[end]} is beyond the run's {total_steps} steps")
    if used.get("sparsity_map") is not None:
        used["sparsity_map"] = read_map(Path(used["sparsity_map"]))
    if used and flags.sparse_method not in ("snip", "gmp"):  # their global scope has none
        used["distribution"] = used["distribution"] or "erk"
    return used


def record(flags: SparseFlags, total_steps: int) -> dict[str, Any]:
    """Return the flags that a checkpoint keeps, with what follows from the run's length resolved.

    The sparsity map is there with its content, and `t_end` in place of the fraction.
    """
    return {
        "sparse_method": flags.sparse_method,
        "grad_compress": flags.grad_compress,
        **arguments(flags, total_steps),
    }


def spell(kept: Mapping[str, Any]) -> str:
    """Return what `record` made as words of a command line."""
    method = str(kept["sparse_method"])
    words = [f"--sparse-method {method}"]
    defaults = SparseFlags()
    for name in METHOD_FLAGS[method].split():
        value = kept.get(name)
        if value is None or value == getattr(defaults, name):
            continue
        if isinstance(value, Mapping):
            value = f"FILE with {dict(value)}"
        elif isinstance(value, list):
            value = " ".join(value)
        words.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(words)


def read_map(path: Path) -> dict[str, float]:
    """Return the sparsities that a YAML file gives to layers, by glob."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--sparsity-map {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(
        isinstance(v, int | float) for v in content.values()
    ):
        raise ValueError(f"--sparsity-map {path}: must map layer globs to sparsities")
    return {str(name): float(value) for name, value in content.items()}


def sparse_plan(model: nn.Module, flags: SparseFlags, *, total_steps: int) -> dict[str, Any]:
    """Return the sparse part of the plan: the method and the exact counts of every layer.

    With the global scope the counts of single layers are not known before training: null.
    """
    shapes = {name: tuple(p.shape) for name, p in sparse.prunable(model).items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    given = arguments(flags, total_steps)
    counts: dict[str, int] = sizes
    if given:
        names = [*LAYER_FLAGS.split(), "scope"]
        counts = dict(plan_layers(model, **{n: given[n] for n in names if n in given}).num_active)
    end = every = None
    updates = 0
    if flags.sparse_method == "gmp":
        start, end, every = given["prune_start"], given["prune_end"], given["prune_every"]
        updates = sparse.num_updates(every, start, end, total_steps)
        updates += (end - start) % every != 0 and end < total_steps  # it prunes at its end, too
    elif "t_end" in given:
        start, end, every = given["t_start"], given["t_end"], given["delta_t"]
        updates = sparse.num_updates(every, start, end, total_steps)
    known = given.get("scope") != "global"
    return {
        "method": flags.sparse_method,
        "sparsity": given.get("sparsity"),
        "distribution": (given["distribution"] or "erk") if given and known else None,
        "delta_t": every,
        "drop_fraction": given.get("drop_fraction"),
        "t_end": end,
        "num_updates": updates,
        "overall_sparsity": 1 - sum(counts.values()) / sum(sizes.values()),
        "layers": [
            {
                "name": name,
                "shape": list(shapes[name]),
                "num_active": count if known else None,
                "density": count / sizes[name] if known else None,
            }
            for name, count in counts.items()
        ],
    }


def cost_plan(
    model: nn.Module, flags: SparseFlags, *, image_size: int, total_steps: int
) -> dict[str, Any] | None:
    """Return FLOPs and bytes (see `sparse.costs.report`), in the published convention.

    The training ratio is relative to dense training of the same length. With the global scope
    nothing is known before training: None.
    """
    layers = costs.trace_layers(model, image_size)
    given = arguments(flags, total_steps)
    if not given:
        return costs.report(layers, method="dense")
    if given.get("scope") == "global":
        return None
    shared = plan_layers(model, **{name: given[name] for name in LAYER_FLAGS.split()})
    ramp = None
    if flags.sparse_method == "gmp":
        ramp = costs.gmp_mean_ramp(
            start=given["prune_start"],
            end=given["prune_end"],
            every=given["prune_every"],
            total_steps=total_steps,
        )
    return costs.report(
        layers,
        {name: 1 - zeros for name, zeros in shared.sparsities.items()},
        method=str(flags.sparse_method),
        delta_t=given.get("delta_t", 100),
        mean_ramp=ramp,
        num_active=shared.num_active,
    )
