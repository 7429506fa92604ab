"""multiproc.py: NVIDIA's launcher flags, run for real."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parents[1] / "multiproc.py"

REPORT = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
print(json.dumps({**{name: os.environ[name] for name in names}, "arguments": sys.argv[1:]}))
sys.stderr.write(f"complaint of {os.environ['RANK']}\\n")  # at once
"""

WAIT = """
import os, signal, sys, time
from pathlib import Path
rank = os.environ["RANK"]

def stop(number, frame):
    Path(f"{signal.Signals(number).name}_{rank}").touch()
    sys.exit(0)

for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
    signal.signal(getattr(signal, name), stop)
Path(f"ready_{rank}").touch()
time.sleep(120)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(LAUNCHER), *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.distributed
def test_local_rank_0_keeps_the_terminal_and_the_others_get_files(tmp_path: Path) -> None:
    script = tmp_path / "a script.py"
    script.write_text(REPORT)
    port = free_port()
    arguments = ["--lr", "0.1", "-b", "2 3", "--help"]
    result = subprocess.run(
        command("--nproc_per_node", 3, "--master_port", port, script, *arguments),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    for rank in range(3):
        text = result.stdout if rank == 0 else (tmp_path / f"GPU_{rank}.log").read_text()
        assert json.loads(text) == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "arguments": arguments,
        }
        assert f"complaint of {rank}" in result.stderr
    assert len(list(tmp_path.glob("*.log"))) == 2


@pytest.mark.distributed
def test_two_nodes_on_one_disk_keep_their_logs_apart(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(REPORT)
    port = free_port()
    nodes = [
        subprocess.Popen(
            command(
                *("--nnodes=2", f"--node_rank={node}", "--nproc-per-node=2"),
                *(f"--master_port={port}", "--master-addr=127.0.0.1", script),
            ),
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    try:
        for node, process in enumerate(nodes):
            output, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            assert json.loads(output)["RANK"] == str(2 * node)
            log = json.loads((tmp_path / f"GPU_node{node}_1.log").read_text())
            assert log["RANK"] == str(2 * node + 1)
            assert log["LOCAL_RANK"] == "1"
            assert log["WORLD_SIZE"] == "4"
    finally:
        for process in nodes:
            process.kill()


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 100
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"none of {paths} appeared"
        time.sleep(0.05)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGUSR2, 128 + signal.SIGUSR2)],
)
def test_a_signal_to_the_launcher_reaches_every_process(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    script = tmp_path / "script.py"
    script.write_text(WAIT)
    launcher = subprocess.Popen(
        command("--nproc_per_node=2", f"--master_port={free_port()}", script),
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(tmp_path / "ready_0", tmp_path / "ready_1")
        launcher.send_signal(number)
        wait_for(tmp_path / f"{number.name}_0", tmp_path / f"{number.name}_1")
        assert launcher.wait(timeout=60) == status
    finally:
        launcher.kill()


@pytest.mark.distributed
def test_a_signal_ends_a_launcher_that_waits_for_another_node(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(REPORT)
    port = free_port()
    flags = "--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-conf is_host=1".split()
    launcher = subprocess.Popen(
        [sys.executable, "-m", "image_classification.launch", *flags,
         f"--rdzv-endpoint=127.0.0.1:{port}", str(script)],
        cwd=LAUNCHER.parent, env=environment(), stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 100
        with socket.socket() as client:
            while client.connect_ex(("127.0.0.1", port)):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        time.sleep(1)
        launcher.send_signal(signal.SIGUSR1)
        assert launcher.wait(timeout=60) == 75
    finally:
        launcher.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.py", "--lr", "0.1"], "no such training script: missing.py"),
        ([], "the following arguments are required: training_script, ..."),
        (["--nproc_per_node", "0", LAUNCHER], "--nproc-per-node: must be at least 1, not 0"),
        (["--nproc_per_node", "x", LAUNCHER], "invalid"),
        (["--nnodes=2", "--node_rank=2", LAUNCHER], "--node_rank 2 is not in 0..1 (--nnodes)"),
        (["--nodes", "2", LAUNCHER], "--nodes"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments: list[object], message: str) -> None:
    result = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("multiproc.py: error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
