"""Several processes: optimizer state in shards, and questions to the sparsifier on single ranks."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import sparse
from tests.sparse.nets import backward, convnet, images, make, sgd
from tests.sparse.ranks import run

pytestmark = pytest.mark.distributed

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
}
METHODS = ["rigl", "set", "snfs", "snip", "gmp", "acdc", "granet", "srigl", "gap"]


def share(step: int, rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, labels = images(step)
    return inputs.chunk(world_size)[rank], labels.chunk(world_size)[rank]


def train_with_and_without_shards(rank: int, world_size: int) -> dict[str, Any]:
    """Train with all of the optimizer's state on every rank, and with a part of it on each."""
    results: dict[str, Any] = {}
    for method in METHODS:
        for name, (kind, options) in OPTIMIZERS.items():
            scale = {"initial_acc_scale": 0.5} if (method, name) == ("rigl", "momentum") else {}
            ends = []
            for sharded in (False, True):
                model = DistributedDataParallel(convnet())
                optimizer = (
                    ZeroRedundancyOptimizer(model.parameters(), kind, **options)
                    if sharded
                    else kind(model.parameters(), **options)
                )
                sparsifier = make(method, model, optimizer, **scale)
                for step in range(14):
                    optimizer.zero_grad()
                    backward(model, share(step, rank, world_size))
                    optimizer.step()
                    sparsifier.metrics()  # looks at weights and at the state of this rank
                if sharded:
                    optimizer.consolidate_state_dict(to=0)
                ends.append({n: p.detach().clone() for n, p in model.module.named_parameters()})
                ends[-1] |= {f"mask of {n}": mask for n, mask in sparsifier.masks.items()}
            results[f"{method} {name}"] = ends
    return results


def test_state_that_is_spread_over_ranks(tmp_path: Path) -> None:
    for results in run(2, train_with_and_without_shards, tmp_path):
        for case, (whole, sharded) in results.items():
            for name, value in whole.items():
                assert torch.equal(value, sharded[name]), (case, name)


def ask_single_ranks(rank: int, world_size: int) -> dict[str, Any]:
    """Train with overflows and packed gradients; ranks ask different questions at random."""
    results: dict[str, Any] = {}
    for method in ("rigl", "set", "snip", "gmp"):
        for seed in range(3):
            ends = []
            for curious in (False, True):
                model = convnet()
                optimizer = sgd(model, fused=True)
                sparsifier = make(method, model, optimizer)
                wrapped = DistributedDataParallel(model)
                sparse.compress_gradients(wrapped, sparsifier)
                scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
                overflows = random.Random(seed)
                questions = random.Random(100 * seed + rank)
                for step in range(14):
                    optimizer.zero_grad()
                    inputs, labels = share(step, rank, world_size)
                    if overflows.random() < 0.3:
                        inputs = inputs * float("inf")
                    loss = nn.functional.cross_entropy(wrapped(inputs), labels)
                    scaler.scale(loss).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    model[1].reset_running_stats()  # which saw the infinite images
                    if curious:
                        ask(sparsifier, questions)
                ends.append({"step": sparsifier.step, **model.state_dict(), **sparsifier.masks})
            results[f"{method} {seed}"] = ends
    return results


def ask(sparsifier: sparse.Sparsifier, questions: random.Random) -> None:
    for question in (
        sparsifier.state_dict,
        sparsifier.metrics,
        lambda: sparsifier.step,
        lambda: sparsifier.masks,
        lambda: sparsifier.is_update_step,
        lambda: sparsifier.num_active,
        lambda: sparsifier.needs_dense_gradients,
    ):
        if questions.random() < 0.3:
            question()


def test_questions_on_single_ranks_change_nothing(tmp_path: Path) -> None:
    one, other = run(2, ask_single_ranks, tmp_path)
    for case, (quiet, curious) in one.items():
        assert quiet["step"] < 14, case
        for name, value in quiet.items():
            for end in (curious, *other[case]):
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(end[name])), (case, name)
