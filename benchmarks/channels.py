"""Measure what the removal of dead channels gains: `python benchmarks/channels.py DATA --out OUT`.

The small network of benchmarks/convergence.py is trained on CIFAR-10 at high sparsity. Then the
channels that do nothing are removed (export.py --compact-channels), and torch and ONNX Runtime run
both dense networks in turn, on one thread. Times are medians of processor time, ratios are medians
over pairs: above 1 where the smaller network is faster. Every run is a JSON line of OUT.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cifar import RECIPES, load
from benchmarks.cifar_run import Run, Training, accuracy
from benchmarks.inference import interleave, median_ratio, rival
from sparse import costs, runtime

RUNTIMES = ("torch", "onnxruntime")
SIZE = 32


def trained(run: Run, data: dict[str, Any]) -> nn.Module:
    """Return the network of a finished run."""
    training = Training(run, data, torch.device("cpu"), graph=False)
    while training.epoch < run.epochs:
        training.train_epoch()
    return training.model


def channels(model: nn.Module) -> int:
    """Count the output channels of convolutions and linear layers."""
    layers = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    return sum(layer.weight.shape[0] for layer in layers)


def compare(model: nn.Module, smaller: nn.Module, batch: int, rounds: int) -> dict[str, Any]:
    """Time both networks with each runtime; give milliseconds and ratios."""
    images = torch.randn(batch, 3, SIZE, SIZE)
    found: dict[str, Any] = {}
    for name in RUNTIMES:
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            runs = {
                "before": rival(name, model, images, 1, Path(one)),
                "after": rival(name, smaller, images, 1, Path(other)),
            }
            times = interleave(runs, images, rounds=rounds, clock=time.process_time)
        found[name] = {key: round(sorted(t)[len(t) // 2], 4) for key, t in times.items()}
        found[name]["ratio"] = median_ratio(times["before"], times["after"])
    return found


def measure(run: Run, data: dict[str, Any], batches: Sequence[int], rounds: int) -> dict[str, Any]:
    """Train a network, remove its dead channels, and describe both networks."""
    model = trained(run, data)
    smaller = runtime.compact_channels(model, torch.randn(2, 3, SIZE, SIZE))
    macs = [
        sum(layer.macs for layer in costs.trace_layers(network, SIZE))
        for network in (model, smaller)
    ]
    prepare = RECIPES[run.arch].prepare
    top1 = [accuracy(network, data["val"], prepare) for network in (model, smaller)]
    model.eval()
    smaller.eval()
    return {
        "method": run.method,
        "sparsity": run.sparsity,
        "seed": run.seed,
        "channels": [channels(model), channels(smaller)],
        "macs": macs,
        "top1": top1,
        **{f"batch {batch}": compare(model, smaller, batch, rounds) for batch in batches},
    }


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure networks without their dead channels.")
    add = parser.add_argument
    add("data", type=Path, help="folder of CIFAR-10 with train/ and val/")
    add("--out", type=Path, required=True, help="results, JSON lines; appended")
    add("--methods", nargs="+", default=["rigl", "srigl"])
    add("--sparsities", type=float, nargs="+", default=[0.98, 0.99])
    add("--seeds", type=int, nargs="+", default=[0])
    add("--epochs", type=int, default=RECIPES["small"].epochs)
    add("--batch", type=int, nargs="+", default=[1, 64])
    add("--rounds", type=int, default=51)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    data = load(args.data, torch.device("cpu"))
    for sparsity in args.sparsities:
        for method in args.methods:
            for seed in args.seeds:
                run = Run(method, sparsity, seed, args.epochs)
                result = json.dumps(measure(run, data, args.batch, args.rounds))
                print(result, flush=True)
                with args.out.open("a") as file:
                    file.write(result + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
