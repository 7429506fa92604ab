"""A setting that cannot be is refused in one line, whatever the method."""

import inspect
import math
from typing import Any

import pytest

import sparse
from sparse.errors import check_integer, check_number
from sparse.topology.schedules import num_dropped
from tests.sparse.nets import ACDC, METHODS, convnet, make, sgd

NOT_WHOLE: list[Any] = [2.5, 3.0, math.nan, math.inf, True, "3", None]
NO_NUMBER: list[Any] = [math.nan, math.inf, -math.inf, True, "0.5"]
BAD: dict[str, list[Any]] = {
    **{name: [*NOT_WHOLE, -1] for name in ("delta_t", "t_start", "t_end")},
    **{name: [*NOT_WHOLE, -1] for name in ("prune_start", "prune_end", "prune_every")},
    **{name: [*NOT_WHOLE, -1, 0] for name in ACDC},
    "initial_sparsity": [*NO_NUMBER, 0.9, -0.1, None],
    "min_salient": [*NO_NUMBER, -0.1, None],
    "gradient_steps": [*NOT_WHOLE, 0, 5],
    "min_salient_of": ["all", None],
    "never_ablated": [["fc"]],
    "phase": [*NOT_WHOLE, 0],
    "num_phases": [*NOT_WHOLE, 0],
    "mask_init": ["dense", None],
    "partitions": ["0", ["0"], ["0", "fc"]],
    "total_steps": [*NOT_WHOLE, -1, 0, 4],
    "sparsity": [*NO_NUMBER, 1.0, -0.1, None],
    "power_scale": [*NO_NUMBER, -1.0, 1e30],
    "sparsity_map": [{"0": value} for value in [*NO_NUMBER, 1.0]] + [[0.5]],
    "dense_layers": ["0", [3]],
    "drop_fraction": [*NO_NUMBER, 1.5, -0.1],
    "drop_fraction_min": [*NO_NUMBER, 0.9, -0.1],
    "drop_power": [*NO_NUMBER, -1.0],
    "drop_noise": [*NO_NUMBER, -1e-5],
    "initial_acc_scale": NO_NUMBER,
    "seed": [2.5, math.nan, 1 << 63, "3"],
    "distribution": ["even", 3],
    "drop_anneal": ["quadratic", None],
    "grow_init": ["ones"],
    "redistribution": ["all"],
    "growth": ["fast"],
    "scope": ["model"],
}


@pytest.mark.parametrize("method", METHODS)
def test_a_setting_that_cannot_be_is_refused_in_one_line(method: str) -> None:
    model = convnet()
    optimizer = sgd(model)
    for name in inspect.signature(METHODS[method][0]).parameters.keys() & BAD.keys():
        for value in BAD[name]:
            also = {"drop_anneal": "exponential"} if name == "drop_power" else {}
            with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
                make(method, model, optimizer, **{name: value}, **also)


def test_the_line_names_setting_and_value() -> None:
    model = convnet()
    with pytest.raises(ValueError, match=r"delta_t must be an integer, got 2\.5"):
        make("rigl", model, sgd(model), delta_t=2.5)
    with pytest.raises(ValueError, match=r"prune_end must be an integer, got 14\.0"):
        make("gmp", model, sgd(model), prune_end=14.0)
    with pytest.raises(ValueError, match="drop_noise must be a finite number, got nan"):
        make("set", model, sgd(model), drop_noise=math.nan)


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    check_integer("delta_t", numpy.int64(3))
    check_number("sparsity", numpy.float32(0.5))
    with pytest.raises(ValueError, match="must be an integer"):
        check_integer("delta_t", numpy.float32(3))


@pytest.mark.parametrize("period", [(5, 5), (5, 4), (-1, 4), (0.5, 4), (0, math.inf)])
def test_public_schedules_refuse_a_period_that_cannot_be(period: Any) -> None:
    for call in (
        lambda: sparse.Window(1, *period),
        lambda: sparse.DropFraction(0.3, *period),
        lambda: sparse.cubic_sparsity(5, *period, 0.9),
    ):
        with pytest.raises(ValueError, match=r"t_start|t_end"):
            call()


@pytest.mark.parametrize("num_active", [3, (1 << 24) + 3, (1 << 30) + 65])
def test_no_more_are_dropped_than_there_are(num_active: int) -> None:
    # (1 << 24) + 3 is no float32; the nearest one is larger
    assert num_dropped(num_active, 1.0) <= num_active
