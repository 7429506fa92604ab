"""Per-layer allocation against the original's numbers, hand-solved cases and properties."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

import sparse

ORACLE = json.loads((Path(__file__).parents[1] / "data" / "oracle.json").read_text())["models"]
SHAPES = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.tuples(st.integers(1, 64), st.integers(1, 64), st.integers(1, 5)),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("network", ["resnet50", "mobilenet_v1", "mobilenet_v1_conv_fc"])
def test_every_count_of_the_original(network: str) -> None:
    shapes = {layer["name"]: layer["shape"] for layer in ORACLE[network]["layers"]}
    names = list(shapes)
    for case, expected in ORACLE[network]["configs"].items():
        distribution, sparsity, which = case.split("/")
        dense = names[:1] if "first" in which else []
        dense += names[-1:] if "last" in which else []
        dense += ["*.dw"] if "dw" in which else []
        arguments = {
            "sparsity": float(sparsity),
            "distribution": distribution,
            "dense_layers": dense,
        }
        densities = [1.0 - s for s in sparse.layer_sparsities(shapes, **arguments).values()]
        assert densities == expected["density"], case
        counts = sparse.allocate(shapes, **arguments)
        assert list(counts.values()) == expected["num_active"], case


def test_resnet50_of_torchvision_has_the_names_and_counts_of_the_table() -> None:
    with torch.device("meta"):
        weights = sparse.prunable(torchvision.models.resnet50())
    counts = sparse.allocate({n: w.shape for n, w in weights.items()}, sparsity=0.9)
    names = [layer["name"] for layer in ORACLE["resnet50"]["layers"]]
    expected = ORACLE["resnet50"]["configs"]["erk/0.9/all_sparse"]["num_active"]
    assert counts == dict(zip(names, expected, strict=True))


def test_ceil_is_the_rounding_of_the_published_tables() -> None:
    # ERK 0.8 takes 23.683636 MB with floor and 23.683424 MB with ceil, 4 bytes a weight.
    sizes = {layer["name"]: math.prod(layer["shape"]) for layer in ORACLE["resnet50"]["layers"]}
    shapes = {layer["name"]: layer["shape"] for layer in ORACLE["resnet50"]["layers"]}
    floor, ceil = (
        sum(
            sizes[name] * (1.0 - value)
            for name, value in sparse.layer_sparsities(
                shapes, sparsity=0.8, rounding=rounding
            ).items()
        )
        for rounding in ("floor", "ceil")
    )
    assert 4 * (floor - ceil) == pytest.approx(212, abs=0.01)


def test_erk_solved_by_hand() -> None:
    # Ratios 20/100 and 200/10000; at 0.5 the budget is 5050 = eps * (0.2 * 100 + 0.02 * 10000),
    # eps = 22.95, the first layer would have density 4.6: it is full, the second keeps the rest,
    # 5000 - 50 = 4950.
    shapes = {"a": (10, 10), "b": (100, 100)}
    assert sparse.allocate(shapes, sparsity=0.5) == {"a": 100, "b": 4950}


def test_er_ignores_the_kernel_and_erk_does_not() -> None:
    shapes = {"a": (16, 16, 3, 3), "b": (64, 64, 1, 1)}
    er = sparse.layer_sparsities(shapes, sparsity=0.8, distribution="er")
    ratios = {"a": 32 / 256, "b": 128 / 4096}
    densities = {name: 1 - value for name, value in er.items()}
    assert densities["a"] / densities["b"] == pytest.approx(ratios["a"] / ratios["b"])
    erk = sparse.layer_sparsities(shapes, sparsity=0.8)
    assert 1 - erk["a"] != pytest.approx(densities["a"])


@given(SHAPES, st.floats(0, 0.999), st.sampled_from(["uniform", "er", "erk"]))
def test_the_budget_is_met(shapes: dict[str, Any], sparsity: float, distribution: str) -> None:
    counts = sparse.allocate(shapes, sparsity=sparsity, distribution=distribution, dense_layers=())
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assert list(counts) == list(shapes)
    assert all(1 <= counts[name] <= sizes[name] for name in shapes)
    wanted = sum(size - math.floor(sparsity * size) for size in sizes.values())
    assert wanted <= sum(counts.values()) + 1e-6
    assert sum(counts.values()) <= wanted + len(shapes)


def test_uniform_keeps_its_first_layer_dense_unless_told_otherwise() -> None:
    shapes = {"a.weight": (10, 10), "b.weight": (10, 10), "c.weight": (10, 10)}
    arguments: dict[str, Any] = {"sparsity": 0.5, "distribution": "uniform"}
    counts = [
        list(sparse.allocate(shapes, **arguments, **extra).values())
        for extra in (
            {},
            {"dense_layers": ()},
            {"dense_layers": ["c", "b.wei*"]},
            {"sparsity_map": {"a": 0.8}},
            {"sparsity_map": {"*": 0.2, "c": 0.9}},
        )
    ]
    assert counts == [[100, 50, 50], [50, 50, 50], [50, 100, 100], [20, 50, 50], [80, 80, 10]]


def test_layers_of_the_map_take_no_part_in_the_budget() -> None:
    shapes = {"a": (40, 40), "b": (40, 40), "c": (40, 40)}
    counts = sparse.allocate(shapes, sparsity=0.9, sparsity_map={"a": 0.25})
    assert counts == {"a": 1200, "b": 160, "c": 160}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, "got -0.1"),
        ({"sparsity": 0.5, "distribution": "normal"}, "uniform, er or erk, got 'normal'"),
        ({"sparsity": 0.5, "distribution": "er", "power_scale": 2.0}, "no effect"),
        ({"sparsity": 0.5, "dense_layers": ["x*"]}, "dense_layers: 'x\\*' matches no"),
        ({"sparsity": 0.5, "dense_layers": "a"}, "sequence of globs"),
        ({"sparsity": 0.5, "sparsity_map": {"zz": 0.1}}, "sparsity_map: 'zz' matches no"),
        ({"sparsity": 0.5, "sparsity_map": {"a": 1.5}}, "'a' must be in"),
        ({"sparsity": 0.5, "sparsity_map": {"a": 0.1}, "dense_layers": ["a"]}, "keep one"),
        ({"sparsity": 0.5, "rounding": "round"}, "floor or ceil"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse.allocate({"a": (4, 4), "b": (4, 4)}, **arguments)
