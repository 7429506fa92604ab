"""scripts/slurm/train.sbatch, with stand-ins for SLURM's commands."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


class Cluster:
    """A checkout with one row, and an srun and an scontrol that write down their arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        (folder / "row.sh").write_text(
            'echo "row $* in RESULTS=${RESULTS-}" >>calls\nexit $STATUS\n'
        )
        self.add("scontrol", "")
        self.add("srun", 'while [[ $1 == -* ]]; do shift; done\nexec "$@"')

    def add(self, name: str, body: str) -> None:
        """Add a command."""
        command = self.folder / name
        command.write_text(f"#!/usr/bin/env bash\necho {name} $* >>calls\n{body}\n")
        command.chmod(0o755)

    def submit(self, *arguments: str, status: int = 0, **variables: str) -> tuple[int, list[str]]:
        """Run the job, whose row ends with `status`; return its own status and the calls."""
        result = subprocess.run(
            ["bash", str(ROOT / "scripts/slurm/train.sbatch"), *arguments],
            env={
                "PATH": f"{self.folder}:{os.environ['PATH']}",
                "SLURM_JOB_ID": "17",
                "STATUS": str(status),
                **variables,
            },
            cwd=self.folder,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
        return result.returncode, self.calls.read_text().splitlines()

    def checkpoint(self) -> dict[str, Any]:
        """Return the newest checkpoint."""
        path = self.folder / "out/checkpoint.pth.tar"
        return dict(torch.load(path, weights_only=True))


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """A cluster."""
    return Cluster(tmp_path)


def test_the_row_resumes_by_itself(cluster: Cluster) -> None:
    status, calls = cluster.submit("row.sh", "--epochs", "3")
    assert status == 0
    assert calls[1:] == ["row --epochs 3 --resume auto in RESULTS="]


def test_status_75_queues_the_job_again(cluster: Cluster) -> None:
    status, calls = cluster.submit("row.sh", status=75)
    assert status == 0
    assert calls[-1] == "scontrol requeue 17"


@pytest.mark.parametrize("status", [1, 2, 137])
def test_any_other_failure_ends_it(cluster: Cluster, status: int) -> None:
    returned, calls = cluster.submit("row.sh", status=status)
    assert returned == status
    assert not [call for call in calls if call.startswith("scontrol")]


def test_requeues_are_limited(cluster: Cluster) -> None:
    status, calls = cluster.submit("row.sh", status=75, SLURM_RESTART_COUNT="4", MAX_REQUEUES="4")
    assert status == 75
    assert not [call for call in calls if call.startswith("scontrol")]


def test_a_container_gets_data_and_results(cluster: Cluster) -> None:
    status, calls = cluster.submit(
        "row.sh",
        CONTAINER="rn50.sqsh",
        DATA="/scratch/imagenet",
        RESULTS=f"{cluster.folder}/runs/a",
    )
    assert status == 0
    assert "--container-image=rn50.sqsh" in calls[0]
    mounts = f"/scratch/imagenet:/data/imagenet:ro,{cluster.folder}/runs/a:/workspace/rn50/results"
    assert f"--container-mounts={mounts}" in calls[0]
    assert calls[1].endswith("in RESULTS=/workspace/rn50/results")
    assert (cluster.folder / "runs/a").is_dir()


@pytest.mark.parametrize("signal", ["TERM", "USR1"])
def test_a_signal_to_the_job_waits_for_the_tasks(cluster: Cluster, signal: str) -> None:
    cluster.add("srun", f'kill -{signal} $PPID; sleep 0.2; exec bash -c "exit 75"')
    status, calls = cluster.submit("row.sh")
    assert status == 0
    assert calls[-1] == "scontrol requeue 17"


def test_an_interrupted_training_goes_on_where_it_was(cluster: Cluster) -> None:
    """The trainer itself: SLURM's signal, a checkpoint, status 75, the queue, one epoch more."""
    flags = "--arch small_cnn --image-size 16 -b 4 --epochs 999 -p 1 --cpu --seed 1 --training-only"
    flags += " --data-backend synthetic --synthetic-batches 20 --workspace out"
    more = "${SLURM_RESTART_COUNT:+--run-epochs 1}"
    (cluster.folder / "row.sh").write_text(
        f'exec {sys.executable} {ROOT}/main.py {flags} {more} "$@"\n'
    )
    cluster.add(
        "srun",
        """
        while [[ $1 == -* ]]; do shift; done
        "$@" &
        if [[ ! ${SLURM_RESTART_COUNT:-} ]]; then
            until grep -q train.loss out/experiment_raport.json; do sleep 0.1; done
            kill -USR1 $!
        fi 2>/dev/null
        wait $!
        """,
    )
    status, calls = cluster.submit("row.sh")
    assert (status, calls[-1]) == (0, "scontrol requeue 17")
    interrupted = cluster.checkpoint()
    assert interrupted["step"] == 20 * interrupted["epoch"] + interrupted["epoch_step"]
    status, calls = cluster.submit("row.sh", SLURM_RESTART_COUNT="1")
    assert status == 0
    assert sum(call.startswith("scontrol") for call in calls) == 1
    assert cluster.checkpoint()["step"] == 20 * (interrupted["epoch"] + 1)


def test_a_missing_row_is_named(cluster: Cluster) -> None:
    cluster.calls.touch()
    assert cluster.submit("rows.sh")[0] == 2
    assert cluster.submit()[0] == 2
