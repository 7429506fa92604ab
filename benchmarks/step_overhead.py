"""What sparsity costs an ordinary training step: ResNet-50 with and without masks, side by side.

A dense and a sparse model take their steps in turn in one process with one thread, the order
changing from round to round; the figure is the median over rounds of the ratio of CPU times. Where
the allocator puts a model moves its times by some percent, so this repeats with fresh pairs, the
sparse model built first in every second one. No topology update falls into the measured steps (see
topology_update.py). Prints a table; with --json also one JSON object {"erk_0.8": ratio,
"uniform_0.9": ratio}.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout

import sparse

CONFIGURATIONS = {"erk_0.8": ("erk", 0.8), "uniform_0.9": ("uniform", 0.9)}


def trainer(batch: tuple[Tensor, Tensor]) -> tuple[nn.Module, torch.optim.SGD, Callable[[], None]]:
    """Build a network, its optimizer, and a function that takes one step."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    return model, optimizer, step


def cpu_seconds(work: Callable[[], object]) -> float:
    """Measure the CPU time of a call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def sparse_trainer(
    name: str, batch: tuple[Tensor, Tensor]
) -> tuple[sparse.Sparsifier, Callable[[], None]]:
    """Build the same with one of the configurations; the sparsifier comes with the step."""
    distribution, sparsity = CONFIGURATIONS[name]
    model, optimizer, step = trainer(batch)
    sparsifier = sparse.rigl(
        model,
        optimizer,
        sparsity=sparsity,
        distribution=distribution,
        delta_t=10**9,
        t_end=10**9 + 1,
    )
    return sparsifier, step


def measure(name: str, pairs: int, rounds: int, batch: tuple[Tensor, Tensor]) -> float:
    """Compare one sparse configuration with dense training; print a line."""
    dense, masked, masking = [], [], []
    for pair in range(pairs):
        if pair % 2:
            sparsifier, sparse_step = sparse_trainer(name, batch)
            _, _, dense_step = trainer(batch)
        else:
            _, _, dense_step = trainer(batch)
            sparsifier, sparse_step = sparse_trainer(name, batch)
        for _ in range(3):  # the first step is the one topology update
            dense_step()
            sparse_step()
        for number in range(rounds):
            both = [(dense, dense_step), (masked, sparse_step)]
            for times, step in both if number % 2 else reversed(both):
                times.append(cpu_seconds(step))
            masking.append(cpu_seconds(sparsifier._before_step))  # what the hook calls
    ratio = statistics.median(b / a for a, b in zip(dense, masked, strict=True))
    weights = sum(weight.numel() for weight in sparsifier.maskable.values())
    gates = sum(gate.nbytes for gate in sparsifier._gates.values())
    print(
        f"{name:12} dense {1e3 * statistics.median(dense):6.1f} ms   "
        f"sparse {1e3 * statistics.median(masked):6.1f} ms   ratio {ratio:.3f}   "
        f"masking alone {1e3 * statistics.median(masking):5.1f} ms   "
        f"{gates / weights:.2f} bytes per weight"
    )
    return ratio


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=6, help="pairs of models (default 6)")
    parser.add_argument("--rounds", type=int, default=8, help="steps of each pair (default 8)")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    batch = torch.randn(4, 3, 64, 64), torch.randint(0, 1000, (4,))
    print("ResNet-50, batch 4, 64x64, 1 thread, SGD with momentum; CPU time of a step, medians")
    ratios = {
        name: round(measure(name, arguments.pairs, arguments.rounds, batch), 4)
        for name in CONFIGURATIONS
    }
    if arguments.json:
        print(json.dumps(ratios))


if __name__ == "__main__":
    main()
