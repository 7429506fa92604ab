"""Train a network, dense or sparse: `python main.py DATA [flags]`.

The composition root: it parses the flags, builds the harness (image_classification), attaches a
sparse-training method (sparse) and runs.
"""

import contextlib
import functools
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import sparse
from image_classification import build, config, distributed
from image_classification.config import Config
from image_classification.data import DataError
from image_classification.log import Logger, run_metadata
from image_classification.run import Extension
from sparse import costs
from sparse_flags import SparseFlags, arguments, cost_plan, resolve, sparse_plan

DESCRIPTION = "Train a network, dense or sparse, on a directory of images."


def attach(
    model: nn.Module, optimizer: Optimizer, total_steps: int, seed: int, *, flags: SparseFlags
) -> Extension:
    """Hook the sparse method of `flags` to `optimizer`; a dense run is left alone."""
    assert flags.sparse_method is not None
    if flags.sparse_method == "dense":
        return Extension()
    factory = getattr(sparse, flags.sparse_method)
    also = {"seed": seed, "track_exploration": True}
    accepted = inspect.signature(factory).parameters
    sparsifier = factory(
        model,
        optimizer,
        **arguments(flags, total_steps),
        **{name: value for name, value in also.items() if name in accepted},
    )

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


class CheckpointCosts:
    """Sparsity and costs of a checkpoint, from the masks it holds; dense without masks.

    Args:
        model: The network of the checkpoint.
        image_size: Side of its input.
    """

    def __init__(self, model: nn.Module, *, image_size: int) -> None:
        self._layers = costs.trace_layers(model, image_size)
        self._sizes = {name: p.numel() for name, p in sparse.prunable(model).items()}
        self._active = dict(self._sizes)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: an evaluation saves nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count the masks of the "sparse" entry of a checkpoint."""
        for name, mask in state["masks"].items():
            self._active[name] = int(sparse.unpack(mask["bits"], mask["shape"]).sum())

    def metrics(self) -> dict[str, float]:
        """Return overall sparsity, FLOPs and size, in the published convention."""
        densities = {name: count / self._sizes[name] for name, count in self._active.items()}
        report = costs.report(self._layers, densities, num_active=self._active)
        shown = ("inference_flops", "inference_ratio", "size_mb")
        overall = 1 - sum(self._active.values()) / sum(self._sizes.values())
        return {"sparse.sparsity": overall, **{f"sparse.{name}": report[name] for name in shown}}

    def layers(self) -> dict[str, float]:
        """Return the sparsity of every layer."""
        return {
            f"sparse.sparsity.{name.removesuffix('.weight')}": 1 - count / self._sizes[name]
            for name, count in self._active.items()
        }


def report_costs(
    model: nn.Module, optimizer: Optimizer, total_steps: int, seed: int, *, image_size: int
) -> Extension:
    """Let an evaluation report the sparsity and the costs of its checkpoint."""
    found = CheckpointCosts(model, image_size=image_size)
    return Extension(metrics=found.metrics, epoch_metrics=found.layers, state={"sparse": found})


def dry_run(c: Config, flags: SparseFlags) -> str:
    """Return the resolved plan as one JSON object; no data and no device is touched."""
    dataset = build.inspect(c)
    plan = build.plan(c, dataset, world_size=distributed.world_from_env().world_size)
    with torch.device("meta"):
        model = build.create_model(c, dataset)
    steps = plan["total_steps"]
    plan["sparse"] = sparse_plan(model, flags, total_steps=steps)
    plan["cost"] = cost_plan(model, flags, image_size=plan["image_size"], total_steps=steps)
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
    logger.parameters({**run_metadata(), **distributed.environment(), **vars(c), **vars(flags)})
    join: build.Attach = functools.partial(attach, flags=flags)
    if c.evaluate:
        join = functools.partial(report_costs, image_size=build.image_size(c))
    run = build.build(c, dataset, world=world, logger=logger, attach=join)
    stack.callback(run.close)
    return run.evaluate if c.evaluate else run.fit


def main(argv: Sequence[str]) -> int:
    """Run the command line; return its exit status: 0, or 2 for a user's mistake or bad data."""
    with contextlib.ExitStack() as stack:
        try:
            action = prepare(argv, stack)
        except ValueError as error:
            return _fail(error)
        try:
            action()
        except DataError as error:
            return _fail(error)
    return 0


def _fail(error: Exception) -> int:
    print(f"main.py: error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
