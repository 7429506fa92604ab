"""Compare dense, static and RigL training on scikit-learn's handwritten digits, through main.py."""

import argparse
import json
import platform
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, TextIO

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parent.parent
DALI = (platform.system(), platform.machine()) == ("Linux", "x86_64")  # where DALI has a package
SPARSE = ["--sparsity", "0.9", "--distribution", "erk"]
METHODS = {
    "dense": [],
    "static": ["--sparse-method", "static", *SPARSE],
    "rigl": ["--sparse-method", "rigl", *SPARSE, "--delta-t", "20"],
}
COLORS = {"dense": "#4c566a", "static": "#d08770", "rigl": "#2f7ed8"}


def write_digits(folder: Path, size: int = 16) -> None:
    """Write 1,797 digits as JPEGs to folder/{train,val}/<digit>/. Every fifth is for validation."""
    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ("val" if index % 5 == 0 else "train") / str(label) / f"{index:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 255 / 16).astype(np.uint8)).convert("RGB")
        image.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=95)


def command(data: Path, method: str, epochs: int) -> list[str]:
    """Return the main.py command of one run, without the workspace."""
    backend = "dali-cpu" if DALI else "pytorch"
    flags = "--arch small_cnn --image-size 16 -b 64 --lr 0.1 --lr-schedule cosine --lr-per-step"
    flags += f" --warmup {min(2, epochs - 1)} --nesterov --wd 5e-4 --label-smoothing 0.1"
    flags += " -j 1 --seed 1 --cpu -p 20"
    flags += f" --epochs {epochs} --data-backend {backend}"
    return [sys.executable, str(ROOT / "main.py"), str(data), *flags.split(), *METHODS[method]]


def records(raport: Path) -> list[dict[str, Any]]:
    """Return the LOG records of a raport, which may still be growing."""
    written = raport.read_text().rpartition("\n")[0] if raport.exists() else ""
    lines = [json.loads(line.removeprefix("DLLL ")) for line in written.splitlines()]
    return [line for line in lines if line["type"] == "LOG" and line["step"] != "PARAMETER"]


def series(log: list[dict[str, Any]], name: str, depth: int) -> tuple[list[float], list[float]]:
    """Return positions (in epochs) and values of a metric; depth 1: per epoch, 2: per iteration."""
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


def standing(method: str, log: list[dict[str, Any]], epochs: int) -> str:
    """Return one line on the progress of a run: the latest epoch, loss, top-1 and sparsity."""
    by_step = [
        record for record in log if record["step"]
    ]  # the last record is the summary of the run
    if not by_step:
        return f"{method:8} starting"
    latest: dict[str, float] = {}
    for record in by_step:
        latest |= record["data"]
    top1 = f"{latest['val.top1']:6.2f}%" if "val.top1" in latest else "      -"
    return (
        f"{method:8} epoch {by_step[-1]['step'][0] + 1:2}/{epochs}  "
        f"loss {latest['train.loss']:.4f}  top-1 {top1}  "
        f"sparsity {latest.get('sparse.sparsity', 0.0):6.1%}"
    )


def width() -> int:
    """Return the number of columns of the terminal."""
    return shutil.get_terminal_size().columns


def show(line: str, *, last: bool = False) -> None:
    """Show the progress of a run: on a terminal always in one line, elsewhere only the last."""
    if sys.stdout.isatty():
        print(f"\r\033[K{line[: width() - 1]}", end="\n" if last else "", flush=True)
    elif last:
        print(line, flush=True)


def plan(run: list[str], log: TextIO) -> dict[str, Any]:
    """Return the plan of a run. Errors go to the log."""
    done = subprocess.run([*run, "--dry-run"], check=True, stdout=subprocess.PIPE, stderr=log)
    resolved: dict[str, Any] = json.loads(done.stdout)
    return resolved


