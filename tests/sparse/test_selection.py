"""Exact selection: every path against a full sort, with ties, NaN and all counts."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sparse
from sparse.topology.rng import Draw
from sparse.topology.selection import largest, smallest


class OnDevice(torch.Tensor):
    """A tensor that takes the path of devices, where no value may be read."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.item, torch.Tensor.numpy, torch.Tensor.nonzero):
            raise AssertionError(f"{func} reads the device")
        return super().__torch_function__(func, types, args, kwargs or {})


def by_sorting(scores: Tensor, k: int, among: Tensor, largest_first: bool) -> Tensor:
    """Select with Python's stable sort, straight from the rule."""
    values = [float("inf") if x != x else abs(x) for x in scores.flatten().tolist()]
    nan = [x != x for x in scores.flatten().tolist()]
    candidates = among.flatten().nonzero().flatten().tolist()
    candidates.sort(key=lambda i: (nan[i], values[i], -i), reverse=largest_first)
    chosen = torch.zeros(among.numel(), dtype=torch.bool)
    chosen[candidates[:k]] = True
    return chosen.view(among.shape)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    size = draw(st.integers(1, 40))
    numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, float("inf"), float("nan"), 1e-40])
    scores = draw(st.lists(numbers, min_size=size, max_size=size))
    among = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    return torch.tensor(scores), among, draw(st.integers(0, int(among.sum())))


@given(cases(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_all_paths_follow_the_rule(case: tuple[Tensor, Tensor, int], dtype: torch.dtype) -> None:
    scores, among, k = case
    scores = scores.to(dtype)
    for select, first in ((largest, True), (smallest, False)):
        expected = by_sorting(scores, k, among, first)
        device_scores, device_among = scores.as_subclass(OnDevice), among.as_subclass(OnDevice)
        assert torch.equal(select(scores, k, among), expected)
        assert torch.equal(select(device_scores, k, device_among), expected)
        count = torch.tensor(k).as_subclass(OnDevice)
        assert torch.equal(select(device_scores, count, device_among), expected)


@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "rows", "draw", "nan", "bfloat16"])
@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
def test_large_layers_take_the_sampled_bound(kind: str, density: float) -> None:
    shape, generator = (300, 500), torch.Generator().manual_seed(0)
    normal = torch.randn(shape, generator=generator)
    scores: Tensor | Draw = {
        "normal": normal,
        "ties": (normal * 2).round(),
        "constant": torch.ones(shape),
        "rows": normal
        * torch.logspace(-4, 4, 300)[:, None],  # a strided sample must see all scales
        "draw": Draw(shape, (1,)),
        "nan": torch.where(normal > 2, float("nan"), normal),
        "bfloat16": normal.bfloat16(),
    }[kind]
    among = torch.rand(shape, generator=generator) < density
    total = int(among.sum())
    on_device = scores if isinstance(scores, Draw) else scores.as_subclass(OnDevice)
    for k in (0, 1, total // 50, total // 3, total - 1, total):
        for select in (largest, smallest):
            chosen = select(scores, k, among)
            assert int(chosen.sum()) == k
            assert not (chosen & ~among).any()
            assert torch.equal(chosen, select(on_device, k, among.as_subclass(OnDevice)))
        assert torch.equal(largest(scores, k, among), among & ~smallest(scores, total - k, among))


def test_memory_layout_does_not_matter() -> None:
    scores = torch.ones(4, 3, 5, 5)  # ties everywhere: the flat index alone decides
    among = torch.ones(4, 3, 5, 5, dtype=torch.bool)
    last = {"memory_format": torch.channels_last}
    expected = largest(scores, 31, among)
    assert torch.equal(expected.flatten().nonzero().flatten(), torch.arange(31))
    assert torch.equal(largest(scores.to(**last), 31, among.to(**last)), expected)


def test_too_many_are_all_candidates_for_a_mask_and_an_error_for_a_change() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    among = torch.tensor([True, False, True, False])
    assert torch.equal(sparse.topk_mask(scores, 3, among), among)
    assert torch.equal(sparse.topk_mask(scores, torch.tensor(4), among), among)
    with pytest.raises(ValueError, match="asked for 3 of 2 candidates"):
        sparse.drop_and_grow(among, scores, scores, 3)
    with pytest.raises(ValueError, match="active_first"):
        sparse.drop_and_grow(among, Draw((4,), (0,)), scores, 1, active_first=False)
