"""Factories: what they build, and one clear line for what cannot be."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import sparse
from tests.sparse.nets import ACDC, GAP, METHODS, convnet, make, sgd

REQUIRED: dict[str, dict[str, Any]] = {
    "static": {},
    "set": {"t_end": 100},
    "rigl": {"t_end": 100},
    "rigl_reset": {"t_end": 100},
    "snfs": {"t_end": 100},
    "magnitude": {},
    "snip": {},
    "gmp": {"prune_end": 100},
    "acdc": ACDC,
    "granet": {"t_end": 100, "prune_end": 30},
    "srigl": {"t_end": 100},
    "gap": GAP,
}


@pytest.mark.parametrize(
    "name", ["static", "magnitude", "set", "rigl", "rigl_reset", "snfs", "snfs_none"]
)
@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
def test_counts_are_those_of_the_allocation(name: str, distribution: str) -> None:
    model = convnet()
    sparsifier = make(name, model, sgd(model), distribution=distribution)
    shapes = {n: w.shape for n, w in sparse.prunable(model).items()}
    expected = sparse.allocate(shapes, sparsity=0.8, distribution=distribution)
    assert sparsifier.num_active == expected
    assert {n: int(mask.sum()) for n, mask in sparsifier.masks.items()} == expected


def test_layers_can_be_chosen() -> None:
    model = convnet()
    sparsifier = sparse.rigl(
        model,
        sgd(model),
        sparsity=0.8,
        t_end=10,
        distribution="uniform",
        dense_layers=["0", "9.weight"],
        sparsity_map={"7": 0.5},
    )
    density = {name: mask.float().mean().item() for name, mask in sparsifier.masks.items()}
    assert density["0.weight"] == density["9.weight"] == 1.0
    assert density["7.weight"] == 0.5
    assert density["3.weight"] == pytest.approx(0.2, abs=0.002)


@pytest.mark.parametrize("name", ["set", "rigl", "snfs", "snfs_none", "rigl_reset"])
def test_layers_dense_by_choice_stay_so(name: str) -> None:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make(name, model, optimizer, dense_layers=["0", "9"], drop_anneal="constant")
    for step in range(5):
        torch.manual_seed(step)
        model(torch.randn(4, 2, 6, 6)).square().sum().backward()
        optimizer.step()
    assert sparsifier.masks["0.weight"].all()
    assert sparsifier.masks["9.weight"].all()


def test_a_sparsity_of_zero_is_dense_training() -> None:
    models = convnet(), convnet()
    optimizers = [sgd(model) for model in models]
    sparsifier = sparse.rigl(models[0], optimizers[0], sparsity=0.0, t_end=10)
    for model, optimizer in zip(models, optimizers, strict=True):
        torch.manual_seed(0)
        model(torch.randn(4, 2, 6, 6)).square().sum().backward()
        optimizer.step()
    assert (sparsifier.step, sparsifier.num_updates) == (1, 0)
    assert sparsifier.metrics()["sparsity"] == 0.0
    assert torch.equal(models[0][3].weight, models[1][3].weight)


def test_every_argument_of_a_factory_is_for_its_method() -> None:
    for name in REQUIRED:
        arguments = inspect.signature(getattr(sparse, name)).parameters
        assert ("drop_fraction" in arguments) == (
            name in ("set", "rigl", "rigl_reset", "snfs", "granet", "srigl")
        )
        assert ("seed" in arguments) == (name not in ("snip", "gmp", "acdc", "magnitude"))
        assert ("grow_init" in arguments) == (name in ("set", "rigl", "snfs"))


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be in"),
        ({"distribution": "even"}, "distribution must be"),
        ({"dense_layers": ["fc"]}, "dense_layers: 'fc' matches no prunable layer"),
        ({"sparsity_map": {"fc*": 0.3}}, r"sparsity_map: 'fc\*' matches no prunable layer"),
    ],
)
def test_every_factory_checks_its_layers(name: str, arguments: Any, message: str) -> None:
    if not arguments.keys() <= inspect.signature(getattr(sparse, name)).parameters.keys():
        message, arguments = "sparsity must be in", {"sparsity": -0.1}  # it has no such argument
    model = convnet()
    options = {"sparsity": 0.8} | REQUIRED[name] | arguments
    with pytest.raises(ValueError, match=message):
        getattr(sparse, name)(model, sgd(model), **options)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("rigl", {"t_end": 0}, "t_end must be larger than t_start 0, got 0"),
        ("set", {"delta_t": 0}, "delta_t must be at least 1"),
        ("rigl", {"drop_fraction": 2.0}, "drop_fraction must be in"),
        ("snfs", {"drop_fraction_min": 0.9}, "minimum drop fraction"),
        ("snfs", {"redistribution": "all"}, "redistribution must be one of"),
        ("snfs", {"growth": "fast"}, "growth must be"),
        ("snfs", {"redistribution": "none", "growth": "random"}, "use set"),
        ("snip", {"scope": "model"}, "scope must be layer or global"),
        ("snip", {"scope": "global", "distribution": "erk"}, "no effect with the global scope"),
        ("gmp", {"scope": "global", "sparsity_map": {"0": 0.1}}, "no effect with the global scope"),
        ("gmp", {"prune_start": 200}, "prune_start 200, prune_end 100 .* must satisfy"),
    ],
)
def test_what_cannot_be_is_refused(name: str, arguments: Any, message: str) -> None:
    model = convnet()
    options = {"sparsity": 0.8} | REQUIRED[name] | arguments
    with pytest.raises(ValueError, match=message):
        getattr(sparse, name)(model, sgd(model), **options)


def test_given_masks_must_fit() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    counts = {"0.weight": 4, "1.weight": 16}
    eye = torch.eye(4, dtype=torch.bool)

    def attach(masks: dict[str, torch.Tensor]) -> sparse.Sparsifier:
        method = sparse.methods.Static(sparsity=0.0)
        return sparse.Sparsifier(model, sgd(model), method, num_active=counts, masks=masks)

    assert torch.equal(attach({"0.weight": eye}).masks["0.weight"], eye)
    with pytest.raises(ValueError, match=r"gave no bool mask of \(4, 4\) for 0.weight, but none"):
        attach({})
    with pytest.raises(ValueError, match=r"torch.float32 of \(4, 4\)"):
        attach({"0.weight": eye.float()})
    with pytest.raises(ValueError, match="has 12 active weights, this run 4"):
        attach({"0.weight": ~eye})


def test_methods_cover_every_factory() -> None:
    assert {factory.__name__.strip("_") for factory, _ in METHODS.values()} == set(REQUIRED)
