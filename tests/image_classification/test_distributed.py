"""Start-up from the launcher's variables, and collectives between real processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from image_classification import distributed
from image_classification.distributed import Launch, World

ROOT = Path(distributed.__file__).parents[1]
PREFIXES = ("SLURM_", "TORCHELASTIC_")
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name in NAMES or name.startswith(PREFIXES):
            monkeypatch.delenv(name)


def set_variables(monkeypatch: pytest.MonkeyPatch, variables: str) -> None:
    """Set environment variables written as `NAME=value NAME=value`."""
    for assignment in variables.split():
        monkeypatch.setenv(*assignment.split("="))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ("", Launch(0, 0, 1, "none")),
        ("RANK=5 LOCAL_RANK=1 WORLD_SIZE=8", Launch(5, 1, 8, "torchrun")),
        ("WORLD_SIZE=8", Launch(0, 0, 8, "torchrun")),
        ("SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4", Launch(3, 1, 4, "slurm")),
        # One task of a job: a plain process, in a batch script for example.
        ("SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1", Launch(0, 0, 1, "none")),
        # A step smaller than its job, as with srun -n 2 in a job of 8 tasks.
        (
            "SLURM_PROCID=1 SLURM_LOCALID=1 SLURM_NTASKS=8 SLURM_STEP_NUM_TASKS=2",
            Launch(1, 1, 2, "slurm"),
        ),
        # torchrun started by srun on each node.
        (
            "RANK=9 LOCAL_RANK=1 WORLD_SIZE=16 SLURM_PROCID=1 SLURM_LOCALID=0 SLURM_NTASKS=2",
            Launch(9, 1, 16, "torchrun"),
        ),
    ],
)
def test_the_launcher_is_recognized(
    monkeypatch: pytest.MonkeyPatch, variables: str, expected: Launch
) -> None:
    set_variables(monkeypatch, variables)
    assert distributed.world_from_env() == expected
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ("WORLD_SIZE=two", "WORLD_SIZE must be an integer, not 'two'"),
        ("RANK=8 LOCAL_RANK=0 WORLD_SIZE=8", "rank 8 .* do not fit a world of 8"),
        ("WORLD_SIZE=0", "do not fit a world of 0"),
        ("RANK=-1 WORLD_SIZE=2", "rank -1 .* do not fit"),
        ("WORLD_SIZE=2", "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set: launch with"),
        ("SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=2", "SLURM_STEP_NODELIST is not set"),
    ],
)
def test_a_launch_that_cannot_work_is_one_line(
    monkeypatch: pytest.MonkeyPatch, variables: str, message: str
) -> None:
    set_variables(monkeypatch, variables)
    with pytest.raises(ValueError, match=message) as caught:
        distributed.start(cpu=True)
    assert "\n" not in str(caught.value)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ("RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=1", 1),
        ("SLURM_PROCID=2 SLURM_LOCALID=2 SLURM_NTASKS=3", 2),
    ],
)
def test_a_local_rank_without_a_gpu_is_one_line(
    monkeypatch: pytest.MonkeyPatch, variables: str, count: int
) -> None:
    set_variables(monkeypatch, variables)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError, match=rf"local rank {count} has no GPU: {count} visible on"):
        distributed.start()


def test_one_process_needs_no_group() -> None:
    world = distributed.start(cpu=True)
    assert world == World(0, 0, 1, torch.device("cpu"))
    assert world.is_main
    assert not torch.distributed.is_initialized()
    values = torch.tensor([1.0, 2.0])
    total = distributed.all_reduce_sum(values)
    assert total.tolist() == [1.0, 2.0]
    assert total is not values
    assert distributed.broadcast_object("x") == "x"
    assert distributed.all_gather_object("x") == ["x"]
    distributed.broadcast_buffers(torch.nn.BatchNorm2d(1))
    distributed.barrier()
    distributed.stop()


def test_environment_records_known_variables_only(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, "SLURM_JOB_ID=17 SLURM_JWT=secret TORCHELASTIC_RUN_ID=r")
    recorded = distributed.environment()
    assert recorded["host"] == socket.gethostname()
    assert recorded["slurm_job_id"] == "17"
    assert recorded["torchelastic_run_id"] == "r"
    assert "secret" not in recorded.values()


# Real processes

WORKER = """
import json, os, sys
from pathlib import Path
import torch
from image_classification import distributed

world = distributed.start()
tensor = torch.tensor([world.rank + 1.0, 10.0])
norm = torch.nn.BatchNorm1d(2)
norm.running_mean.fill_(world.rank + 5.0)
distributed.broadcast_buffers(norm)
distributed.barrier()
seen = {
    "world": [world.rank, world.local_rank, world.world_size, str(world.device), world.is_main],
    "backend": torch.distributed.get_backend(),
    "sum": distributed.all_reduce_sum(tensor).tolist(),
    "kept": tensor.tolist(),
    "from_one": distributed.broadcast_object({"rank": world.rank}, src=world.world_size - 1),
    "gathered": distributed.all_gather_object(world.rank * 10),
    "mean": norm.running_mean.tolist(),
}
distributed.stop()
seen["left"] = not torch.distributed.is_initialized()
Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(seen))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(**variables: object) -> dict[str, str]:
    # No GPU: the tests of collectives are about processes, and run the same everywhere.
    fixed = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **fixed, **{name: str(value) for name, value in variables.items()}}


def check_results(directory: Path, world_size: int) -> None:
    for rank in range(world_size):
        seen: dict[str, Any] = json.loads((directory / f"{rank}.json").read_text())
        last = world_size - 1
        assert seen == {
            "world": [rank, rank, world_size, "cpu", rank == 0],
            "backend": "gloo",
            "sum": [world_size * (world_size + 1) / 2, 10.0 * world_size],
            "kept": [rank + 1.0, 10.0],
            "from_one": {"rank": last},
            "gathered": [10 * r for r in range(world_size)],
            "mean": [5.0, 5.0],
            "left": True,
        }


def test_one_process_of_a_launcher_joins_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port()}"
    set_variables(monkeypatch, f"RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 {address}")
    try:
        assert distributed.start(cpu=True) == World(0, 0, 1, torch.device("cpu"))
        assert torch.distributed.get_backend() == "gloo"
        assert distributed.all_gather_object("x") == ["x"]
    finally:
        distributed.stop()
    assert not torch.distributed.is_initialized()


@pytest.mark.distributed
def test_collectives_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1"]
    options = ["--nproc-per-node=2", f"--master-port={free_port()}"]
    result = subprocess.run(
        [*torchrun, *options, str(script), str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    check_results(tmp_path, 2)


@pytest.mark.distributed
def test_collectives_under_slurm(tmp_path: Path) -> None:
    job = {
        "SLURM_NTASKS": 2,
        "SLURM_STEP_NODELIST": "127.0.0.[1-2,7],other[3-4]",  # the first one is this host
        "SLURM_JOB_ID": 123456,
        "MASTER_PORT": free_port(),
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)],
            env=environment(**job, SLURM_PROCID=rank, SLURM_LOCALID=rank),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for task in tasks:
            _, errors = task.communicate(timeout=120)
            assert task.returncode == 0, errors
    finally:
        for task in tasks:
            task.kill()
    check_results(tmp_path, 2)
