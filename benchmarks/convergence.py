"""Accuracy of every method on CIFAR-10: a small network, several sparsities, several seeds.

    python benchmarks/convergence.py DATA --out RESULTS

DATA holds train/<class>/*.jpg and val/<class>/*.jpg. Every finished run is a line of RESULTS
(JSON lines); runs that are there already are not repeated, so that an interrupted benchmark goes on
where it was. At the end it prints a table (mean and standard deviation over seeds) and with --plot
FILE draws accuracy against training FLOPs. A GPU is used if there is one.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout

import sparse
from sparse import costs

METHODS = ("dense", "static", "set", "snfs", "rigl", "gmp")
Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Run:
    """One training run; everything its result depends on."""

    method: str
    sparsity: float
    seed: int
    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    delta_t: int = 50
    drop_fraction: float = 0.3


def build() -> nn.Module:
    """Build a network of three strided convolutions and two linear layers: 288 thousand weights."""

    def convolution(inputs: int, outputs: int) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *convolution(3, 16),
        *convolution(16, 32),
        *convolution(32, 64),
        nn.Flatten(),
        nn.Linear(1024, 256, bias=False),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def attach(
    run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int
) -> sparse.Sparsifier | None:
    """Make the model sparse as the run says; the topology is frozen for the last quarter."""
    end = 3 * total_steps // 4
    shared: dict[str, Any] = {"sparsity": run.sparsity, "distribution": "erk"}
    updates = {"delta_t": run.delta_t, "t_end": end, "drop_fraction": run.drop_fraction}
    if run.method == "dense":
        return None
    if run.method == "static":
        return sparse.static(model, optimizer, seed=run.seed, **shared)
    if run.method == "gmp":
        ramp = {"prune_start": total_steps // 10, "prune_end": end, "prune_every": run.delta_t}
        return sparse.gmp(model, optimizer, **ramp, **shared)
    factories = {"set": sparse.set, "snfs": sparse.snfs, "rigl": sparse.rigl}
    return factories[run.method](model, optimizer, seed=run.seed, **updates, **shared)


def train(run: Run, data: dict[str, Split], device: torch.device) -> dict[str, Any]:
    """Train once and give accuracy and costs."""
    torch.manual_seed(run.seed)
    start = time.perf_counter()
    model = build().to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), run.lr, momentum=0.9, nesterov=True, weight_decay=run.weight_decay
    )
    total = run.epochs * (len(data["train"][1]) // run.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * step / total))
    )
    sparsifier = attach(run, model, optimizer, total)
    for _ in range(run.epochs):
        for images, labels in epoch(data["train"], run.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    return {
        **asdict(run),
        "top1": accuracy(model, data["val"]),
        "overall_sparsity": sparsifier.metrics()["sparsity"] if sparsifier else 0.0,
        **flops(run, sparsifier, total),
        "seconds": round(time.perf_counter() - start, 1),
        "device": device.type,
    }


def epoch(split: Split, batch_size: int) -> Iterator[Split]:
    """Shuffle a split and augment it: random flips and shifts by up to four pixels."""
    images, labels = split
    order = torch.randperm(len(labels)).to(labels.device)
    for index in order.split(batch_size):
        if len(index) < batch_size:
            return
        batch = normalize(images[index])
        batch = torch.where(
            torch.rand(batch_size, 1, 1, 1).to(batch.device) < 0.5, batch.flip(3), batch
        )
        padded = F.pad(batch, (4, 4, 4, 4))
        top, left = torch.randint(0, 9, (2,)).tolist()
        yield padded[:, :, top : top + 32, left : left + 32], labels[index]


def normalize(images: Tensor) -> Tensor:
    """Scale bytes to about unit variance."""
    return (images.float() - 120.0) / 62.0


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Compute top-1 accuracy in percent."""
    model.eval()
    images, labels = split
    hits = sum(
        int((model(normalize(chunk)).argmax(1) == answer).sum())
        for chunk, answer in zip(images.split(500), labels.split(500), strict=True)
    )
    return 100.0 * hits / len(labels)


def flops(run: Run, sparsifier: sparse.Sparsifier | None, steps: int) -> dict[str, float]:
    """Compute what the run and one inference of its network take, in multiplies and adds."""
    layers = costs.trace_layers(build(), 32)
    densities = {}
    if sparsifier is not None:
        densities = {
            name: int(mask.sum()) / mask.numel() for name, mask in sparsifier.masks.items()
        }
    report = costs.report(
        layers,
        densities,
        method=None if sparsifier is None else sparsifier.method,
        convention="true",
        total_steps=steps,
    )
    dense_run = 3.0 * report["dense_flops"] * steps * run.batch_size
    return {
        "inference_flops": report["inference_flops"],
        "training_flops": report["training_ratio"] * dense_run,
    }


