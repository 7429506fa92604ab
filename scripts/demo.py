"""Compare dense, static and RigL training on scikit-learn's handwritten digits, through main.py."""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parent.parent
DALI = (platform.system(), platform.machine()) == ("Linux", "x86_64")  # where its package exists
SPARSE = ["--sparsity", "0.9", "--distribution", "erk"]
METHODS = {
    "dense": [],
    "static": ["--sparse-method", "static", *SPARSE],
    "rigl": ["--sparse-method", "rigl", *SPARSE, "--delta-t", "20"],
}
COLORS = {"dense": "#4c566a", "static": "#d08770", "rigl": "#2f7ed8"}


def write_digits(folder: Path, size: int = 16) -> None:
    """Write the 1,797 digits as JPEGs, folder/{train,val}/<digit>/; every fifth is validation."""
    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ("val" if index % 5 == 0 else "train") / str(label) / f"{index:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 255 / 16).astype(np.uint8)).convert("RGB")
        image.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=95)


def command(data: Path, method: str, epochs: int) -> list[str]:
    """Return the main.py command of one run, but for its outputs."""
    backend = "dali-cpu" if DALI else "pytorch"
    flags = "--arch small_cnn --image-size 16 -b 64 --lr 0.1 --lr-schedule cosine --lr-per-step"
    flags += f" --warmup {min(2, epochs - 1)} --nesterov --wd 5e-4 --label-smoothing 0.1"
    flags += " -j 1 --seed 1 --cpu -p 20"
    flags += f" --epochs {epochs} --data-backend {backend}"
    return [sys.executable, str(ROOT / "main.py"), str(data), *flags.split(), *METHODS[method]]


def records(raport: Path) -> list[dict[str, Any]]:
    """Return the LOG records of a raport file."""
    lines = [json.loads(line.removeprefix("DLLL ")) for line in raport.read_text().splitlines()]
    return [line for line in lines if line["type"] == "LOG" and line["step"] != "PARAMETER"]


def series(log: list[dict[str, Any]], name: str, depth: int) -> tuple[list[float], list[float]]:
    """Return (position in epochs, value) of a metric; depth 1: per epoch, 2: per iteration."""
    found = [r for r in log if name in r["data"] and len(r["step"]) == depth]
    last = max((r["step"][1] for r in found if depth == 2), default=1)
    at = [r["step"][0] + (r["step"][1] / last if depth == 2 else 1) for r in found]
    return at, [r["data"][name] for r in found]


def draw(logs: dict[str, list[dict[str, Any]]], plan: dict[str, Any], path: Path) -> None:
    """Draw loss, accuracy, RigL's density per layer and its mask turnover."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), constrained_layout=True)
    (loss, accuracy), (density, turnover) = axes
    for method, log in logs.items():
        for axis, name in ((loss, "train.loss"), (accuracy, "val.top1")):
            axis.plot(*series(log, name, 1), label=method, color=COLORS[method])
    loss.set(title="Training loss", xlabel="epoch", ylabel="cross entropy (label smoothing 0.1)")
    accuracy.set(title="Validation accuracy", xlabel="epoch", ylabel="top-1 (%)")
    loss.legend()
    accuracy.legend(loc="lower right")
    layers = plan["sparse"]["layers"]
    names = [layer["name"].removesuffix(".weight") for layer in layers]
    values = [100 * layer["density"] for layer in layers]
    density.bar_label(density.barh(names, values, color=COLORS["rigl"]), fmt="%.1f", padding=3)
    density.invert_yaxis()
    density.set(title="Density of each layer (ERK, 90% sparse)", xlabel="active weights (%)")
    density.set_xlim(0, 115)
    at, grown = series(logs["rigl"], "sparse.grown", 2)
    active = sum(layer["num_active"] for layer in layers)
    turnover.step(at, [100 * n / active for n in grown], where="post", color=COLORS["rigl"])
    turnover.set(title="RigL's mask turnover", xlabel="epoch",
                 ylabel="connections replaced per update (%)")  # fmt: skip
    explored = turnover.twinx()
    at, rate = series(logs["rigl"], "sparse.exploration_rate", 2)
    explored.plot(at, [100 * r for r in rate], "--", color="#a3be8c")
    explored.set_ylabel("weights ever active (%, dashed)")
    for axis in axes.flat:
        axis.spines[["top"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Write the images, train three times, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "demo", help="where files go")
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    data = arguments.output / "digits"
    write_digits(data)
    logs, plans = {}, {}
    for method in METHODS:
        workspace = arguments.output / method
        run = command(data, method, arguments.epochs)
        print("$ main.py", *run[2:], flush=True)
        plan = subprocess.run([*run, "--dry-run"], check=True, stdout=subprocess.PIPE, text=True)
        plans[method] = json.loads(plan.stdout)
        subprocess.run([*run, "--workspace", str(workspace)], check=True)
        logs[method] = records(workspace / "experiment_raport.json")
    print(f"\n{'method':8} {'sparsity':>8} {'top-1':>7} {'inference FLOPs':>16} {'size':>9}")
    for method, log in logs.items():
        cost = plans[method]["cost"]
        best = max(series(log, "val.top1", 1)[1])
        print(
            f"{method:8} {cost['overall_sparsity']:8.1%} {best:6.2f}% "
            f"{cost['inference_flops'] / 1e6:10.2f} MFLOP {cost['size_mb']:6.3f} MB"
        )
    draw(logs, plans["rigl"], arguments.output / "report.png")
    print(f"\ncurves: {arguments.output / 'report.png'}")


if __name__ == "__main__":
    main()
