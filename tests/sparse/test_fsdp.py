"""Weights that FSDP2 and tensor parallelism spread over processes: what one process does, exactly.

The network has uneven shards and layers whose shard on the last rank is empty.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import sparse
from tests.sparse.nets import METHODS, assert_inactive_zero, make
from tests.sparse.ranks import run

pytestmark = pytest.mark.distributed

Model = Any  # an nn.Module, with the methods of FSDPModule where it is sharded


class Net(nn.Module):
    """Convolutions and linear layers of 5, 7, 9, 1 and 4 output channels."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 7, 3)
        self.f1, self.f2, self.f3 = nn.Linear(7, 9), nn.Linear(9, 1, bias=False), nn.Linear(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c2(self.c1(x).relu()).relu().mean((2, 3))
        out: Tensor = self.f3(self.f2(self.f1(x).relu()))
        return out


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def sharded(model: nn.Module, mesh: DeviceMesh | None = None, **options: Any) -> Model:
    """Shard every layer, and the rest."""
    for child in model.children():
        fully_shard(child, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def batch(step: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randn(8, 4, generator=generator)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def train(
    model: Model,
    optimizer: torch.optim.Optimizer,
    steps: range,
    *,
    rank: int = 0,
    clip: float = 0.0,
    accumulate: int = 1,
    scaler: torch.amp.GradScaler | None = None,
    overflow: int = -1,
) -> None:
    """Take steps on the batches of a rank; one rank alone sees an infinity at a step."""
    for step in steps:
        optimizer.zero_grad()
        for micro in range(accumulate):
            if accumulate > 1:
                model.set_requires_gradient_sync(micro == accumulate - 1)
            inputs, targets = batch(step * accumulate + micro, rank)
            loss = (model(inputs) - targets).square().mean() / accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()
        if step == overflow and rank == 0:
            local(next(model.parameters()).grad).view(-1)[0] = float("inf")
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()


def local(tensor: Any) -> Tensor:
    part: Tensor = tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()
    return part


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def results(model: nn.Module, sparsifier: sparse.Sparsifier) -> dict[str, Any]:
    """Gather all weights and masks, and what the sparsifier says."""
    return {
        "weights": {name: whole(p) for name, p in model.named_parameters()},
        "masks": {name: whole(mask) for name, mask in sparsifier.masks.items()},
        "num_active": sparsifier.num_active,
        "metrics": sparsifier.metrics(),
        "step": sparsifier.step,
    }


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {} for name in METHODS},
    "rigl explored": {"track_exploration": True, "drop_noise": 0.01},
    "rigl new": {"grow_init": "gradient", "initial_acc_scale": 0.5},
    "snfs magnitude": {"redistribution": "magnitude"},
    "snfs nonzero": {"redistribution": "nonzero", "growth": "random"},
}


def train_all(rank: int, world_size: int) -> dict[str, Any]:
    """Train with every method on the same batches on all ranks."""
    found = {}
    for name, options in OPTIONS.items():
        model: Model = net() if world_size == 1 else sharded(net())
        optimizer = sgd(model)
        sparsifier = make(name.split()[0], model, optimizer, sparsity=0.6, **options)
        train(model, optimizer, range(14))
        found[name] = results(model, sparsifier)
        assert sparsifier.num_updates > 0 or name == "static"
    return found


def test_every_method_on_two_ranks_does_what_one_process_does(tmp_path: Path) -> None:
    alone = train_all(0, 1)
    for found in run(2, train_all, tmp_path):
        for name in OPTIONS:
            assert_same(found[name], alone[name])
