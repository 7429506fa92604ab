"""Runs of main.py in processes of their own that begin in a moment.

They are forked from a server that has imported everything and started nothing.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
# The first of all tests that fork starts the server, so the list has what any of them needs.
_CONTEXT.set_forkserver_preload(
    [
        "main",
        "image_classification.data.dali_graph",
        "lightning.pytorch",
        "tests.sparse.ranks",
        "tests.sparse.nets",
    ]
)


def start(argv: Sequence[str], output: Path, **variables: str) -> ForkServerProcess:
    """Start main.py; what it prints is added to `output`."""
    process = _CONTEXT.Process(target=_run, args=(list(argv), str(output), variables))
    process.start()
    return process


def finish(argv: Sequence[str], output: Path) -> int:
    """Run main.py to its end and return its exit status."""
    process = start(argv, output)
    process.join(120)
    assert process.exitcode is not None, output.read_text()[-2000:]
    return process.exitcode


def finish_together(argv: Sequence[str], output: Path, world_size: int = 2) -> list[int]:
    """Run main.py on several processes, as torchrun starts them; return their exit statuses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    processes = [
        start(argv, output, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(world_size), **meeting)
        for rank in map(str, range(world_size))
    ]
    try:
        for process in processes:
            process.join(120)
        assert all(p.exitcode is not None for p in processes), output.read_text()[-2000:]
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode or 0 for process in processes]


def _run(argv: list[str], output: str, variables: dict[str, str]) -> None:
    import main

    os.environ.update(variables)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    multiprocessing.set_start_method("fork", force=True)  # as in a process of the shell
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main.main(argv))


def wait_until(condition: Callable[[], bool], process: ForkServerProcess) -> None:
    """Wait for something that a running process is to do."""
    deadline = time.monotonic() + 60
    while not condition():
        assert process.is_alive(), f"ended with {process.exitcode} before"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def records(workspace: Path) -> list[dict[str, Any]]:
    """Return the complete records of a raport, possibly that of a killed run."""
    path = workspace / "experiment_raport.json"
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            record = json.loads(line.removeprefix("DLLL "))
        except json.JSONDecodeError:  # cut by a kill
            continue
        if record["type"] == "LOG" and isinstance(record["step"], list):
            found.append(record)
    return found


def losses(workspace: Path) -> dict[str, float]:
    """Return metric and step -> value of all losses and accuracies; the last one written counts."""
    return {
        f"{metric} at {record['step']}": value
        for record in records(workspace)
        for metric, value in record["data"].items()
        if metric.rpartition(".")[2] in ("loss", "top1", "top5", "lr", "grad_scale")
    }


def state(workspace: Path) -> dict[str, Any]:
    """Return what of the newest checkpoint has to be the same in every run, by path of keys."""
    saved = torch.load(workspace / "checkpoint.pth.tar", weights_only=True)
    saved["ranks"] = [rank["rng"] for rank in saved["ranks"]]  # meters hold times
    del saved["config"], saved["totals"]
    return dict(_flat(saved, ""))


def _flat(value: Any, key: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for name, part in value.items() for pair in _flat(part, f"{key}.{name}")]
    if isinstance(value, list | tuple):
        return [pair for i, part in enumerate(value) for pair in _flat(part, f"{key}[{i}]")]
    return [(key, value)]


def assert_same_weights(workspace: Path, whole: Path) -> None:
    """Check that a run ended bit for bit as the uninterrupted one did."""
    ours, theirs = state(workspace), state(whole)
    assert ours.keys() == theirs.keys()
    different = [
        key
        for key, value in theirs.items()
        if not (torch.equal(value, ours[key]) if torch.is_tensor(value) else value == ours[key])
    ]
    assert not different, f"{different[:5]} and others of {len(different)} differ"


def assert_same(workspace: Path, whole: Path) -> None:
    """Check that a run ended bit for bit as the uninterrupted one did, and logged the same."""
    assert_same_weights(workspace, whole)
    assert losses(workspace) == losses(whole)
