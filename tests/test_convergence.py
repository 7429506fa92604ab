"""The accuracy benchmark, cut short, on the real images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DIRECTORY = os.environ.get("CIFAR10_DIR")


@pytest.mark.slow
@pytest.mark.skipif(not DIRECTORY, reason="CIFAR10_DIR is not set")
def test_the_methods_learn_and_finished_runs_are_not_repeated(tmp_path: Path) -> None:
    out, picture = tmp_path / "runs.jsonl", tmp_path / "picture.png"
    flags = [str(DIRECTORY), "--out", str(out), "--plot", str(picture), "--json"]
    flags += "--epochs 1 --seeds 1 --sparsities 0.9".split()
    for methods in (["dense", "rigl"], ["dense", "set", "rigl"]):
        command = [sys.executable, str(ROOT / "benchmarks/convergence.py"), *flags]
        done = subprocess.run(
            [*command, "--methods", *methods], capture_output=True, text=True, check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        means = json.loads(done.stdout.splitlines()[-1])
        assert min(means.values()) > 25  # ten classes
    assert list(means) == ["dense_0", "set_0.9", "rigl_0.9"]
    methods = [json.loads(line)["method"] for line in out.read_text().splitlines()]
    assert methods == ["dense", "rigl", "set"]
    assert picture.stat().st_size > 10_000
