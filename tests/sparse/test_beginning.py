"""Runs that begin with masks: what fixes them, moves them, and prunes on from them."""

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse
from tests.sparse.nets import METHODS, assert_inactive_zero, convnet, sgd, train
from tests.sparse.test_batched import together

FROM_COUNTS = ("static", "set", "rigl", "rigl_reset", "snfs", "snfs_none")
PRUNING = ("gmp", "gmp_global", "snip", "snip_global")


def trained(sparsity: float = 0.7, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a network that was trained sparse, and its masks."""
    model = convnet()
    optimizer = sgd(model)
    sparsifier = sparse.rigl(model, optimizer, sparsity=sparsity, delta_t=2, t_end=9, **options)
    list(train(model, optimizer, range(10)))
    return model, sparsifier.masks


def begin(name: str, model: nn.Module, masks: Any, **options: Any) -> Any:
    factory, defaults = METHODS[name]
    optimizer = sgd(model)
    options = {"sparsity": 0.9, **options} if name in PRUNING else options
    return optimizer, factory(model, optimizer, masks=masks, **defaults, **options)


def counts(masks: dict[str, Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


@pytest.mark.parametrize("device_path", [False, True])
@pytest.mark.parametrize("name", FROM_COUNTS + PRUNING)
def test_a_run_begins_with_the_masks_that_it_is_given(name: str, device_path: bool) -> None:
    source, masks = trained()
    model = copy.deepcopy(source)
    with together() if device_path else torch.enable_grad():
        optimizer, sparsifier = begin(name, model, masks)
        assert all(torch.equal(mask, masks[n]) for n, mask in sparsifier.masks.items())
        for key, value in source.state_dict().items():
            assert torch.equal(value, model.state_dict()[key])
        for _ in train(model, optimizer, range(18)):
            assert_inactive_zero(sparsifier, model, optimizer)
            now = sparsifier.masks
            if name in PRUNING:
                assert not any((now[n] & ~masks[n]).any() for n in masks)  # nothing revived
            elif name != "snfs":
                assert sparsifier.num_active == counts(masks)
    moved = any(not torch.equal(now[n], masks[n]) for n in masks)
    assert moved == (name not in ("static", "rigl_reset"))
    if name in PRUNING:
        assert sparsifier.metrics()["sparsity"] == pytest.approx(0.9, abs=0.01)
        total = sparsifier.method.fitted_to(model).final_total
        assert sum(sparsifier.num_active.values()) == pytest.approx(total, abs=4)


@pytest.mark.parametrize("name", FROM_COUNTS + PRUNING)
@pytest.mark.parametrize("stop", [0, 6])
def test_it_is_resumed_to_the_bit(name: str, stop: int) -> None:
    source, masks = trained()
    ends = []
    for interrupted in (False, True):
        model = copy.deepcopy(source)
        optimizer, sparsifier = begin(name, model, masks)
        list(train(model, optimizer, range(stop)))
        if interrupted:
            states = copy.deepcopy([x.state_dict() for x in (model, optimizer, sparsifier)])
            model = convnet(seed=5)
            optimizer, sparsifier = begin(name, model, masks)
            for part, state in zip((model, optimizer, sparsifier), states, strict=True):
                part.load_state_dict(state)
        list(train(model, optimizer, range(stop, 18)))
        ends.append((model.state_dict(), sparsifier.masks))
    torch.testing.assert_close(ends[0], ends[1], rtol=0.0, atol=0.0)


def test_layers_without_a_mask_are_dense() -> None:
    model, masks = trained()
    del masks["9.weight"]
    optimizer, sparsifier = begin("set", model, masks)
    list(train(model, optimizer, range(6)))
    assert sparsifier.masks["9.weight"].all()
    assert "9.weight" not in sparsifier.maskable
    found = sparsifier.method.fitted_to(model)
    assert found.sparsity == pytest.approx(sparsifier.metrics()["sparsity"])


def test_a_sparsity_that_masks_do_not_have_is_refused() -> None:
    model, masks = trained()
    begin("rigl", copy.deepcopy(model), masks, sparsity=0.7)  # which is theirs
    with pytest.raises(ValueError, match=r"mask of 0\.weight has \d+ active weights, a spars"):
        begin("rigl", copy.deepcopy(model), masks, sparsity=0.8)
    with pytest.raises(ValueError, match="dense_layers has no effect without sparsity"):
        begin("rigl", copy.deepcopy(model), masks, dense_layers=["9"])
    with pytest.raises(ValueError, match=r"0\.weight has \d+ weights left, this run would keep"):
        begin("gmp", copy.deepcopy(model), masks, sparsity=0.5)
    with pytest.raises(ValueError, match=r"the network has .* left, this run would keep"):
        begin("gmp_global", copy.deepcopy(model), masks, sparsity=0.5)
    with pytest.raises(ValueError, match=r"7\.weight has a mask, but is to be dense"):
        begin("gmp", copy.deepcopy(model), masks, dense_layers=["7"])
    for name in ("rigl", "gmp"):
        with pytest.raises(ValueError, match=r"there is a mask for other\.weight"):
            begin(name, copy.deepcopy(model), {**masks, "other.weight": masks["9.weight"].T})
    with pytest.raises(ValueError, match=r"no bool mask of \(20, 32\) for 7\.weight"):
        begin("rigl", copy.deepcopy(model), {**masks, "7.weight": masks["7.weight"].T})
    with pytest.raises(TypeError, match="sparsity"):
        sparse.rigl(convnet(), sgd(convnet()), t_end=10)
    with pytest.raises(TypeError, match="sparsity"):
        sparse.gmp(model, sgd(model), masks=masks, prune_end=10)


def test_methods_that_choose_their_masks_take_none() -> None:
    offered = {
        n for n in sparse.METHODS if "masks" in inspect.signature(getattr(sparse, n)).parameters
    }
    assert offered == {"static", "set", "rigl", "rigl_reset", "snfs", "gmp", "snip"}
