"""main.py on a data set with files that cannot be read."""

import contextlib
import io
import json
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

import main
from tests import forks
from tests.image_classification import corpus

pytestmark = pytest.mark.filterwarnings(  # workers are forked, from Python 3.12 on with a warning
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)

FLAGS = (
    "--arch small_cnn --image-size 32 -b 2 --lr 0.05 -j 2 -p 2 --seed 3 --epochs 2 --cpu".split()
)


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> tuple[Path, set[str]]:
    root = tmp_path_factory.mktemp("corpus")
    return root, corpus.make(root)


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run main.py in this process: importing torch anew for every case takes too long."""
    out, err = io.StringIO(), io.StringIO()
    state = torch.get_rng_state()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main.main([*argv, *FLAGS])
    torch.set_rng_state(state)
    return subprocess.CompletedProcess(argv, status, out.getvalue(), err.getvalue())


def run_two(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run main.py in two processes; what they print is in `stderr`."""
    with tempfile.NamedTemporaryFile() as output:
        statuses = forks.finish_together([*argv, *FLAGS], Path(output.name))
        printed = Path(output.name).read_text()
    return subprocess.CompletedProcess(argv, max(statuses), "", printed)


def numbers(workspace: Path, length: int, name: str) -> list[float]:
    """Return the values of a metric in the records of a run (0), its epochs (1), iterations (2)."""
    lines = (workspace / "experiment_raport.json").read_text().splitlines()
    logged = [json.loads(line.removeprefix("DLLL ")) for line in lines]
    logged = [r for r in logged if r["type"] == "LOG" and r["step"] != "PARAMETER"]
    return [r["data"][name] for r in logged if len(r["step"]) == length and name in r["data"]]


@pytest.mark.parametrize(
    ("start", "backend"),
    [(run, "pytorch"), pytest.param(run_two, "dali-cpu", marks=pytest.mark.distributed)],
)
def test_a_run_goes_on_without_bad_files_and_counts_them(odd, tmp_path, start, backend):
    root, bad = odd
    # Batches of two, some without any image.
    done = start(str(root), "--data-backend", backend, "--optimizer-batch-size", "8",
                 "--max-bad-files", "1", "--workspace", str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING: cannot ")]
    named = [line.split()[4].rstrip(":") for line in warnings]
    assert len(named) == len(set(named))
    assert {f"{root}/val/{name}" for name in bad} <= set(named)
    assert set(named) <= {f"{root}/{split}/{name}" for split in ("train", "val") for name in bad}
    assert numbers(tmp_path, 0, "data.bad_files") == [len(named)]
    counts = numbers(tmp_path, 2, "data.bad_files") + numbers(tmp_path, 1, "data.bad_files")
    assert 0 < min(counts) <= max(counts) == len(named)
    # Accuracies count the images that were read.
    num_read = len(list((root / "val").glob("*/*"))) - len(bad)
    for top1 in numbers(tmp_path, 1, "val.top1"):
        assert top1 / 100 * num_read == pytest.approx(round(top1 / 100 * num_read), abs=1e-6)


def error_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    return [line for line in done.stderr.splitlines() if line.startswith("main.py: error:")]


@pytest.mark.parametrize("backend", ["pytorch", "dali-cpu"])
def test_too_many_bad_files_end_the_run_in_one_line(odd, tmp_path, backend):
    root, _ = odd
    done = run(str(root), "--data-backend", backend, "--workspace", str(tmp_path))
    assert done.returncode == 2, done.stderr[-4000:]
    (line,) = error_lines(done)
    assert f"files in {root}/train cannot be used, --max-bad-files 0.001 allows 0" in line
    assert f"cannot read image {root}/train/a/" in line
    assert line.endswith("repair or remove them, or raise --max-bad-files")


def test_an_evaluation_without_a_single_image_names_a_file(tmp_path):
    (tmp_path / "val/a").mkdir(parents=True)
    (tmp_path / "val/a/1.jpg").write_bytes(b"")
    words = [str(tmp_path), "--evaluate", "--workspace", str(tmp_path),
             "--data-backend", "pytorch", "--max-bad-files"]  # fmt: skip
    done = run(*words, "0")
    assert done.returncode == 2
    assert "1 of 1 files in" in error_lines(done)[0]
    done = run(*words, "1")
    assert done.returncode == 2
    assert error_lines(done) == ["main.py: error: there is no validation image"]
    assert f"WARNING: cannot read image {tmp_path}/val/a/1.jpg: " in done.stderr


@pytest.mark.distributed
def test_all_processes_end_together(odd, tmp_path):
    root, _ = odd
    done = run_two(str(root), "--data-backend", "pytorch", "--workspace", str(tmp_path))
    assert done.returncode == 2
    assert len(error_lines(done)) == 2
