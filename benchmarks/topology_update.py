"""What one topology update costs: RigL and SET on all 25.5 million weights of ResNet-50.

The median CPU time of whole updates as training performs them (drop, grow, new masks, weights and
momentum zeroed), one thread. Also times widened networks, to show that the cost grows linearly with
the weights. Prints a table; with --json also one JSON object with rigl_cpu_seconds and
set_cpu_seconds, the larger figure of the two distributions.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout

import sparse

CONFIGURATIONS = {"uniform 0.9": ("uniform", 0.9), "ERK 0.8": ("erk", 0.8)}


def build(width: int) -> nn.Module:
    """Build a ResNet-50 whose bottlenecks are `width` / 64 times as wide."""
    torch.manual_seed(0)
    return torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [3, 4, 6, 3], width_per_group=width
    )


def update_seconds(method: str, model: nn.Module, rounds: int, **options: Any) -> float:
    """Measure the median CPU time of an update, an ordinary step with random gradients between."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    sparsifier = {"rigl": sparse.rigl, "set": sparse.set}[method](
        model,
        optimizer,
        delta_t=2,
        t_end=10**6,
        drop_anneal="constant",
        hooks=False,
        **options,
    )
    times = []
    for _ in range(2 * (rounds + 1)):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        updates = sparsifier.is_update_step
        before = cpu_seconds(sparsifier.before_step)
        optimizer.step()
        after = cpu_seconds(sparsifier.after_step)
        if updates:
            times.append(before if method == "rigl" else after)
    return statistics.median(times[1:])


def cpu_seconds(work: Callable[[], None]) -> float:
    """Measure the CPU time of a call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--widths", type=int, nargs="*", default=[32, 64, 128])
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("ResNet-50, drop fraction 0.3, 1 thread; CPU time of one topology update, medians")
    worst = {"rigl": 0.0, "set": 0.0}
    for name, (distribution, sparsity) in CONFIGURATIONS.items():
        for method in worst:
            seconds = update_seconds(
                method,
                build(64),
                arguments.rounds,
                sparsity=sparsity,
                distribution=distribution,
            )
            worst[method] = max(worst[method], seconds)
            print(f"{method:5} {name:12} {1e3 * seconds:6.0f} ms")
    for width in arguments.widths:
        model = build(width)
        weights = sum(weight.numel() for weight in sparse.prunable(model).values())
        seconds = update_seconds("rigl", model, arguments.rounds, sparsity=0.9)
        print(
            f"rigl  ERK 0.9, {weights / 1e6:5.1f} M weights {1e3 * seconds:6.0f} ms, "
            f"{1e9 * seconds / weights:.1f} ns per weight"
        )
    if arguments.json:
        seconds_of = {f"{name}_cpu_seconds": round(value, 4) for name, value in worst.items()}
        print(json.dumps(seconds_of))


if __name__ == "__main__":
    main()
