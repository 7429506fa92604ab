"""Start processes that are joined by gloo."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import distributed

from tests import forks  # noqa: F401  (it lists what the server of all forks imports)


def run(
    world_size: int, work: Callable[..., Any], folder: Path, start_method: str = "forkserver"
) -> list[Any]:
    """Run `work(rank, world_size)` in processes joined by gloo and give their results by rank.

    Work on a GPU needs the start method "spawn": CUDA does not survive a fork, and what the server
    of all forks imports may have asked it something.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (world_size, port, work, str(folder))
    mp.start_processes(_process, arguments, nprocs=world_size, start_method=start_method)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _process(rank: int, world_size: int, port: int, work: Callable[..., Any], folder: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    try:
        torch.save(work(rank, world_size), Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()
