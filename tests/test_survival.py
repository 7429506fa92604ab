"""What a run survives: kills at any moment, requests to stop, losses that are no numbers."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import forks
from tests.pictures import write

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--arch small_cnn --image-size 32 -b 4 --lr 0.05 -j 1 -p 1 --seed 3 --epochs 3".split()
RIGL = "--data-backend pytorch --sparse-method rigl --sparsity 0.9 --delta-t 2".split()
EVERYTHING = (
    "--data-backend dali-cpu --sparse-method snfs --sparsity 0.9 --delta-t 2 --use-ema 0.9 --amp "
    "--static-loss-scale 1024 --mixup 0.2 --label-smoothing 0.1 --optimizer-batch-size 8 "
    "--lr-schedule cosine --lr-per-step --image-size 12 --epochs 2"
).split()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """50 training and 40 validation JPEGs of two classes that differ in hue."""
    return write(tmp_path_factory.mktemp("pictures"), train=25, val=20)


def command(data: Path, workspace: Path, *flags: str) -> list[str]:
    return [str(data), *SMALL, "--resume", "auto", "--workspace", str(workspace), *flags]


@pytest.fixture(scope="session")
def whole(pictures: Path, tmp_path_factory) -> Path:
    """The workspace of a run that nothing happened to."""
    workspace = tmp_path_factory.mktemp("whole")
    output = workspace / "output"
    assert forks.finish(command(pictures, workspace, *RIGL), output) == 0, output.read_text()
    return workspace


@pytest.mark.usefixtures("whole")  # the server of the forks runs: its start is no part of a run
@pytest.mark.parametrize("flags", [RIGL, EVERYTHING], ids=["pytorch-rigl", "dali-everything"])
def test_ten_kills_at_random_moments_change_nothing(
    pictures: Path, tmp_path: Path, flags: list[str]
) -> None:
    """Twenty in all, within epochs, writes, validation and start-up; then the run completes."""
    flags = [*flags, "--checkpoint-every-steps", "2"]
    output = tmp_path / "output"
    began = time.monotonic()
    assert forks.finish(command(pictures, tmp_path / "whole", *flags), output) == 0
    length = time.monotonic() - began
    moments = random.Random(len(flags))
    kills, number = 0, 0
    while kills < 10:
        workspace = tmp_path / f"killed_{number}"
        process = forks.start(command(pictures, workspace, *flags), output)
        process.join(moments.uniform(0, 0.8 * length))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0, output.read_text()[-3000:]
            forks.assert_same(workspace, tmp_path / "whole")
            number += 1
    assert forks.finish(command(pictures, workspace, *flags), output) == 0
    forks.assert_same(workspace, tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGTERM, "training"), (signal.SIGUSR1, "validation")],
)
def test_a_signal_saves_and_ends_with_75(
    pictures: Path, whole: Path, tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    words = {"training": "train.loss", "validation": "val.total_ips"}
    argv, output = command(pictures, tmp_path, *RIGL, "--print-freq", "1"), tmp_path / "output"

    def reached() -> bool:
        return any(words[moment] in r["data"] for r in forks.records(tmp_path)[2:])

    process = forks.start(argv, output)
    forks.wait_until(reached, process)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 75
    assert output.read_text().splitlines()[-1] == (
        f"main.py: stopped by {number.name}: --resume auto goes on"
    )
    saved = forks.state(tmp_path)
    assert saved[".epoch"] == 0
    assert (saved[".epoch_step"] == 12) == (moment == "validation")
    assert forks.finish(argv, output) == 0
    forks.assert_same_weights(tmp_path, whole)


def test_a_signal_during_start_up_ends_with_75(pictures: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *command(pictures, tmp_path, *RIGL)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    bit = 1 << (signal.SIGTERM - 1)
    status = Path(f"/proc/{process.pid}/status")
    while not int(status.read_text().split("SigCgt:")[1].split()[0], 16) & bit:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert errors.splitlines() == ["main.py: stopped by SIGTERM: --resume auto goes on"]
    assert not list(tmp_path.glob("*.tar"))


def test_a_run_that_cannot_stop_in_time_ends_all_the_same(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    flags = [*RIGL, "--epochs", "500", "--preempt-grace", "0.001"]
    process = forks.start(command(pictures, tmp_path, *flags), output)
    forks.wait_until(lambda: len(forks.records(tmp_path)) > 2, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 75
    assert "--preempt-grace 0.001 s: ending without a new checkpoint" in output.read_text()


def test_a_loss_that_is_no_number_stops_the_run(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    argv = command(pictures, tmp_path, *RIGL, "--max-bad-steps", "3", "--print-freq", "4")
    assert forks.finish([*argv, "--run-epochs", "1"], output) == 0
    before = (tmp_path / "checkpoint.pth.tar").read_bytes()
    assert forks.finish([*argv, "--lr", "1e30", "--checkpoint-every-steps", "1"], output) == 1
    error = output.read_text().splitlines()[-1]
    assert "the loss was not finite" in error
    assert "(--max-bad-steps 3)" in error
    checkpoint = tmp_path / "checkpoint.pth.tar"
    assert error.endswith(f"the last good checkpoint is {checkpoint}")
    assert "the weights are not finite, no checkpoint is written" in output.read_text()
    assert checkpoint.read_bytes() != before  # of the first step, whose gradient was finite
