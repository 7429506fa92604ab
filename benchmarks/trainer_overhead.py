"""Our training step against a bare hand-written loop of the same model and batch.

Rounds of both alternate in one process; the ratio is the median over rounds of CPU time, which
hardly depends on what else the machine does. Prints a table; with --json also one JSON object.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout

from image_classification import optim, optimizers
from image_classification.distributed import World
from image_classification.log import Logger
from image_classification.models import create_model
from image_classification.trainer import Precision, Trainer


class Repeat:
    """A loader that yields one batch again and again."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self._batch = images, targets

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield self._batch


def make(arch: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = create_model(arch, num_classes=1000)
    groups = optimizers.parameter_groups(model, weight_decay=1e-4, bn_weight_decay=False)
    return model, torch.optim.SGD(groups, lr=0.01, momentum=0.9, foreach=True)


def bare(arch: str, images: Tensor, targets: Tensor) -> Callable[[int], None]:
    model, optimizer = make(arch)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    model.train()

    def steps(count: int) -> None:
        for _ in range(count):
            loss(model(images), targets).backward()
            optimizer.step()
            optimizer.zero_grad()

    return steps


def ours(arch: str, images: Tensor, targets: Tensor) -> Callable[[int], None]:
    model, optimizer = make(arch)
    world = World(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    trainer = Trainer(
        model, optimizer, lambda step: 0.01, optim.create_loss(0.1),
        world=world, precision=Precision(),
    )  # fmt: skip
    loader: Any = Repeat(images, targets)
    logger = Logger(raport=None, append=False, console=None)

    epochs = itertools.count()

    def steps(count: int) -> None:
        trainer.train_epoch(loader, next(epochs), steps=count, logger=logger, print_freq=10)

    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="steps per round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = arguments.image_size
    images = torch.randn(arguments.batch_size, 3, size, size)
    targets = torch.randint(1000, (arguments.batch_size,))
    sides = {
        "bare": bare(arguments.arch, images, targets),
        "trainer": ours(arguments.arch, images, targets),
    }
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    for steps in sides.values():
        steps(3)
    for _ in range(arguments.rounds):
        for name, steps in sides.items():
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            steps(arguments.steps)
            cpu[name].append((time.process_time() - cpu_start) / arguments.steps)
            wall[name].append((time.perf_counter() - wall_start) / arguments.steps)
    ratios = [a / b for a, b in zip(cpu["trainer"], cpu["bare"], strict=True)]
    walls = [a / b for a, b in zip(wall["trainer"], wall["bare"], strict=True)]
    for name in sides:
        print(
            f"{name:8} CPU {1000 * statistics.median(cpu[name]):8.1f} ms/step"
            f"   wall {1000 * statistics.median(wall[name]):8.1f} ms/step"
        )
    result = {
        "trainer_over_bare": round(statistics.median(ratios), 4),
        "trainer_over_bare_wall": round(statistics.median(walls), 4),
        "spread": [round(min(ratios), 4), round(max(ratios), 4)],
    }
    print(f"trainer / bare: {result['trainer_over_bare']} (CPU time)")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
