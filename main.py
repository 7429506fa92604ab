"""Train a network, dense or sparse: `python main.py DATA [flags]`.

The composition root: it parses the flags, builds the harness (image_classification), attaches a
sparse-training method (sparse) and runs.
"""

from image_classification import preemption, versions

if __name__ == "__main__":
    preemption.listen()  # before torch: importing it takes seconds, and a signal would kill
    versions.require()

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cli import beginning, weights
from cli.flags import RETIRED, create_method, of_command_line, resolve
from cli.join import attach, report_costs, try_out
from cli.metrics import FORMATS
from cli.plan import cost_plan, sparse_plan
from cli.program import DISTRIBUTION, fail, say
from cli.resume import check_sparsity, saved_masks
from image_classification import build, config, distributed
from image_classification.config import Config
from image_classification.data import DataError
from image_classification.log import Logger, run_metadata
from image_classification.preemption import Preempted
from image_classification.trackers import open_tracker
from image_classification.trainer import TrainingError
from sparse import SparsityError, __version__, costs

DESCRIPTION = "Train a network, dense or sparse, on a directory of images."


def dry_run(c: Config, flags: Any) -> str:
    """Return the resolved plan as one JSON object; no data and no device is touched."""
    dataset = build.inspect(c)
    plan = build.plan(c, dataset, world_size=distributed.world_from_env().world_size)
    model = build.sketch_model(c, dataset)
    steps, began = plan["total_steps"], None
    if flags.from_sparse is not None:
        new = dataclasses.replace(c, resume=None)
        start = build.prepare(new, dataset, model, read_weights=beginning.read)
        flags, began = beginning.begin(flags, start)
    try_out(c, flags, model, steps, began)
    num_active = None if began is None else began.num_active
    method = create_method(flags, steps, c.epochs, begins_with=num_active)
    method = method and method.fitted_to(model)
    found = sparse_plan(model, method, total_steps=steps)
    plan["sparse"] = {"method": flags.sparse_method, **found}
    plan["cost"] = cost_plan(model, method, image_size=plan["image_size"], total_steps=steps)
    return json.dumps(plan)


def prepare(argv: Sequence[str], stack: contextlib.ExitStack) -> Callable[[], None]:
    """Return what the command line asks for, ready to be called.

    Args:
        argv: The flags.
        stack: Takes what has to be closed at the end.

    Raises:
        ValueError: A user's mistake, in one line.
        Preempted: The process was asked to stop before it had begun.
    """
    retired = config.RETIRED | RETIRED
    sections = Config, of_command_line(argv)
    c, flags = config.parse(argv, *sections, description=DESCRIPTION, retired=retired)
    if c.version:
        facts = run_metadata(project=__version__, distribution=DISTRIBUTION)
        return functools.partial(print, *(f"{k}: {v}" for k, v in facts.items()), sep="\n")
    c, set_by_fast = config.speed_up(c, has_gpu=torch.cuda.is_available())
    c = beginning.take_weights(c, flags)
    config.check(c)
    flags = resolve(flags, resumes=c.resume is not None and not c.evaluate)
    if c.fsdp and flags.grad_compress != "none":
        raise ValueError("--grad-compress is for the all-reduce of DDP: drop it, or --fsdp")
    if c.dry_run:
        return functools.partial(print, dry_run(c, flags))
    stack.enter_context(preemption.listening(c.preempt_grace))
    c = build.adopt(c)
    dataset = build.inspect(c)
    model = build.sketch_model(c, dataset)
    reads = weights.read if flags.from_sparse is None else beginning.read
    start = build.prepare(c, dataset, model, read_weights=reads)
    flags, began = beginning.begin(flags, start)
    notes = check_sparsity(c, flags, start, model, began)
    if preemption.requested():
        raise Preempted
    stack.callback(distributed.stop)
    world = distributed.start(cpu=c.cpu, deterministic=c.deterministic)
    logger = Logger(
        raport=Path(c.workspace) / c.raport_file,
        append=c.resume is not None,
        tensorboard=Path(c.tensorboard) if c.tensorboard else None,
        open_tracker=functools.partial(
            open_tracker,
            c.log_to,
            project=c.log_project,
            folder=Path(c.workspace),
            resumed=c.resume is not None,
        )
        if c.log_to
        else None,
        console=c.console,
        formats=FORMATS,
        enabled=world.is_main,
    )
    stack.callback(logger.close)
    machine = run_metadata(project=__version__, distribution=DISTRIBUTION)
    layers = costs.trace_layers(model, build.image_size(c), include=flags.include)
    lengths: dict[str, Any] = {
        "steps_per_epoch": start.steps.steps_per_epoch,
        "images_per_step": start.steps.optimizer_batch_size,
        "dense_flops": costs.inference_flops(layers),
    }
    facts = {**machine, **distributed.environment(), **lengths}
    logger.parameters(facts | vars(c) | vars(flags))
    join: build.Attach = functools.partial(
        attach, flags=flags, epochs=c.epochs, layers=layers, beginning=began
    )
    if c.evaluate:
        saved = saved_masks(c, start)
        join = functools.partial(
            report_costs,
            image_size=build.image_size(c),
            num_active=saved.num_active(),
            block=saved.flags.get("block"),
        )
    if began is not None and began.masks is not None:
        logger.message(began.about)
    if set_by_fast:
        logger.message(f"--fast sets {set_by_fast}")
    for note in [*config.advice(c), *notes]:
        logger.warning(note)
    run = build.build(c, dataset, start, world=world, logger=logger, attach=join)
    stack.callback(run.close)
    if flags.grad_compress != "none" and world.world_size == 1:
        logger.message(f"--grad-compress {flags.grad_compress}: one process has nothing to send")
    if c.fsdp and world.world_size == 1:
        logger.message("--fsdp: one process has nothing to shard")
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
                return fail("main.py", error)
            action()
        except (DataError, TrainingError, SparsityError) as error:
            return fail("main.py", error, status=2 if isinstance(error, DataError) else 1)
        except Preempted:
            signal = preemption.requested() or "a signal to another rank"
            say(f"main.py: stopped by {signal}: --resume auto goes on")
            return preemption.EXIT_STATUS
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
