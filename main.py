"""Train a network, dense or sparse: `python main.py DATA [flags]`.

The composition root: it parses the flags, builds the harness (image_classification), attaches a
sparse-training method (sparse) and runs. Nothing else imports both packages for training.
"""

import contextlib
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

import sparse
from image_classification import build, config, distributed
from image_classification.config import Config, flag
from image_classification.log import Logger, run_metadata
from image_classification.run import Extension

DESCRIPTION = "Train a network, dense or sparse, on a directory of images."


@dataclass(frozen=True, kw_only=True)
class SparseFlags:
    """How the network is made and kept sparse."""

    sparse_method: Literal["dense", "static", "set", "rigl"] | None = flag(
        None, "dense (default), static (random fixed mask), set or rigl"
    )
    static_topo: int = flag(0, "1: --sparse-method static (spelling of the earlier port)")
    sparsity: float | None = flag(None, "fraction of zero weights, in [0, 1)")
    dense_allocation: float | None = flag(None, "1 - sparsity (spelling of the earlier port)")
    distribution: Literal["uniform", "er", "erk"] = flag(
        "erk", "how sparsity is spread over layers", "--sp-distribution"
    )
    dense_layers: list[str] | None = flag(
        None, "globs of layers kept dense; by default uniform's first layer", nargs="*"
    )
    delta_t: int = flag(100, "optimizer steps between topology updates", "--delta")
    drop_fraction: float = flag(0.3, "first share of connections replaced", "--alpha")
    drop_anneal: Literal["cosine", "constant", "linear"] = flag(
        "cosine", "how the drop fraction falls"
    )
    t_end_fraction: float = flag(
        0.75, "share of all steps after which the topology is frozen", "--T-end-percent"
    )


LAYER_FLAGS = "sparsity distribution dense_layers "
UPDATE_FLAGS = LAYER_FLAGS + "delta_t drop_fraction drop_anneal t_end_fraction "
METHOD_FLAGS = {"dense": "", "static": LAYER_FLAGS, "set": UPDATE_FLAGS, "rigl": UPDATE_FLAGS}


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
    names -= {"dense_allocation"}
    unused = config.ineffective(
        resolved, [(False, " ".join(sorted(names)), f"another --sparse-method than {method}")]
    )
    if unused:
        raise ValueError("; ".join(unused))
    if "sparsity" in used and sparsity is None:
        raise ValueError(f"--sparse-method {method} needs --sparsity")
    if not 0 < flags.t_end_fraction <= 1:
        raise ValueError(f"--t-end-fraction must be in (0, 1], got {flags.t_end_fraction}")
    return resolved


def attach(
    model: nn.Module, optimizer: Optimizer, total_steps: int, seed: int, *, flags: SparseFlags
) -> Extension:
    """Hook the sparse method of `flags` to `optimizer`; a dense run is left alone."""
    assert flags.sparse_method is not None
    if flags.sparse_method == "dense":
        return Extension()
    arguments = {name: getattr(flags, name) for name in METHOD_FLAGS[flags.sparse_method].split()}
    if "t_end_fraction" in arguments:
        arguments["t_end"] = int(arguments.pop("t_end_fraction") * total_steps)
    factory = getattr(sparse, flags.sparse_method)
    sparsifier = factory(model, optimizer, seed=seed, track_exploration=True, **arguments)

    def metrics(*, per_layer: bool) -> dict[str, float]:
        values = sparsifier.metrics().items()
        return {f"sparse.{k}": v for k, v in values if k.startswith("sparsity.") == per_layer}

    return Extension(
        metrics=functools.partial(metrics, per_layer=False),
        epoch_metrics=functools.partial(metrics, per_layer=True),
        bar=("sparse.sparsity",),
        prepare_ema=sparsifier.apply_to,
        state={"sparse": sparsifier},
    )


def sparse_plan(model: nn.Module, flags: SparseFlags, *, total_steps: int) -> dict[str, Any]:
    """Return the sparse part of the plan: the method and the exact counts of every layer."""
    method = flags.sparse_method
    shapes = {name: tuple(p.shape) for name, p in sparse.prunable(model).items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    counts = sizes
    if method != "dense":
        counts = sparse.allocate(
            shapes,
            sparsity=flags.sparsity,
            distribution=flags.distribution,
            dense_layers=flags.dense_layers,
        )
    updates = method not in ("dense", "static")
    t_end = int(flags.t_end_fraction * total_steps)
    return {
        "method": method,
        "sparsity": flags.sparsity,
        "distribution": None if method == "dense" else flags.distribution,
        "delta_t": flags.delta_t if updates else None,
        "drop_fraction": flags.drop_fraction if updates else None,
        "t_end": t_end if updates else None,
        "num_updates": sparse.num_updates(flags.delta_t, 0, t_end, total_steps) if updates else 0,
        "overall_sparsity": 1 - sum(counts.values()) / sum(sizes.values()),
        "layers": [
            {"name": n, "shape": list(shapes[n]), "num_active": k, "density": k / sizes[n]}
            for n, k in counts.items()
        ],
    }


def dry_run(c: Config, flags: SparseFlags) -> str:
    """Return the resolved plan as one JSON object; no data and no device is touched."""
    dataset = build.inspect(c)
    plan = build.plan(c, dataset, world_size=distributed.world_from_env().world_size)
    with torch.device("meta"):
        model = build.create_model(c, dataset)
    plan["sparse"] = sparse_plan(model, flags, total_steps=plan["total_steps"])
    return json.dumps(plan)


def prepare(argv: Sequence[str], stack: contextlib.ExitStack) -> Callable[[], None]:
    """Return what the command line asks for, ready to be called.

    Args:
        argv: The flags.
        stack: Takes what has to be closed at the end.

    Raises:
        ValueError: A user's mistake, in one line.
    """
    parser = config.build_parser(Config, SparseFlags, description=DESCRIPTION)
    values = config.parse(parser, argv)
    c = config.section(Config, values)
    if c.version:
        return functools.partial(print, *(f"{k}: {v}" for k, v in run_metadata().items()), sep="\n")
    config.check(c)
    flags = resolve(config.section(SparseFlags, values))
    if c.dry_run:
        return functools.partial(print, dry_run(c, flags))
    dataset = build.inspect(c)
    stack.callback(distributed.stop)
    world = distributed.start(cpu=c.cpu)
    logger = Logger(
        raport=Path(c.workspace) / c.raport_file,
        append=c.resume is not None,
        tensorboard=Path(c.tensorboard) if c.tensorboard else None,
        enabled=world.is_main,
    )
    stack.callback(logger.close)
    logger.parameters({**run_metadata(), **vars(c), **vars(flags)})
    join = functools.partial(attach, flags=flags)
    run = build.build(c, dataset, world=world, logger=logger, attach=join)
    stack.callback(run.close)
    return run.evaluate if c.evaluate else run.fit


def main(argv: Sequence[str]) -> int:
    """Run the command line; return its exit status: 0, or 2 for a user's mistake."""
    with contextlib.ExitStack() as stack:
        try:
            action = prepare(argv, stack)
        except ValueError as error:
            print(f"main.py: error: {error}", file=sys.stderr)
            return 2
        action()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