def train(
    run: list[str], workspace: Path, log: TextIO, *, method: str, epochs: int
) -> list[dict[str, Any]]:
    """Train with all output in the log, show the progress, and return the records of the raport."""
    raport = workspace / "experiment_raport.json"
    if raport.exists():  # of an earlier demo
        raport.unlink()
    command = [*run, "--workspace", str(workspace)]
    with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process:
        while process.poll() is None:
            show(standing(method, records(raport), epochs))
            time.sleep(0.2)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    show(standing(method, records(raport), epochs), last=True)
    return records(raport)


def failure(log: Path, error: subprocess.CalledProcessError) -> int:
    """Print the last lines of the log; return the exit status of the demo."""
    status = error.returncode if error.returncode > 0 else 128 - error.returncode
    lines = log.read_text().splitlines()
    if sys.stderr.isatty():  # broken as the terminal breaks them
        lines = [line[i : i + width()] for line in lines for i in range(0, len(line) or 1, width())]
    print(end="\n" if sys.stdout.isatty() else "", flush=True)
    print(*lines[-12:], sep="\n", file=sys.stderr)
    print(f"main.py ended with status {status}; the whole log: {near(log)}", file=sys.stderr)
    return status


def near(path: Path) -> Path:
    """Return a path relative to the current folder if it lies inside."""
    path = path.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def suggestion(program: str, *arguments: str | Path) -> str:
    """Return the command line of a program of this project, broken at the end of the terminal."""
    words = [str(near(Path(sys.executable))), program, *map(str, arguments)]
    line = " ".join(shlex.quote(word).replace(" ", "\0") for word in words)
    columns = width() - (3 if len(line) < width() - 2 else 8)  # for the indent and a backslash
    lines = textwrap.wrap(line, columns, break_long_words=False, break_on_hyphens=False)
    return " \\\n      ".join(lines).replace("\0", " ")


def report(
    output: Path, logs: dict[str, list[dict[str, Any]]], plans: dict[str, dict[str, Any]]
) -> None:
    """Print the table, draw the picture, and suggest what to try next."""
    print(f"\n{'method':8} {'sparsity':>8} {'best top-1':>10} {'inference FLOPs':>16} {'size':>9}")
    for method, log in logs.items():
        cost = plans[method]["cost"]
        best = max(series(log, "val.top1", 1)[1])
        print(
            f"{method:8} {cost['overall_sparsity']:8.1%} {best:9.2f}% "
            f"{cost['inference_flops'] / 1e6:10.2f} MFLOP {cost['size_mb']:6.3f} MB"
        )
    draw(logs, plans["rigl"], output / "report.png")
    network = near(output / "rigl.safetensors")
    image = near(min((output / "digits" / "val" / "3").glob("*.jpg")))
    print(f"\ncurves: {near(output / 'report.png')}\n\nTry next:")
    print("  # store the sparse network: one bit per weight and the active values")
    print(" ", suggestion("export.py", near(output / "rigl" / "model_best.pth.tar"), network))
    print("  # run it on a digit, without computing the zeros")
    print(" ", suggestion("classify.py", "--model", network, image))
    print("  # see what a ResNet-50 costs at 90% sparsity")
    print(" ", suggestion("costs.py", "--sparsity", "0.9"))


def demo(output: Path, epochs: int, log_file: Path) -> None:
    """Write the images, train three times, and report."""
    write_digits(output / "digits")
    print(
        f"1,797 handwritten digits, three runs (epochs: {epochs}); log: {near(log_file)}",
        flush=True,
    )
    logs, plans = {}, {}
    with log_file.open("w") as log:
        for method in METHODS:
            run = command(output / "digits", method, epochs)
            print("$", shlex.join(run), file=log, flush=True)
            show(f"{method:8} starting")
            plans[method] = plan(run, log)
            workspace = output / method
            logs[method] = train(run, workspace, log, method=method, epochs=epochs)
    report(output, logs, plans)


def main() -> int:
    """Run the demo. Return 0, the status of a main.py that failed, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "demo", help="where files go")
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    log_file = arguments.output / "demo.log"
    try:
        demo(arguments.output, arguments.epochs, log_file)
    except subprocess.CalledProcessError as error:
        return failure(log_file, error)
    except KeyboardInterrupt:
        print(f"\ninterrupted; log: {near(log_file)}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
