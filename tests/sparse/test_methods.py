"""The methods as pure functions: exact counts, hand-computed masks, scopes, redistribution."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sparse
from sparse.methods import Gmp, Rigl, Set, Snip
from sparse.methods.allocation import Allocation
from sparse.methods.snfs import Snfs, layer_shares, num_regrown, num_removed
from sparse.topology.schedules import num_dropped
from tests.sparse.nets import make, mlp, rows, sgd, train


def network(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Make masks, weights and gradients of three layers of unlike size, density and scale."""
    generator = torch.Generator().manual_seed(seed)
    masks, weights, grads = {}, {}, {}
    for index, (shape, density) in enumerate(
        [((20, 30), 0.1), ((40, 8, 3, 3), 0.3), ((9, 7), 1.0)]
    ):
        name = f"{index}.weight"
        masks[name] = torch.rand(shape, generator=generator) < density
        weights[name] = torch.randn(shape, generator=generator) * masks[name] * 2.0**index
        grads[name] = torch.randn(shape, generator=generator) * 3.0**index
    return masks, weights, grads


def counts(masks: dict[str, Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


def settings(masks: dict[str, Tensor], **others: Any) -> dict[str, Any]:
    """Give the settings of a method that replaces half of the connections at every step."""
    common = {"sparsity": 0.5, "delta_t": 1, "t_end": 100}
    drop = {"drop_fraction": 0.5, "drop_anneal": "constant"}
    return common | drop | {"allocation": Allocation(num_active=counts(masks))} | others


@given(st.integers(0, 100), st.integers(0, 50))
def test_rigl_and_set_keep_every_count(step: int, seed: int) -> None:
    masks, weights, grads = network(seed)
    for method in (
        Rigl(**settings(masks, seed=seed)),
        Rigl(**settings(masks, drop_noise=1e-5, seed=seed)),
        Set(**settings(masks, seed=seed)),
    ):
        new = method.update(masks, weights, grads, step, {})
        again = method.update(masks, weights, grads, step, {})
        assert counts(dict(new)) == counts(masks)
        for name, mask in masks.items():
            assert torch.equal(new[name], again[name])
            gone = int((mask & ~new[name]).sum())
            assert gone <= num_dropped(int(mask.sum()), 0.5)


def test_set_draws_anew_at_every_step_and_in_every_layer() -> None:
    masks = {f"{i}.weight": torch.arange(400).view(20, 20) % 4 == 0 for i in range(2)}
    weights = {name: mask.float() for name, mask in masks.items()}
    method = Set(**settings(masks))
    first, second = (method.update(masks, weights, {}, step, {}) for step in (0, 1))
    assert not torch.equal(first["0.weight"], first["1.weight"])
    assert not torch.equal(first["0.weight"], second["0.weight"])


def test_set_grows_uniformly_over_all_free_places() -> None:
    mask = torch.zeros(30, 30, dtype=torch.bool)
    mask[:10] = True
    weights = {"0.weight": mask * 1.0}
    weights["0.weight"][0] = 2.0  # the survivors: with half of 300 dropped, the first rows stay
    draws = 300
    method = Set(**settings({"0.weight": mask}, t_end=draws))
    total = torch.zeros(30, 30)
    for step in range(draws):
        total += method.update({"0.weight": mask}, weights, {}, step, {})["0.weight"]
    kept = total == draws
    assert int(kept.sum()) == 150
    share = 150 / 750
    expected, deviation = draws * share, (draws * share * (1 - share)) ** 0.5
    assert ((total[~kept] - expected).abs() < 5 * deviation).all()


def test_drop_noise_only_breaks_ties() -> None:
    masks, weights, grads = network()
    exact, noisy = (
        Rigl(**settings(masks, drop_noise=noise)).update(masks, weights, grads, 3, {})
        for noise in (0.0, 1e-9)
    )
    assert all(torch.equal(exact[name], noisy[name]) for name in masks)
    flat = {name: mask * 1.0 for name, mask in masks.items()}
    tied, noisy = (
        Rigl(**settings(masks, drop_noise=noise)).update(masks, flat, grads, 3, {})
        for noise in (0.0, 1e-5)
    )
    assert any(not torch.equal(tied[name], noisy[name]) for name in masks)


def test_magnitude_pruning_meets_its_counts_at_every_step() -> None:
    model = mlp()
    optimizer = sgd(model)
    sparsifier = make("gmp", model, optimizer, sparsity=0.9, prune_start=3, prune_end=12)
    finals = {
        name: 1 - value
        for name, value in sparse.layer_sparsities(
            {n: w.shape for n, w in sparse.prunable(model).items()}, sparsity=0.9
        ).items()
    }
    before = sparsifier.masks
    for step in train(model, optimizer, range(15), rows):
        last = max((t for t in (3, 7, 11, 12) if t <= step), default=None)
        for name, weight in sparse.prunable(model).items():
            ramp = 0.0 if last is None else sparse.cubic_sparsity(last, 3, 12, 1 - finals[name])
            assert sparsifier.num_active[name] == round(weight.numel() * (1 - ramp))
            assert not (sparsifier.masks[name] & ~before[name]).any()
        before = sparsifier.masks


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_scopes_of_pruning(scope: str) -> None:
    masks, weights, grads = network()
    masks = {name: torch.ones_like(mask) for name, mask in masks.items()}
    weights = {name: torch.randn_like(weight) for name, weight in weights.items()}
    allocation = Allocation(sparsities=dict.fromkeys(masks, 0.75))
    pruning = {"sparsity": 0.75, "scope": scope, "allocation": allocation}
    scores = {name: (weights[name] * grads[name]).abs() for name in masks}
    total = sum(mask.numel() for mask in masks.values())
    snip = Snip(**pruning).update(masks, weights, grads, 0, {})
    gmp = Gmp(**pruning, prune_every=1, prune_end=10).update(masks, weights, {}, 10, {})
    for new, by in ((snip, scores), (gmp, {n: w.abs() for n, w in weights.items()})):
        if scope == "layer":
            for name, mask in new.items():
                assert abs(int(mask.sum()) - mask.numel() / 4) < 1
                assert by[name][mask].min() > by[name][~mask].max()
        else:
            assert sum(counts(dict(new)).values()) == total - math.floor(0.75 * total)
            weakest = min(by[name][mask].min() for name, mask in new.items() if mask.any())
            assert all((by[name][~mask] < weakest).all() for name, mask in new.items())


def test_snip_prunes_before_training_and_moves_nothing() -> None:
    model = mlp()
    optimizer = sgd(model)
    sparsifier = make("snip", model, optimizer)
    before = {name: weight.detach().clone() for name, weight in sparse.prunable(model).items()}
    biases = [layer.bias.detach().clone() for layer in model if hasattr(layer, "bias")]
    list(train(model, optimizer, range(1), rows))
    assert (sparsifier.step, sparsifier.num_updates) == (0, 1)
    for name, weight in sparse.prunable(model).items():
        assert torch.equal(weight, before[name] * sparsifier.masks[name])
    layers = [layer for layer in model if hasattr(layer, "bias")]
    assert all(torch.equal(layer.bias, bias) for layer, bias in zip(layers, biases, strict=True))
    masks = sparsifier.masks
    list(train(model, optimizer, range(1, 5), rows))
    assert sparsifier.step == 4
    assert all(torch.equal(mask, masks[name]) for name, mask in sparsifier.masks.items())


def test_snip_needs_every_gradient() -> None:
    model = mlp()
    optimizer = sgd(model)
    model[2].weight.requires_grad_(False)
    make("snip", model, optimizer)
    with pytest.raises(RuntimeError, match=r"SNIP needs the gradient of 2\.weight"):
        list(train(model, optimizer, range(1), rows))


def test_shares_by_hand() -> None:
    masks = {"a": torch.tensor([True, True, False]), "b": torch.tensor([True, False, False, False])}
    weights = {"a": torch.tensor([1.0, -3.0, 0.0]), "b": torch.tensor([6.0, 0.0, 0.0, 0.0])}
    momenta = {"a": torch.tensor([1.0, 1.0, 9.0]), "b": torch.tensor([-3.0, 5.0, 5.0, 5.0])}
    active = torch.tensor([2, 1])
    shares = {
        kind: layer_shares(masks, active, weights, momenta, kind).tolist()
        for kind in ("momentum", "magnitude", "nonzero", "numel")
    }
    assert shares["momentum"] == pytest.approx([1 / 4, 3 / 4])
    assert shares["magnitude"] == pytest.approx([2 / 8, 6 / 8])
    assert shares["nonzero"] == pytest.approx([2 / 3, 1 / 3])
    assert shares["numel"] == pytest.approx([3 / 7, 4 / 7])
    assert layer_shares(masks, active, weights, {}, "momentum").tolist() == [0.5, 0.5]


def test_regrowth_by_hand() -> None:
    # Layer a: 100 weights, 90 active, growing (share 0.9 > 1/2, 10% zeros): rate 0.1 instead of 0.5
    active, shares = torch.tensor([90, 40]), torch.tensor([0.9, 0.1], dtype=torch.float64)
    removed = num_removed(active, [100, 200], shares, 0.5)
    assert removed.tolist() == [9, 20]
    # 29 to regrow: 27 and 3. a has room for 0.99 * 19 = 18.81; of the excess 8.19 half goes to b
    # each time until nothing is left: b gets 3 + 8.19 = 11.19.
    regrown = num_regrown(active, [100, 200], shares, removed, torch.tensor(0.0).double())
    assert regrown.tolist() == [18, 11]


def test_snfs_holds_its_number_of_weights_on_average() -> None:
    masks, _, _ = network()
    baseline = sum(counts(masks).values())
    method = Snfs(**settings(masks, drop_fraction=0.3, drop_anneal="cosine"))
    state: dict[str, Tensor] = {}
    totals, layers = [], []
    for step in range(60):
        _, weights, grads = network(step)
        weights = {name: torch.randn(mask.shape) * mask for name, mask in masks.items()}
        masks = dict(method.update(masks, weights, grads, step, state))
        totals.append(sum(counts(masks).values()))
        layers.append(counts(masks)["0.weight"])
    assert sum(totals) / len(totals) == pytest.approx(baseline, rel=0.02)
    assert max(layers) - min(layers) > 10  # weights do move between layers


def test_random_growth_of_snfs_meets_its_count_in_expectation() -> None:
    masks, weights, grads = network()
    baseline = sum(counts(masks).values())
    totals = []
    for seed in range(40):
        method = Snfs(**settings(masks, growth="random", seed=seed))
        totals.append(sum(counts(dict(method.update(masks, weights, grads, 0, {}))).values()))
    assert len(set(totals)) > 1
    assert sum(totals) / len(totals) == pytest.approx(baseline, rel=0.02)


def test_average_of_gradients_decides_where_momentum_grows() -> None:
    model = mlp()
    optimizer = sgd(model, lr=0.0, momentum=0.0)
    sparsifier = make("snfs_none", model, optimizer, t_start=3)
    average = {name: torch.zeros_like(w) for name, w in sparse.prunable(model).items()}
    old = sparsifier.masks
    weights = {name: w.detach().clone() for name, w in sparse.prunable(model).items()}
    for step in range(4):
        optimizer.zero_grad()
        inputs, labels = rows(step)
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        for name, weight in sparse.prunable(model).items():
            average[name] = 0.9 * average[name] + 0.1 * weight.grad
        optimizer.step()
    for name, mask in sparsifier.masks.items():
        count = num_dropped(int(old[name].sum()), sparsifier.method.fraction_at(3))
        expected = sparse.drop_and_grow(old[name], weights[name], average[name], count)
        assert torch.equal(mask, expected)


def test_magnitude_keeps_the_largest_weights_by_hand() -> None:
    first = [[0.1, -0.9, 0.3, 0.5], [-0.2, 0.5, 0.0, 0.7]]
    second = [[-0.8, 0.6, 0.05, 0.5]]
    expected = {
        # 8 - floor(0.6 * 8) = 4 and 4 - floor(0.6 * 4) = 2 weights; of equals, the first one
        "layer": ([[0, 1, 0, 1], [0, 1, 0, 1]], [[1, 1, 0, 0]]),
        # 12 - floor(0.6 * 12) = 5 weights of all
        "global": ([[0, 1, 0, 1], [0, 0, 0, 1]], [[1, 1, 0, 0]]),
    }
    for scope, masks in expected.items():
        model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Linear(4, 1))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor(first))
            model[1].weight.copy_(torch.tensor(second))
        uniform = {"distribution": "uniform", "dense_layers": []} if scope == "layer" else {}
        sparsifier = sparse.magnitude(model, sgd(model), sparsity=0.6, scope=scope, **uniform)
        for name, mask in zip(("0.weight", "1.weight"), masks, strict=True):
            assert sparsifier.masks[name].int().tolist() == mask
        assert model[0].weight.tolist() == pytest.approx(
            (torch.tensor(first) * torch.tensor(masks[0])).numpy()
        )


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_magnitude_trains_with_the_masks_of_the_trained_network(scope: str) -> None:
    model = mlp()
    optimizer = sgd(model)
    list(train(model, optimizer, range(5), rows))
    dense = {name: weight.detach().clone() for name, weight in sparse.prunable(model).items()}
    sparsifier = make("magnitude", model, optimizer, scope=scope)
    masks = sparsifier.masks
    for name, mask in masks.items():
        assert dense[name][mask].abs().min() >= dense[name][~mask].abs().max()
    for _ in train(model, optimizer, range(5, 10), rows):
        assert all(torch.equal(mask, masks[name]) for name, mask in sparsifier.masks.items())
    assert (sparsifier.step, sparsifier.num_updates) == (5, 0)  # no step was spent on pruning


def test_plans_of_pruning_have_exact_counts() -> None:
    for name in ("magnitude", "snip", "gmp", "acdc"):
        model = mlp()
        optimizer = sgd(model)
        for scope in ("layer", "global"):
            model = mlp()
            optimizer = sgd(model)
            sparsifier = make(name, model, optimizer, scope=scope, sparsity=0.83)
            plan = sparsifier.method.fitted_to(model)
            list(train(model, optimizer, range(18), rows))
            found = sparsifier.num_active
            assert sum(found.values()) == plan.final_total, (name, scope)
            assert plan.final_counts == (found if scope == "layer" else None)