def load(folder: Path, device: torch.device) -> dict[str, Split]:
    """Read the images of both splits as bytes."""
    data = {}
    for name in ("train", "val"):
        dataset = ImageFolder(str(folder / name), transform=pil_to_tensor)
        images, labels = zip(*dataset, strict=True)
        data[name] = torch.stack(images).to(device), torch.tensor(labels).to(device)
    return data


def finished(path: Path) -> list[dict[str, Any]]:
    """Read the runs that a results file holds."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def planned(arguments: argparse.Namespace) -> list[Run]:
    """List the runs asked for; dense training has no sparsity."""
    runs = []
    for seed in range(arguments.seeds):
        for sparsity in arguments.sparsities:
            for method in arguments.methods:
                run = Run(
                    method,
                    0.0 if method == "dense" else sparsity,
                    seed,
                    arguments.epochs,
                    delta_t=arguments.delta_t,
                )
                if run not in runs:
                    runs.append(run)
    return runs


def table(results: list[dict[str, Any]]) -> str:
    """Format results as a Markdown table, best last."""
    lines = [
        "| sparsity | method | top-1 (%) | seeds | training FLOPs | inference FLOPs |",
        "|---|---|---|---|---|---|",
    ]
    for (sparsity, method), runs in grouped(results).items():
        scores = [run["top1"] for run in runs]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        lines.append(
            f"| {sparsity:g} | {method} | {statistics.mean(scores):.2f}{spread} | {len(scores)} | "
            f"{mean(runs, 'training_flops'):.2e} | {mean(runs, 'inference_flops'):.2e} |"
        )
    return "\n".join(lines)


def grouped(results: list[dict[str, Any]]) -> dict[tuple[float, str], list[dict[str, Any]]]:
    """Group runs by sparsity and method."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for run in sorted(results, key=lambda r: (r["sparsity"], METHODS.index(r["method"]))):
        groups.setdefault((run["sparsity"], run["method"]), []).append(run)
    return groups


def mean(runs: list[dict[str, Any]], key: str) -> float:
    """Average a figure over runs."""
    return statistics.mean(run[key] for run in runs)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy against training FLOPs, with the standard deviation over seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    markers = dict(zip(sorted({run["sparsity"] for run in results}), "*osD^v", strict=False))
    for (sparsity, method), runs in grouped(results).items():
        scores = [run["top1"] for run in runs]
        axes.errorbar(
            mean(runs, "training_flops"),
            statistics.mean(scores),
            yerr=statistics.stdev(scores) if len(scores) > 1 else 0.0,
            marker=markers[sparsity],
            color=f"C{METHODS.index(method)}",
            linestyle="none",
            capsize=3,
            label=method if sparsity == 0.0 else f"{method}, {100 * sparsity:g}%",
        )
    axes.set(
        xscale="log",
        xlabel="training FLOPs (multiplies and adds)",
        ylabel="top-1 accuracy (%)",
        title="CIFAR-10, small convolutional network, ERK",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run what is missing and summarize."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder with train/ and val/")
    parser.add_argument("--out", type=Path, required=True, help="results, JSON lines")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--delta-t", type=int, default=50, help="steps between updates")
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.95, 0.98])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--plot", type=Path, help="picture to draw")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    runs = planned(arguments)
    keys = [asdict(run) for run in runs]
    is_done: Callable[[dict[str, Any]], bool] = lambda key: any(  # noqa: E731
        key.items() <= result.items() for result in finished(arguments.out)
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = None
    for run, key in zip(runs, keys, strict=True):
        if not is_done(key):
            data = data or load(arguments.data, device)
            result = train(run, data, device)
            with arguments.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{run.method} {run.sparsity:g} seed {run.seed}: {result['top1']:.2f}%")
    results = [r for r in finished(arguments.out) if any(k.items() <= r.items() for k in keys)]
    print(table(results))
    if arguments.plot:
        plot(results, arguments.plot)
    if arguments.json:
        means = {f"{m}_{s:g}": round(mean(r, "top1"), 2) for (s, m), r in grouped(results).items()}
        print(json.dumps(means))


if __name__ == "__main__":
    main()
