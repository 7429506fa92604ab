"""Several processes: growth by |mean gradient|, identical masks, and divergence that is caught."""

import copy
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import sparse
from tests.sparse.nets import backward, make, mlp, rows, sgd, train
from tests.sparse.ranks import run

pytestmark = pytest.mark.distributed

METHODS = [
    "rigl",
    "set",
    "snfs",
    "snfs_none",
    "magnitude",
    "magnitude_global",
    "snip",
    "snip_global",
    "gmp",
    "acdc",
    "granet",
    "srigl",
    "gap",
]
STEPS = range(13)


def results_of(model: Any, sparsifier: sparse.Sparsifier) -> dict[str, Any]:
    weights = {name: weight.detach() for name, weight in sparse.prunable(model).items()}
    return {"masks": sparsifier.masks, "weights": weights, "step": sparsifier.step}


def train_share(rank: int, world_size: int) -> dict[str, Any]:
    """Train every method on this rank's share of each batch, and RigL with mean |gradient|."""
    results = {}
    for method in METHODS:
        model = DistributedDataParallel(mlp(seed=rank))  # rank 0's weights win
        optimizer = sgd(model, lr=0.5)
        sparsifier = make(method, model, optimizer)
        torch.manual_seed(rank)  # as data loading does: masks must not depend on it

        def share(step: int) -> tuple[torch.Tensor, torch.Tensor]:
            inputs, labels = rows(step)
            return inputs.chunk(world_size)[rank], labels.chunk(world_size)[rank]

        list(train(model, optimizer, STEPS, share))
        results[method] = results_of(model, sparsifier)
    results["local"] = mean_of_magnitudes(rank, world_size)
    return results


def mean_of_magnitudes(rank: int, world_size: int) -> dict[str, Any]:
    """Give the masks of a first RigL update that ranks by the mean over ranks of |gradient|."""
    model = mlp()
    optimizer = sgd(model)
    sparsifier = make("rigl", model, optimizer, drop_anneal="constant")
    inputs, labels = rows(0)
    backward(model, (inputs.chunk(world_size)[rank], labels.chunk(world_size)[rank]))
    for parameter in model.parameters():
        parameter.grad.abs_()
        distributed.all_reduce(parameter.grad)
    optimizer.step()
    return sparsifier.masks


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_do_what_one_process_does(world_size: int, tmp_path: Path) -> None:
    ranks = run(world_size, train_share, tmp_path)
    for method in METHODS:
        model = mlp()
        optimizer = sgd(model, lr=0.5)
        sparsifier = make(method, model, optimizer)
        list(train(model, optimizer, STEPS, rows))
        alone = results_of(model, sparsifier)
        for name, mask in alone["masks"].items():
            assert torch.equal(mask, ranks[0][method]["masks"][name]), (method, name)
            weight = ranks[0][method]["weights"][name]
            torch.testing.assert_close(weight, alone["weights"][name])
            for rank in ranks[1:]:
                assert torch.equal(rank[method]["masks"][name], mask)
                assert torch.equal(rank[method]["weights"][name], weight)
        assert ranks[0][method]["step"] == alone["step"]
    # What averages |gradient| over ranks would have grown something else.
    model = mlp()
    optimizer = sgd(model)
    sparsifier = make("rigl", model, optimizer, drop_anneal="constant")
    list(train(model, optimizer, range(1), rows))
    wrong = ranks[0]["local"]
    assert any(not torch.equal(mask, wrong[name]) for name, mask in sparsifier.masks.items())


def plant_divergence(rank: int, world_size: int) -> str:
    """Let one rank's weights go astray between two updates and report what the library says."""
    model = DistributedDataParallel(mlp())
    optimizer = sgd(model)
    sparsifier = make("rigl", model, optimizer, drop_anneal="constant")
    list(train(model, optimizer, range(2), rows))
    if rank == 1:
        with torch.no_grad():
            model.module[2].weight.copy_(
                model.module[2].weight.flip(0) * sparsifier.masks["2.weight"]
            )
    try:
        list(train(model, optimizer, range(2, 9), rows))
    except RuntimeError as error:
        return f"step {sparsifier.step}: {error}"
    return "nothing noticed"


