"""Compare plans run from C with Python's runtime: `python benchmarks/embedding.py`.

The library is built with CMake. Processes with the C interface and Python take turns. A ratio is
the median, over the rounds, of the least time of some runs, divided by Python's. Python runs the
tuned network. The plans are tuned, not tuned, and not tuned but measured by sparse_retune. With one
thread, processor time is compared; with more, wall time.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.inference import build, save
from image_classification.models import default_image_size
from sparse import runtime
from sparse.native.library import KERNELS, cpu_level

PROGRAM = Path(__file__).with_name("run_plans.c")


def compile_program(folder: Path) -> Path:
    """Build the library for this processor and the program that runs plans."""
    level = f"-DSPARSE_LEVEL={cpu_level()}"
    prefix, program = folder / "prefix", folder / "run_plans"
    for command in (
        ["cmake", "-S", KERNELS.sources, "-B", folder / "build", level],
        ["cmake", "--build", folder / "build", "--parallel", os.cpu_count()],
        ["cmake", "--install", folder / "build", "--prefix", prefix],
        ["cc", "-O2", f"-I{prefix}/include", "-c", PROGRAM, "-o", folder / "run_plans.o"],
    ):
        subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
    (library,) = prefix.glob("lib*/*.a")
    link = ["c++", folder / "run_plans.o", library, "-pthread", "-o", program]
    subprocess.run([*map(str, link)], check=True)
    return program


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Compare plans run from C with Python's runtime.")
    add = parser.add_argument
    add("--networks", nargs="*", default=["resnet50/erk/0.9"], help="arch/distribution/sparsity")
    add("--threads", type=int, default=1)
    add("--rounds", type=int, default=10)
    add("--repeats", type=int, default=10, help="runs of a round, whose least time counts")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        program = compile_program(Path(directory))
        for name in args.networks:
            compare(name, program, Path(directory), args)


def compare(name: str, program: Path, folder: Path, args: argparse.Namespace) -> None:
    """Measure one network and print a line for each way to run it."""
    arch, distribution, sparsity = name.split("/")
    compact, size = folder / "network.safetensors", default_image_size(arch)
    save(*build(arch, distribution, float(sparsity)), arch, compact)
    network = runtime.load(compact, threads=args.threads, backend="native")
    image = torch.randn(1, 3, size, size)
    network(image)
    commands = {}
    for way, tune in (("tuned", True), ("not tuned", False), ("retuned", False)):
        stem = folder / way.replace(" ", "-")
        runtime.save_plan(compact, f"{stem}.plan", threads=args.threads, tune=tune)
        Path(f"{stem}.in").write_bytes(image.numpy().tobytes())
        retune = ["retune"] if way == "retuned" else []
        commands[way] = [program, *retune, args.threads, args.repeats, stem]
    clock = time.process_time if args.threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {way: [] for way in ("Python", *commands)}
    for _ in range(args.rounds):
        times = []
        for _ in range(args.repeats):
            start = clock()
            network(image)
            times.append(clock() - start)
        seconds["Python"].append(min(times))
        for way, command in commands.items():
            command = [*map(str, command)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds[way].append(float(done.stdout.split()[-1]))
    for way, times in seconds.items():
        ratios = [mine / python for mine, python in zip(times, seconds["Python"], strict=True)]
        low, middle, high = (
            f"{r:.3f}" for r in (min(ratios), statistics.median(ratios), max(ratios))
        )
        milliseconds = 1000 * statistics.median(times)
        print(f"{name} {way}: {milliseconds:.2f} ms, {middle} of Python's time ({low} to {high})")


if __name__ == "__main__":
    main(sys.argv[1:])
