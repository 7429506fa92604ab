"""Several processes: one that is asked to stop, one that is killed, a node that goes away."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import forks
from tests.pictures import write

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--data-backend pytorch -j 0 --arch small_cnn --image-size 32 -b 4 --training-only "
    "--seed 3 --epochs 4 --lr 0.05 --print-freq 1 --checkpoint-every-steps 3 "
    "--resume auto --sparse-method rigl --sparsity 0.9 --delta-t 5"
).split()
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """96 training images: twelve steps of eight."""
    return write(tmp_path_factory.mktemp("pictures"), train=48, val=1)


@pytest.fixture
def start(pictures: Path) -> Iterator[Start]:
    """Return a function that starts main.py under the launcher, and end what is left of it."""
    started: list[subprocess.Popen[str]] = []

    def start(
        workspace: Path, *launcher: str, flags: tuple[str, ...] = ()
    ) -> subprocess.Popen[str]:
        workspace.mkdir(exist_ok=True)
        with (workspace / f"output{len(started)}").open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "image_classification.launch", *launcher,
                 str(ROOT / "main.py"), str(pictures), *FLAGS, "--workspace", str(workspace),
                 *flags],
                stdout=output, stderr=output, text=True, cwd=ROOT, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        for pid in (*workers(process).values(), process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()


def workers(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """Return rank -> process id of the workers that a launcher has at present."""
    found = {}
    try:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        for child in children:
            variables = Path(f"/proc/{child}/environ").read_text().split("\0")
            ranks = [v.removeprefix("RANK=") for v in variables if v.startswith("RANK=")]
            found.update({int(rank): int(child) for rank in ranks})
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return found


def wait_for_records(workspace: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while sum("train.loss" in r["data"] for r in forks.records(workspace)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory) -> Path:
    """The workspace of two processes that nothing happened to."""
    workspace = tmp_path_factory.mktemp("whole")
    finish(pictures, workspace)
    return workspace


def finish(pictures: Path, workspace: Path) -> None:
    """Train to the end on two processes."""
    argv = [str(pictures), *FLAGS, "--workspace", str(workspace)]
    assert forks.finish_together(argv, workspace / "output") == [0, 0]


TWO = ("--standalone", "--nproc-per-node", "2")


@pytest.mark.distributed
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(
    pictures: Path, whole: Path, tmp_path: Path, start: Start
) -> None:
    launcher = start(tmp_path, *TWO)
    wait_for_records(tmp_path, 14)
    os.kill(workers(launcher)[1], signal.SIGUSR1)
    assert launcher.wait(60) == 75
    output = (tmp_path / "output0").read_text()
    assert "main.py: stopped by SIGUSR1" in output
    assert "main.py: stopped by a signal to another rank" in output
    assert "Traceback" not in output
    stopped = forks.state(tmp_path)
    assert 0 < stopped[".step"] < 48

    launcher = start(tmp_path, *TWO)  # and the launcher itself, which tells its workers
    wait_for_records(tmp_path, 30)
    launcher.terminate()
    assert launcher.wait(60) == 75
    assert stopped[".step"] < forks.state(tmp_path)[".step"] < 48

    finish(pictures, tmp_path)
    forks.assert_same(tmp_path, whole)


@pytest.mark.distributed
def test_a_killed_worker_is_started_again(whole: Path, tmp_path: Path, start: Start) -> None:
    launcher = start(tmp_path, *TWO, "--max-restarts", "1")
    wait_for_records(tmp_path, 17)
    os.kill(workers(launcher)[1], signal.SIGKILL)
    assert launcher.wait(120) == 0
    assert "loading" in (tmp_path / "output0").read_text()
    forks.assert_same(tmp_path, whole)


@pytest.mark.distributed
@pytest.mark.slow
def test_the_run_goes_on_without_a_lost_node(tmp_path: Path, start: Start) -> None:
    """Two launchers stand for two nodes; one is killed with its worker."""
    rendezvous = [
        *("--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port()}"),
        *("--rdzv-conf", "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"),
    ]
    flags = ("--epochs", "12")
    first = start(tmp_path, *rendezvous, flags=flags)
    second = start(tmp_path, *rendezvous, flags=flags)
    wait_for_records(tmp_path, 14)
    lost = second if 1 in workers(second) else first  # the one that keeps the rendezvous stays
    kept = first if lost is second else second
    for pid in (lost.pid, *workers(lost).values()):
        os.kill(pid, signal.SIGKILL)
    assert kept.wait(240) == 0
    output = "".join(path.read_text() for path in sorted(tmp_path.glob("output*")))
    assert (
        "was written by 2 processes, this run has 1: 8 images per step are kept with 2 "
        "micro-batches"
    ) in output
    steps = {tuple(r["step"]) for r in forks.records(tmp_path) if "train.loss" in r["data"]}
    assert (11, 24) in steps  # twelve steps of two micro-batches each
    assert forks.state(tmp_path)[".step"] == 12 * 12