def start_differently(rank: int, world_size: int) -> str:
    """Give the ranks different seeds and report what the library says at the first step."""
    model = DistributedDataParallel(mlp())
    optimizer = sgd(model)
    make("static", model, optimizer, seed=rank // 2)
    try:
        list(train(model, optimizer, range(1), rows))
    except RuntimeError:
        return traceback.format_exc(limit=0)
    return "nothing noticed"


def join_early(rank: int, world_size: int) -> dict[str, Any]:
    """Give one process fewer batches, and report what the library says, or the steps taken."""
    found: dict[str, Any] = {}
    for method in ("static", "rigl", "set"):
        model = DistributedDataParallel(mlp())
        optimizer = sgd(model)
        sparsifier = make(method, model, optimizer)
        try:
            with model.join():
                list(train(model, optimizer, range(6 + 5 * rank), rows))
        except ValueError as error:
            found[method] = str(error)
        else:
            found[method] = sparsifier.step
    return found


def test_processes_that_end_early_cannot_follow_updates(tmp_path: Path) -> None:
    """They would wait for each other; masks that never change are no reason to refuse them."""
    for rank, found in enumerate(run(2, join_early, tmp_path)):
        assert found["static"] == 6 + 5 * rank
        for method in ("rigl", "set"):
            assert found[method].startswith("DistributedDataParallel.join() lets a process end")


def test_divergence_is_caught_and_names_layer_and_rank(tmp_path: Path) -> None:
    for message in run(2, plant_divergence, tmp_path):
        assert message.startswith("step 4: the mask of 2.weight on rank 1 differs from rank 0")
    for message in run(3, start_differently, tmp_path):
        assert "the mask of 0.weight on rank 2 differs from rank 0" in message


def test_masks_of_one_process_need_no_process_group() -> None:
    model = mlp()
    optimizer = sgd(model)
    sparsifier = make("rigl", model, optimizer)
    before = copy.deepcopy(sparsifier.masks)
    list(train(model, optimizer, range(1), rows))
    assert sparsifier.num_updates == 1
    assert before.keys() == sparsifier.masks.keys()


def train_several_models(rank: int, world_size: int) -> dict[str, Any]:
    """Train models that not all ranks share; give what the library says."""
    found: dict[str, Any] = {}
    # A sweep: every rank has a model of its own, and takes as many steps as it likes.
    model = mlp(seed=rank)
    optimizer = sgd(model)
    sparsifier = make("snfs", model, optimizer, seed=rank)
    list(train(model, optimizer, range(5 + 3 * rank), rows))
    found["steps"] = sparsifier.step
    # Stages of a pipeline: other layers on each rank.
    stage: Any = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(1 + rank)])
    optimizer = sgd(stage)
    sparsifier = make("rigl", stage, optimizer)
    stage(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    found["updates"] = sparsifier.num_updates
    # Two pairs of ranks, each with a model and a seed of its own.
    pairs = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    pair = pairs[rank // 2]
    wrapped = DistributedDataParallel(mlp(seed=rank // 2), process_group=pair)
    optimizer = sgd(wrapped)
    make("rigl", wrapped, optimizer, seed=rank // 2)
    list(train(wrapped, optimizer, range(9), rows))
    # A bare model whose group is named: the last pair does not agree.
    bare = mlp()
    optimizer = sgd(bare)
    make("static", bare, optimizer, seed=rank if rank > 1 else 0, process_group=pair)
    try:
        list(train(bare, optimizer, range(1), rows))
    except RuntimeError as error:
        found["error"] = str(error)
    return found


def test_only_the_ranks_that_share_a_model_compare_its_masks(tmp_path: Path) -> None:
    results = run(4, train_several_models, tmp_path)
    assert [found["steps"] for found in results] == [5, 8, 11, 14]
    assert [found["updates"] for found in results] == [1, 1, 1, 1]
    assert ["error" in found for found in results] == [False, False, True, True]
    assert "on rank 3 differs from rank 2" in results[2]["error"]
