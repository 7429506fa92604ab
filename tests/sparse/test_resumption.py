"""`sparse.resume`: model and optimizer were loaded before there was a sparsifier."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import sparse
from sparse.topology.shards import whole
from sparse.training import checkpoints
from tests.sparse.nets import METHODS, assert_inactive_zero, convnet, make, sgd, train
from tests.sparse.ranks import run
from tests.sparse.test_checkpoints import assert_identical


def interrupted(name: str, steps: int) -> tuple[nn.Module, Any, sparse.Sparsifier]:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make(name, model, optimizer)
    for _ in train(model, optimizer, range(steps)):
        pass
    return model, optimizer, sparsifier


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("steps", [0, 1, 6])
def test_it_goes_on_as_if_nothing_had_happened(name: str, steps: int) -> None:
    model, optimizer, sparsifier = interrupted(name, steps)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()))
    other = convnet(seed=1)
    other.load_state_dict(saved[0])
    its_optimizer = sgd(other)
    its_optimizer.load_state_dict(saved[1])
    resumed = sparse.resume(other, its_optimizer, sparsifier.method, saved[2])
    assert_identical(other.state_dict(), saved[0])
    assert_identical(resumed.state_dict(), saved[2])
    assert_inactive_zero(resumed, other, its_optimizer)
    for network, its in ((model, optimizer), (other, its_optimizer)):
        for _ in train(network, its, range(steps, 15)):
            pass
    assert_identical(other.state_dict(), model.state_dict())
    assert_identical(resumed.state_dict(), sparsifier.state_dict())


def test_what_would_lose_weights_is_refused() -> None:
    model, optimizer, sparsifier = interrupted("rigl", 6)
    state, method = sparsifier.state_dict(), sparsifier.method
    sparsifier.remove()
    untrained = convnet(seed=1)
    before = copy.deepcopy(untrained.state_dict())
    with pytest.raises(ValueError, match=r"0.weight is not 0 where its mask is inactive"):
        sparse.resume(untrained, sgd(untrained), method, state)
    assert_identical(untrained.state_dict(), before)
    for other, words in (
        (sparse.METHODS["set"](sparsity=0.8, t_end=9), "written by method 'rigl', this run uses"),
        (sparse.METHODS["rigl"](sparsity=0.81, t_end=9), "active weights, this run"),
        (sparse.METHODS["rigl"](sparsity=0.8, t_end=9, dense_layers=["0.*"]), "has a mask for 0.w"),
    ):
        with pytest.raises(ValueError, match=words):
            sparse.resume(model, optimizer, other, state)
    narrow = nn.Sequential(nn.Conv2d(2, 4, 3), *convnet()[1:])
    with pytest.raises(ValueError, match="shape"):
        sparse.resume(narrow, sgd(narrow), method, state)
    with pytest.raises(ValueError, match="'version' is missing"):
        sparse.resume(model, optimizer, method, {})
    torch.testing.assert_close(sparse.summary(model).sparsity, 0.8, atol=0.01, rtol=0)


def resume_sharded(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for kind in ("whole", "resumed"):
        model = convnet()
        for layer in (*model, model):
            if any(True for _ in layer.parameters()):
                fully_shard(layer)
        optimizer = sgd(model)
        sparsifier = make("rigl", model, optimizer)
        for step in train(model, optimizer, range(12)):
            if step == 6 and kind == "resumed":
                state = checkpoints.collected(sparsifier.state_dict())
                sparsifier.remove()
                sparsifier = sparse.resume(model, optimizer, sparsifier.method, state)
        results[kind] = checkpoints.collected(sparsifier.state_dict())
        results[kind]["weights"] = {n: whole(w.detach()) for n, w in model.named_parameters()}
    return results


@pytest.mark.distributed
def test_sharded_weights_go_on(tmp_path: Path) -> None:
    for results in run(2, resume_sharded, tmp_path):
        assert results["whole"]["num_updates"] == 3
        assert_identical(results["resumed"], results["whole"])
