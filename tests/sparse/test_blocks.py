"""Blocks of weights that are active together: exact, whole, and chosen by their sums."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import sparse
from tests.sparse.nets import assert_inactive_zero, convnet, make, sgd, train
from tests.sparse.ranks import run

MOVING = ("set", "rigl", "rigl_reset", "snfs_none", "gmp", "snip", "magnitude", "static", "acdc")
REFUSED = {
    "snfs": "redistribution 'momentum' moves single weights between layers",
    "gmp_global": "the global scope ranks the single weights of all layers",
    "granet": "granet ranks the single weights of all layers",
    "srigl": "srigl gives every row the same number of single weights",
    "gap": "gap grows and prunes single weights",
}
BLOCKS = [(1, 2), (1, 4), (2, 2), (4, 1)]


def parts(mask: Tensor, block: tuple[int, int]) -> Tensor:
    """Count the active weights of every block."""
    rows, columns = block
    shape = (mask.shape[0] // rows, rows, mask.shape[1] // columns, columns, *mask.shape[2:])
    return mask.view(shape).sum((1, 3))


def divides(block: tuple[int, int], shape: torch.Size) -> bool:
    return shape[0] % block[0] == 0 and shape[1] % block[1] == 0


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("method", MOVING)
def test_blocks_move_as_a_whole_and_their_number_is_exact(
    method: str, block: tuple[int, int]
) -> None:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make(method, model, optimizer, block=block)
    wanted = sparsifier.method.final_counts
    before = sparsifier.masks
    for _ in train(model, optimizer, range(20)):
        assert_inactive_zero(sparsifier, model, optimizer)
    assert sparsifier.num_active == wanted
    for name, mask in sparsifier.masks.items():
        size = block[0] * block[1] if divides(block, mask.shape) else 1
        counts = parts(mask, block if size > 1 else (1, 1))
        assert set(counts.unique().tolist()) <= {0, size}, name
        assert sparsifier.method.final_counts[name] % size == 0
    moved = any(not torch.equal(before[name], mask) for name, mask in sparsifier.masks.items())
    assert moved == (method not in ("static", "magnitude", "rigl_reset"))


def test_counts_are_those_of_whole_blocks() -> None:
    shapes = {"first": (16, 3, 3, 3), "second": (8, 12, 1, 1), "third": (10, 8)}
    counts = sparse.allocate(shapes, sparsity=0.7, distribution="uniform", dense_layers=())
    assert counts == {"first": 432 - 302, "second": 96 - 67, "third": 80 - 56}
    counts = sparse.allocate(
        shapes, sparsity=0.7, distribution="uniform", dense_layers=(), block=(1, 4)
    )
    # 3 inputs are not divided by 4; 24 blocks lose 16, and 20 blocks lose 14
    assert counts == {"first": 432 - 302, "second": 4 * 8, "third": 4 * 6}


def test_blocks_of_one_weight_are_no_blocks() -> None:
    runs = []
    for block in (None, (1, 1)):
        model = convnet()
        optimizer = sgd(model)
        sparsifier = make("rigl", model, optimizer, block=block)
        list(train(model, optimizer, range(20)))
        runs.append([*sparsifier.masks.values(), *model.parameters()])
    assert all(map(torch.equal, *runs))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20), block=st.sampled_from(BLOCKS), share=st.integers(1, 7))
def test_rigl_ranks_blocks_by_the_sums_of_magnitudes(
    seed: int, block: tuple[int, int], share: int
) -> None:
    """Compare with RigL on a layer that has one weight per block: the sums."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 12, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rule = {"sparsity": 0.5, "delta_t": 1, "t_end": 9, "drop_fraction": share / 8, "seed": seed}
    sparsifier = sparse.rigl(model, optimizer, block=block, **rule)
    weight = model[0].weight.detach().clone()
    old = parts(sparsifier.masks["0.weight"], block) > 0
    model[0].weight.grad = gradient = torch.randn(12, 8)
    optimizer.step()  # the update takes its place
    found = parts(sparsifier.masks["0.weight"], block) > 0

    def sums(tensor: Tensor) -> Tensor:
        rows, columns = block
        split = tensor.abs().view(12 // rows, rows, 8 // columns, columns)
        return split.sum((1, 3), dtype=torch.float64)

    num_active = int(old.sum())
    dropped = num_active * share // 8
    scores = sums(weight).masked_fill(~old, torch.inf).flatten()
    kept = old.flatten().clone()
    kept[scores.argsort()[:dropped]] = False
    growth = sums(gradient).flatten().masked_fill(kept, -1.0)
    kept[growth.argsort(descending=True)[:dropped]] = True
    assert torch.equal(found.flatten(), kept)


def test_snip_adds_up_products() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = sparse.snip(model, optimizer, sparsity=0.5, block=(1, 2))
    with torch.no_grad():  # blocks: |w g| is 2, 6 / 9, 1; the sums of |w| and |g| say otherwise
        model[0].weight.copy_(torch.tensor([[9.0, 0.1, 2.0, 2.0], [3.0, 1.0, 0.5, 8.0]]))
    model[0].weight.grad = torch.tensor([[0.1, 11.0, 2.0, 1.0], [3.0, 0.0, 2.0, 0.0]])
    optimizer.step()
    assert sparsifier.masks["0.weight"].int().tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize(("method", "reason"), REFUSED.items())
def test_methods_without_counts_of_layers_refuse_blocks(method: str, reason: str) -> None:
    model = convnet()
    with pytest.raises(ValueError, match=reason):
        make(method, model, sgd(model), block=(1, 4))


@pytest.mark.parametrize("block", [(1,), (0, 4), (1, 4, 1), (1, 2.5), "14", 4])
def test_what_is_no_block_is_refused(block: Any) -> None:
    model = convnet()
    with pytest.raises(ValueError, match="block must be two numbers of at least 1"):
        make("rigl", model, sgd(model), block=block)


def test_masks_to_begin_with_must_have_whole_blocks() -> None:
    model = convnet()
    source = convnet()
    masks = make("rigl", source, sgd(source), block=(1, 2)).masks
    begun = sparse.rigl(model, sgd(model), masks=masks, block=(1, 2), delta_t=4, t_end=15)
    assert all(map(torch.equal, begun.masks.values(), masks.values()))
    other = convnet()
    with pytest.raises(ValueError, match=r"weight a mask that is no mask of blocks of 2 x 2"):
        sparse.rigl(other, sgd(other), masks=masks, block=(2, 2), delta_t=4, t_end=15)


def test_a_checkpoint_without_blocks_does_not_go_on_in_blocks() -> None:
    model = convnet()
    state = make("set", model, sgd(model)).state_dict()
    blocked = make("set", model, sgd(model), block=(1, 2))
    with pytest.raises(ValueError, match=r"the checkpoint gave .* no mask of blocks of 1 x 2"):
        blocked.load_state_dict(state)


def test_inactive_blocks_of_infinite_gradient_come_first() -> None:
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = sparse.rigl(model, optimizer, sparsity=0.5, block=(1, 4), delta_t=1, t_end=9)
    free = (~sparsifier.masks["0.weight"]).nonzero()[0]
    model[0].weight.grad = torch.zeros(4, 8)
    model[0].weight.grad[tuple(free)] = torch.inf
    optimizer.step()
    assert sparsifier.masks["0.weight"][tuple(free)]
    assert torch.isfinite(model[0].weight).all()


def _sharded(rank: int, world_size: int) -> dict[str, Tensor]:
    found = {}
    for method in ("rigl", "gmp", "set", "snip"):
        for block in ((1, 4), (2, 2)):
            model: Any = convnet()
            for child in model:
                fully_shard(child)
            fully_shard(model)
            optimizer = sgd(model)
            make(method, model, optimizer, block=block)
            list(train(model, optimizer, range(14)))
            for name, weight in sparse.prunable(model).items():
                found[f"{method} {block} {name}"] = weight.full_tensor().detach()
    return found


@pytest.mark.distributed
def test_sharded_weights_have_the_blocks_of_one_process(tmp_path: Path) -> None:
    for found in run(2, _sharded, tmp_path):
        for method in ("rigl", "gmp", "set", "snip"):
            for block in ((1, 4), (2, 2)):
                model = convnet()
                optimizer = sgd(model)
                make(method, model, optimizer, block=block)
                list(train(model, optimizer, range(14)))
                for name, weight in sparse.prunable(model).items():
                    other = found[f"{method} {block} {name}"]
                    assert torch.equal(weight != 0, other != 0), (method, block, name)
                    torch.testing.assert_close(other, weight.detach())


def _cut(rank: int, world_size: int) -> str:
    model: Any = nn.Sequential(nn.Linear(8, 10))
    fully_shard(model)
    try:
        make("rigl", model, sgd(model), block=(2, 2))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_blocks_that_processes_would_share_are_refused_by_all_of_them(tmp_path: Path) -> None:
    for found in run(2, _cut, tmp_path):
        assert "0.weight is sharded so that processes share blocks of 2 x 2" in found
