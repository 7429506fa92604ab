"""Two hosts: the same training on them as on one, and how little of the gradients travels."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import hosts
from benchmarks.hosts import Host

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


@pytest.fixture
def pair() -> Iterator[tuple[Host, Host]]:
    """Two hosts joined by a cable."""
    reason = hosts.why_not()
    if reason is not None:
        pytest.skip(reason)
    with hosts.two_hosts() as two:
        yield two


def start(command: list[str], **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=ENVIRONMENT | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Wait for processes, which must succeed, and give what they printed."""
    outputs = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=150)
            assert process.returncode == 0, errors[-4000:]
            outputs.append(output)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    return outputs


TRAIN = ["bash", str(ROOT / "scripts/train.sh"), "row", "8"]
FLAGS = (
    "--arch small_cnn --image-size 32 --data-backend synthetic --synthetic-batches 6 --cpu "
    "--lr 0.05 --epochs 1 -p 1 --seed 3 --training-only --grad-compress active "
    "--sparse-method rigl --sparsity 0.9 --delta-t 3"
).split()


def start_nodes(
    pair: tuple[Host, Host], *flags: str, **variables: str
) -> list[subprocess.Popen[str]]:
    """Start a row with one process on each host."""
    return [
        start(
            host.command(*TRAIN, *FLAGS, *flags),
            NPROC="1",
            NODE_RANK=str(rank),
            NODE_ADDR=host.address,
            MASTER_ADDR=pair[0].address,
            GLOO_SOCKET_IFNAME=host.interface,
            **variables,
        )
        for rank, host in enumerate(pair)
    ]


def records(results: Path) -> list[dict[str, float]]:
    lines = (results / "raport.json").read_text().splitlines()
    parsed = [json.loads(line.removeprefix("DLLL ")) for line in lines]
    return [r["data"] for r in parsed if r["type"] == "LOG"]


def test_two_nodes_train_as_one_does(pair: tuple[Host, Host], tmp_path: Path) -> None:
    """Over torchrun's rendezvous, with processes that share nothing but the cable and a disk."""
    once, twice = tmp_path / "one", tmp_path / "two"
    finish([start([*TRAIN, *FLAGS], RESULTS=str(once), DATA=str(tmp_path), NPROC="2")])
    finish(start_nodes(pair, RESULTS=str(twice), DATA=str(tmp_path), NNODES="2"))
    losses = [
        [data["train.loss"] for data in records(results) if "train.loss" in data]
        for results in (once, twice)
    ]
    assert len(losses[0]) == 6 + 1 + 1
    assert losses[0] == losses[1]
    states: list[dict[str, Any]] = [
        torch.load(results / "checkpoint.pth.tar", weights_only=True)["state_dict"]
        for results in (once, twice)
    ]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_hosts_of_a_dead_process_are_removed(pair: tuple[Host, Host]) -> None:
    finished = subprocess.Popen(["true"])
    finished.wait()
    leftover = pair[0].name.replace(str(os.getpid()), str(finished.pid))
    subprocess.run(["ip", "netns", "add", leftover], check=True)
    with hosts.two_hosts() as others:
        names = subprocess.check_output(["ip", "netns", "list"], text=True)
        assert leftover not in names
        assert all(host.name in names for host in (*pair, *others))
    names = subprocess.check_output(["ip", "netns", "list"], text=True)
    assert all(host.name in names for host in pair)
    assert not any(host.name in names for host in others)


@pytest.mark.slow
def test_a_node_that_is_lost_leaves_the_other_with_all_the_work(
    pair: tuple[Host, Host], tmp_path: Path
) -> None:
    results = tmp_path / "results"
    flags = "--resume auto --epochs 8 --synthetic-batches 60".split()
    elastic = {"NNODES": "1:2", "MAX_RESTARTS": "1"}
    first, second = start_nodes(pair, *flags, RESULTS=str(results), DATA=str(tmp_path), **elastic)
    try:
        deadline = time.monotonic() + 120
        while not (results / "checkpoint.pth.tar").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert first.poll() is None
        assert second.poll() is None
    finally:
        pair[1].kill()
        second.communicate()
    (output,) = finish([first])
    assert "one process has nothing to send" in output  # as it said after the restart
    state = torch.load(results / "checkpoint.pth.tar", weights_only=True)
    # Synthetic epochs hold 60 batches of each process: with half of them, and the global batch kept
    # by accumulation, 30 steps.
    assert state["epoch"] == 8
    assert state["step"] in [60 * together + 30 * (8 - together) for together in range(1, 8)]


SEND = """
import json, sys
import torch, torchvision
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
import sparse
from benchmarks.hosts import sent_bytes

rank, address, interface = int(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed.init_process_group(
    "gloo", init_method=f"tcp://{address}:29500", rank=rank, world_size=2
)


def bytes_per_step(sparsity):
    '''Backward through all weights of ResNet-50 without its layers: gradients are what is sent.'''
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    model.to_empty(device="cpu")
    for weight in model.parameters():
        torch.nn.init.uniform_(weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ddp = DistributedDataParallel(Sum(model), gradient_as_bucket_view=True)
    if sparsity is not None:
        sparsifier = sparse.rigl(model, optimizer, sparsity=sparsity, delta_t=1000, t_end=2000)
        sparse.compress_gradients(ddp, sparsifier)
    steps = []
    for step in range(3):
        distributed.barrier()
        before = sent_bytes(interface)
        ddp().backward()
        distributed.barrier()
        steps.append(sent_bytes(interface) - before)
        optimizer.step()
        optimizer.zero_grad()
    return steps


class Sum(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.weights = torch.nn.ParameterList(model.parameters())

    def forward(self):
        return sum(weight.sum() for weight in self.weights)


sent = {str(sparsity): bytes_per_step(sparsity) for sparsity in (None, 0.9, 0.8)}
distributed.destroy_process_group()
print(json.dumps(sent))
"""


def test_bytes_on_the_wire(pair: tuple[Host, Host]) -> None:
    """Read from the counters of the network cards, headers and acknowledgments included."""
    processes = [
        start(
            host.command(sys.executable, "-c", SEND, str(rank), pair[0].address, host.interface),
            PYTHONPATH=str(ROOT),
            GLOO_SOCKET_IFNAME=host.interface,
        )
        for rank, host in enumerate(pair)
    ]
    for output in finish(processes):
        sent = json.loads(output.splitlines()[-1])  # gloo of torch 2.9 prints a line of its own
        dense = min(sent["None"])
        assert dense > 4 * 25_557_032
        assert sent["0.9"][0] > 0.95 * dense  # the update of step 0 needs every gradient
        assert max(sent["0.9"][2:]) <= 0.12 * dense  # at step 1 DDP settles on its buckets
        assert max(sent["0.8"][2:]) <= 0.23 * dense
