"""Schedules: end points, hand-computed values, and the steps at which they apply."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparse
from sparse.topology.schedules import num_dropped

STEPS = st.integers(0, 10_000)


def test_updates_of_the_published_setting() -> None:
    # 25000 / 100 + 1: the first update is at step 0 and the last at the end, where nothing drops.
    assert sparse.num_updates(100, 0, 25_000, 32_000) == 251


@given(st.integers(1, 50), STEPS, st.integers(1, 500), st.integers(1, 12_000))
def test_window_and_count_agree(delta_t: int, start: int, length: int, total: int) -> None:
    window = sparse.Window(delta_t, start, start + length)
    due = [step for step in range(total) if window.due(step)]
    assert due == list(sparse.update_steps(delta_t, start, start + length, total))
    assert len(due) == sparse.num_updates(delta_t, start, start + length, total)


def test_a_window_may_insist_on_its_end() -> None:
    due = [step for step in range(30) if sparse.Window(10, 5, 22, at_end=True).due(step)]
    assert due == [5, 15, 22]


@pytest.mark.parametrize(
    ("anneal", "power", "start", "middle", "end"),
    [
        ("constant", None, 0.3, 0.3, 0.3),
        ("cosine", None, 0.3, 0.15, 0.0),
        ("linear", None, 0.3, 0.15, 0.0),
        ("exponential", 3.0, 0.3, 0.0375, 0.0),
    ],
)
def test_drop_fraction_at_three_points(
    anneal: str, power: float | None, start: float, middle: float, end: float
) -> None:
    drop = sparse.DropFraction(0.3, 0, 100, anneal, power)
    assert [drop(0), drop(50), drop(100)] == pytest.approx([start, middle, end], abs=1e-12)
    assert drop(101) == 0.0


@given(STEPS, st.floats(0, 1), st.sampled_from(["cosine", "linear", "constant"]))
def test_drop_fraction_never_rises(step: int, initial: float, anneal: str) -> None:
    drop = sparse.DropFraction(initial, 0, 10_001, anneal)
    assert 0.0 <= drop(step + 1) <= drop(step) <= initial + 1e-15


def test_cosine_can_end_above_zero() -> None:
    drop = sparse.DropFraction(0.5, 0, 1000, minimum=0.005)
    assert [drop(0), drop(500), drop(1000)] == pytest.approx([0.5, 0.2525, 0.005])


def test_cubic_sparsity_by_hand() -> None:
    ramp = [sparse.cubic_sparsity(step, 10, 30, 0.8) for step in (0, 10, 20, 30, 99)]
    assert ramp == pytest.approx([0.0, 0.0, 0.7, 0.8, 0.8])


def test_drop_count_has_the_rounding_of_float32() -> None:
    # In doubles 0.3 * 10 = 3.0000000000000004 - epsilon games; in float32 0.3f * 10 rounds to 3.0.
    assert num_dropped(10, 0.3) == 3
    assert num_dropped(77, 0.3) == 23
    # 0.7f * 10 = 6.9999998 is exact as a product but rounds to 7 in float32.
    assert num_dropped(10, 0.7) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 10), "delta_t must be at least 1 optimizer step, got 0"),
        ((1, -1, 10), "t_start must not be negative"),
        ((1, 10, 10), "t_end must be larger than t_start 10, got 10"),
    ],
)
def test_impossible_windows(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse.Window(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.5, 0, 10), "drop_fraction must be in"),
        ((0.3, 0, 10, "quadratic"), "drop_anneal must be one of"),
        ((0.3, 0, 10, "cosine", 3.0), "goes with drop_anneal 'exponential' alone"),
        ((0.3, 0, 10, "exponential"), "drop_power None"),
        ((0.3, 0, 10, "exponential", -1.0), "must be positive"),
        ((0.3, 0, 10, "cosine", None, 0.4), "minimum"),
        ((0.3, 0, 10, "linear", None, 0.1), "no effect with 'linear'"),
    ],
)
def test_impossible_drop_fractions(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse.DropFraction(*arguments)  # type: ignore[arg-type]
