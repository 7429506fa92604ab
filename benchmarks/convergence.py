"""Accuracy of every method on CIFAR-10: several sparsities, several seeds, two networks.

    python benchmarks/convergence.py DATA --out RESULTS
    python benchmarks/convergence.py DATA --out RESULTS --arch wrn22_2 --methods static rigl gmp

The first command trains a small network in minutes. The second one is RigL's published experiment:
WRN-22-2, 250 epochs, batch 128 (recipes in benchmarks/cifar.py).

DATA holds train/<class>/*.jpg and val/<class>/*.jpg. Every finished run is a line of RESULTS
(JSON lines); runs that are there already are not repeated. A run that was killed goes on from its
last checkpoint, which stands beside RESULTS. At the end there is a table (mean and standard
deviation over seeds), and --plot FILE draws accuracy against training FLOPs. A GPU is used if there
is one; there a CUDA graph replays the network's forward and backward pass (not with --no-graph).
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout

from benchmarks.cifar import PUBLISHED, RECIPES, load
from benchmarks.cifar_run import Run, train
from cli.program import fail

METHODS = ("dense", "static", "set", "snfs", "rigl", "gmp", "acdc", "granet", "srigl", "gap")
BEFORE = {"arch": "small", "distribution": "erk", "block": "1x1"}
"""What the lines of earlier versions do not say."""


def finished(path: Path) -> list[dict[str, Any]]:
    """Read the runs that a results file holds.

    Raises:
        ValueError: Names a line that is not a result.
    """
    results = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            result = {**BEFORE, **json.loads(line)}
            results.append({"best_top1": result["top1"], **result})
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"line {number} of {path} is no result: remove the line") from None
    return results


def planned(arguments: argparse.Namespace) -> list[Run]:
    """List the runs asked for; dense training has no sparsity."""
    recipe = RECIPES[arguments.arch]
    runs = []
    for seed in arguments.seeds:
        for sparsity in arguments.sparsities or recipe.sparsities:
            for method in arguments.methods:
                run = Run(
                    method,
                    0.0 if method == "dense" else sparsity,
                    seed,
                    arguments.epochs or recipe.epochs,
                    arch=arguments.arch,
                    batch_size=arguments.batch_size,
                    delta_t=arguments.delta_t or recipe.delta_t,
                    block="x".join(map(str, arguments.block)),
                )
                if run not in runs:
                    runs.append(run)
    return runs


def table(results: list[dict[str, Any]]) -> str:
    """Format results as a Markdown table, best last; WRN-22-2 beside what is published."""
    names = ["sparsity", "method", "top-1 (%)", "best (%)", "seeds", "training FLOPs"]
    names += ["inference FLOPs"]
    published = any(run["arch"] == "wrn22_2" for run in results)
    names += ["published, 250 epochs (%)"] if published else []
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for (sparsity, method), runs in grouped(results).items():
        cells = [f"{sparsity:g}", method, spread(runs, "top1"), spread(runs, "best_top1")]
        cells += [str(len(runs)), f"{mean(runs, 'training_flops'):.2e}"]
        cells += [f"{mean(runs, 'inference_flops'):.2e}"]
        if published:
            cells.append(str(PUBLISHED.get(method, {}).get(sparsity, "-")))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(runs: list[dict[str, Any]], key: str) -> str:
    """Format mean and standard deviation of a figure over runs."""
    scores = [run[key] for run in runs]
    deviation = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.2f}{deviation}"


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
        title=f"CIFAR-10, {RECIPES[results[0]['arch']].title}, ERK",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the flags.

    Raises:
        ValueError: Names the flag.
    """
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder with train/ and val/")
    parser.add_argument("--out", type=Path, required=True, help="results, JSON lines")
    parser.add_argument("--arch", choices=list(RECIPES), default="small", help="network and recipe")
    parser.add_argument("--epochs", type=int, help="10 (small) or 250 (wrn22_2) by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--delta-t", type=int, help="steps between updates; 50 or 100 by default")
    parser.add_argument(
        "--sparsities", type=float, nargs="+", help="0.95 0.98 (small) or 0.95 by default"
    )
    parser.add_argument(
        "--block", type=int, nargs=2, default=[1, 1], help="weights that are active together"
    )
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "all"], default=["all"])
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--graph", action=argparse.BooleanOptionalAction,
        help="replay the network's forward and backward pass from a CUDA graph; on a GPU it does",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint-every", type=int, default=10, help="epochs between checkpoints of a run"
    )
    parser.add_argument("--plot", type=Path, help="picture to draw")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args(argv)
    if "all" in arguments.methods:
        arguments.methods = list(METHODS)
    check(arguments)
    return arguments


def check(arguments: argparse.Namespace) -> None:
    """Refuse values out of range.

    Raises:
        ValueError: Names the flag and the value.
    """
    for name in ("epochs", "batch_size", "delta_t", "checkpoint_every"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for sparsity in arguments.sparsities or ():
        if not 0.0 <= sparsity < 1.0:
            raise ValueError(f"--sparsities must be in [0, 1), got {sparsity}")
    if min(arguments.seeds) < 0:
        raise ValueError(f"--seeds must not be negative, got {min(arguments.seeds)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU on this machine")
    if arguments.device == "cpu" and arguments.graph:
        raise ValueError("--graph needs a GPU: leave it out")


def run_missing(arguments: argparse.Namespace, runs: list[Run]) -> None:
    """Train the runs whose results are not there, and write these."""
    out: Path = arguments.out
    device = torch.device(arguments.device)
    graph = device.type == "cuda" if arguments.graph is None else arguments.graph
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    data = None
    for run in runs:
        path = out.with_name(f"{out.name}.{run.name}.checkpoint")
        if not matching(finished(out), [run]):
            data = data or load(arguments.data, device)
            if (images := len(data["train"][1])) < run.batch_size:
                raise ValueError(f"--batch-size {run.batch_size}: there are only {images} images")
            options = {"graph": graph, "path": path, "every": arguments.checkpoint_every}
            result = train(run, data, device, **options)
            with out.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{run.method} {run.sparsity:g} seed {run.seed}: {result['top1']:.2f}%")
        path.unlink(missing_ok=True)


def matching(results: list[dict[str, Any]], runs: list[Run]) -> list[dict[str, Any]]:
    """Select the results of runs."""
    return [r for r in results if any(asdict(run).items() <= r.items() for run in runs)]


def main(argv: Sequence[str]) -> int:
    """Run what is missing and summarize; return the exit status."""
    try:
        arguments = parse(argv)
        runs = planned(arguments)
        run_missing(arguments, runs)
        results = matching(finished(arguments.out), runs)
    except (ValueError, OSError) as error:
        return fail("convergence.py", error)
    print(table(results))
    if arguments.plot:
        plot(results, arguments.plot)
    if arguments.json:
        means = {f"{m}_{s:g}": round(mean(r, "top1"), 2) for (s, m), r in grouped(results).items()}
        print(json.dumps(means))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
