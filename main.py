"""Train a network, dense or sparse: `python main.py DATA [flags]`.

The composition root: it parses the flags, builds the harness (image_classification), attaches a
sparse-training method (sparse) and runs.
"""

from image_classification import preemption

if __name__ == "__main__":
    preemption.listen()  # before torch: importing it takes seconds, and a signal would kill

import contextlib
import dataclasses
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
from image_classification import build, checkpoint, config, distributed
from image_classification.config import Config
from image_classification.data import DataError
from image_classification.log import Logger, run_metadata
from image_classification.preemption import Preempted
from image_classification.run import Extension
from image_classification.trainer import TrainingError
from sparse import costs
from sparse_flags import SparseFlags, arguments, cost_plan, resolve, sparse_plan

DESCRIPTION = "Train a network, dense or sparse, on a directory of images."


def create_sparsifier(
    model: nn.Module, optimizer: Optimizer, total_steps: int, seed: int, *, flags: SparseFlags
) -> sparse.Sparsifier | None:
    """Hook the sparse method of `flags` to `optimizer`; a dense run is left alone."""
    assert flags.sparse_method is not None
    if flags.sparse_method == "dense":
        return None
    factory = getattr(sparse, flags.sparse_method)
    also = {"seed": seed, "track_exploration": True}
    accepted = inspect.signature(factory).parameters
    sparsifier: sparse.Sparsifier = factory(
        model,
        optimizer,
        **arguments(flags, total_steps),
        **{name: value for name, value in also.items() if name in accepted},
    )
    return sparsifier


def attach(
    model: nn.Module, optimizer: Optimizer, total_steps: int, seed: int, *, flags: SparseFlags
) -> Extension:
    """Join the sparse method of `flags` to training."""
    sparsifier = create_sparsifier(model, optimizer, total_steps, seed, flags=flags)
    if sparsifier is None:
        return Extension()

    def metrics(*, per_layer: bool) -> dict[str, float]:
        values = sparsifier.metrics().items()
        return {f"sparse.{k}": v for k, v in values if k.startswith("sparsity.") == per_layer}

    masked_at = -1

    def prepare_ema(averaged: nn.Module) -> None:
        # Averages at zero of weights at zero stay there until the masks move.
        nonlocal masked_at
        if sparsifier.num_updates != masked_at:
            sparsifier.apply_to(averaged)
            masked_at = sparsifier.num_updates

    return Extension(
        metrics=functools.partial(metrics, per_layer=False),
        epoch_metrics=functools.partial(metrics, per_layer=True),
        bar=("sparse.sparsity",),
        prepare_ema=prepare_ema,
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


def check_sparsity(c: Config, flags: SparseFlags, start: build.Start, model: nn.Module) -> None:
    """Raise ValueError (one line) if flags do not fit the network, the run or its checkpoint.

    Args:
        c: The flags of the trainer.
        flags: The sparse flags.
        start: Where the run begins.
        model: The network on the meta device, where trying it out costs nothing.
    """
    if c.evaluate:
        return
    if c.optimizer == "apex-sgd":  # needs a GPU to exist
        c = dataclasses.replace(c, optimizer="sgd")
    optimizer = build.create_optimizer(c, model, torch.device("meta"))
    create_sparsifier(model, optimizer, c.epochs * start.steps.steps_per_epoch, 0, flags=flags)
    if start.path and flags.sparse_method != "dense":
        saved = checkpoint.entry(start.state, "sparse", start.path)["method"]
        if saved != flags.sparse_method:
            raise ValueError(
                f"{start.path} was trained with --sparse-method {saved}, not {flags.sparse_method}"
            )


def prepare(argv: Sequence[str], stack: contextlib.ExitStack) -> Callable[[], None]:
    """Return what the command line asks for, ready to be called.

    Args:
        argv: The flags.
        stack: Takes what has to be closed at the end.

    Raises:
        ValueError: A user's mistake, in one line.
        Preempted: The process was asked to stop before it had begun.
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
    stack.enter_context(preemption.listening(c.preempt_grace))
    dataset = build.inspect(c)
    with torch.device("meta"):
        model = build.create_model(c, dataset)
    start = build.prepare(c, dataset, model)
    check_sparsity(c, flags, start, model)
    if preemption.requested():
        raise Preempted
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
    run = build.build(c, dataset, start, world=world, logger=logger, attach=join)
    stack.callback(run.close)
    return run.evaluate if c.evaluate else run.fit


def main(argv: Sequence[str]) -> int:
    """Run the command line.

    Returns:
        The exit status: 0; 1 for training that cannot go on; 2 for a user's mistake or bad data;
        75 for a run that was asked to stop and continues with --resume auto.
    """
    with contextlib.ExitStack() as stack:
        try:
            try:
                action = prepare(argv, stack)
            except ValueError as error:  # later ones are bugs, which show their traceback
                print(f"main.py: error: {error}", file=sys.stderr)
                return 2
            action()
        except DataError as error:
            print(f"main.py: error: {error}", file=sys.stderr)
            return 2
        except TrainingError as error:
            print(f"main.py: error: {error}", file=sys.stderr)
            return 1
        except Preempted:
            signal = preemption.requested() or "a signal to another rank"
            print(f"main.py: stopped by {signal}: --resume auto goes on", file=sys.stderr)
            return preemption.EXIT_STATUS
    return 0


def _fail(error: Exception) -> int:
    print(f"main.py: error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
