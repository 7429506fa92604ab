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
OTHERS = ("granet", "gap", "srigl", "srigl_whole")


def trained(sparsity: float = 0.7, method: str = "rigl") -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a network that was trained sparse, and its masks."""
    model = convnet()
    optimizer = sgd(model)
    make: Any = getattr(sparse, method)
    sparsifier = make(model, optimizer, sparsity=sparsity, delta_t=2, t_end=9)
    list(train(model, optimizer, range(10)))
    return model, sparsifier.masks


def source_of(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a network with masks that a method can begin with."""
    if name == "srigl_whole":  # masks without ablated rows
        model = convnet()
        return model, sparse.srigl(model, sgd(model), sparsity=0.7, t_end=9).masks
    return trained(method="srigl" if name == "srigl" else "rigl")


def begin(name: str, model: nn.Module, masks: Any, **options: Any) -> Any:
    factory, defaults = METHODS[name]
    optimizer = sgd(model)
    options = {"sparsity": 0.9, **options} if name in (*PRUNING, "granet") else options
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


@pytest.mark.parametrize("name", FROM_COUNTS + PRUNING + OTHERS)
@pytest.mark.parametrize("stop", [0, 6])
def test_it_is_resumed_to_the_bit(name: str, stop: int) -> None:
    source, masks = source_of(name)
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


def test_granet_goes_on_from_the_number_of_weights_in_the_masks() -> None:
    model, masks = trained()
    optimizer, sparsifier = begin("granet", model, masks)
    assert all(torch.equal(mask, masks[n]) for n, mask in sparsifier.masks.items())
    assert sparsifier.method.initial_sparsity == pytest.approx(0.7, abs=0.01)
    totals, grown = [sum(counts(masks).values())], False
    for _ in train(model, optimizer, range(20)):
        assert_inactive_zero(sparsifier, model, optimizer)
        totals.append(sum(sparsifier.num_active.values()))
        grown |= any((mask & ~masks[n]).any() for n, mask in sparsifier.masks.items())
    assert grown
    assert totals == sorted(totals, reverse=True)
    # The ramp is between 70% and 90%: after the first of three updates at 1 - (2 / 3)^3 of it.
    numel = sum(mask.numel() for mask in masks.values())
    share = (totals[0] / numel - totals[4] / numel) / (totals[0] / numel - 0.1)
    assert share == pytest.approx(1 - (2 / 3) ** 3, abs=0.01)
    assert totals[-1] == sparsifier.method.final_total


def test_gap_grows_its_partitions_from_the_masks_and_prunes_back_to_their_counts() -> None:
    model, masks = trained()
    optimizer, sparsifier = begin("gap", model, masks)
    first = ["0.weight"]  # [0-2].*
    for step, _ in enumerate(train(model, optimizer, range(18))):
        assert_inactive_zero(sparsifier, model, optimizer)
        now = sparsifier.masks
        if step < 3:
            assert all(now[n].all() if n in first else torch.equal(now[n], masks[n]) for n in now)
        elif step < 7:
            assert not any(now[n].all() == (n in first) for n in now)
            assert int(now["0.weight"].sum()) == int(masks["0.weight"].sum())
    assert sparsifier.num_active == counts(masks)
    assert sparsifier.method.final_counts == counts(masks)


def test_srigl_goes_on_with_masks_of_a_constant_fan_in() -> None:
    model, masks = trained(method="srigl")
    optimizer, sparsifier = begin("srigl", model, masks)
    assert all(torch.equal(mask, masks[n]) for n, mask in sparsifier.masks.items())
    for _ in train(model, optimizer, range(18)):
        assert_inactive_zero(sparsifier, model, optimizer)
        for name, mask in sparsifier.masks.items():
            fan_ins = set(mask.flatten(1).sum(1).tolist()) - {0}
            assert len(fan_ins) == 1
            assert int(mask.sum()) <= int(masks[name].sum())
    assert any(not torch.equal(sparsifier.masks[n], masks[n]) for n in masks)
    model, masks = trained()
    with pytest.raises(ValueError, match=r"rows of 0\.weight have \d to \d+: begin with masks of"):
        begin("srigl", model, masks)
    model = convnet()
    masks = sparse.srigl(model, sgd(model), sparsity=0.7, t_end=9).masks
    masks["7.weight"] = masks["7.weight"].clone()
    masks["7.weight"][:3] = False
    with pytest.raises(ValueError, match=r"srigl ablates no rows of 7\.weight, but its mask has"):
        begin("srigl_whole", model, masks)
    begin("srigl", model, masks)
    masks["7.weight"][1:] = False
    with pytest.raises(ValueError, match=r"weights for 20 outputs.*: leave its mask out"):
        begin("srigl", convnet(), masks)


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
    with pytest.raises(ValueError, match=r"the network has .* left, this run would keep"):
        begin("granet", copy.deepcopy(model), masks, sparsity=0.5)
    for name, options in (
        ("granet", {"initial_sparsity": 0.6}),
        ("granet", {"distribution": "uniform"}),
        ("gap", {"mask_init": "magnitude"}),
    ):
        with pytest.raises(
            ValueError, match=f"{next(iter(options))} has no effect in a run that b"
        ):
            begin(name, copy.deepcopy(model), masks, **options)
    with pytest.raises(ValueError, match=r"mask of 0\.weight has \d+ active weights, a spars"):
        begin("gap", copy.deepcopy(model), masks, sparsity=0.8)
    with pytest.raises(TypeError, match="sparsity"):
        sparse.rigl(convnet(), sgd(convnet()), t_end=10)
    with pytest.raises(TypeError, match="sparsity"):
        sparse.gmp(model, sgd(model), masks=masks, prune_end=10)


def test_methods_that_choose_their_masks_take_none() -> None:
    offered = {
        n for n in sparse.METHODS if "masks" in inspect.signature(getattr(sparse, n)).parameters
    }
    assert offered == set(sparse.METHODS) - {"magnitude", "acdc"}
