"""What sharding costs a sparse step: ResNet-50 on two processes under FSDP2, against plain weights.

Each process has a part of every weight. The same process also trains a plain model with as many
weights as its part. The rounds of both alternate. Prints the medians of wall times of what the
sparsifier does in an ordinary step (masking) and in an update of RigL, and the collectives of an
update. One thread per process, gloo.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
import torchvision
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout

import sparse

PORT = 29_655


class Collectives(TorchDispatchMode):
    """Lists the collectives that run, with the bytes of their tensors on this process."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        if "c10d" in function.namespace:
            tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.found.append((str(function), sum(tensor.nbytes for tensor in tensors)))
        return function(*args, **(kwargs or {}))


class Training:
    """A model with RigL, whose gradients are random."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = list(model.parameters())
        self._optimizer = torch.optim.SGD(self._parameters, lr=0.01, momentum=0.9)
        settings = {"delta_t": 2, "t_end": 10**6, "drop_anneal": "constant", "hooks": False}
        self._sparsifier = sparse.rigl(model, self._optimizer, sparsity=0.9, **settings)  # type: ignore[arg-type]

    def step(self) -> tuple[str, float]:
        """Take a step; give its kind and the seconds that the sparsifier took."""
        for parameter in self._parameters:
            parameter.grad = torch.randn_like(parameter)
        kind = "update" if self._sparsifier.is_update_step else "masking"
        distributed.barrier()
        start = time.perf_counter()
        self._sparsifier.before_step()
        seconds = time.perf_counter() - start
        self._optimizer.step()
        start = time.perf_counter()
        self._sparsifier.after_step()
        return kind, seconds + time.perf_counter() - start


def sharded() -> nn.Module:
    """Shard every block of ResNet-50, and the rest."""
    model = torchvision.models.resnet50()
    for module in model.modules():
        if isinstance(module, torchvision.models.resnet.Bottleneck):
            fully_shard(module)
    fully_shard(model)
    return model


def plain_like(model: nn.Module) -> nn.Module:
    """Build linear layers with as many weights as lie here of each prunable layer of a model."""
    parts = [weight.to_local() for weight in sparse.prunable(model).values()]  # type: ignore[operator]
    shapes = [(part.shape[0], part[0].numel()) for part in parts]
    return nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)


def work(rank: int, rounds: int) -> None:
    """Measure on one process."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{PORT}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = sharded()
    trainings = {
        "sharded": Training(model),
        "as many plain weights": Training(plain_like(model)),
        "all weights, plain": Training(torchvision.models.resnet50()),
    }
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(2 * (rounds + 1)):
        for name, training in trainings.items():
            kind, taken = training.step()
            seconds.setdefault((name, kind), []).append(taken)
    with Collectives() as collectives:
        trainings["sharded"].step()
    if rank == 0:
        for (name, kind), times in seconds.items():
            print(f"{kind:8} {name:22} {1e3 * statistics.median(times[1:]):8.2f} ms")
        found = [size for name, size in collectives.found if "barrier" not in name]
        print(f"an update takes {len(found)} collectives with {sum(found)} bytes")
    distributed.destroy_process_group()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    mp.spawn(work, (arguments.rounds,), nprocs=2)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
