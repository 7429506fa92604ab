"""Selection within rows: exact counts, ties, and the same for all layers together."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse.topology.rng import Draw
from sparse.topology.rows import count_in_rows, fill_rows, per_row, within_rows
from tests.sparse.test_batched import together

SHAPES = [(1, 1), (3, 4), (5, 2, 3, 3), (2, 7, 1, 1), (6, 1)]


def plain(mask: Tensor, count: Tensor, keep: Tensor, grow: Tensor) -> Tensor:
    """Fill rows one by one, by sorting."""
    new = torch.zeros_like(mask.flatten(1))
    for index in range(len(mask)):
        row, limit = mask.flatten(1)[index], int(count[index])
        order = keep.flatten(1)[index].abs().sort(descending=True, stable=True).indices
        kept = [place for place in order.tolist() if row[place]][:limit]
        order = grow.flatten(1)[index].abs().sort(descending=True, stable=True).indices
        free = [place for place in order.tolist() if place not in kept]
        new[index, [*kept, *free[: max(limit - len(kept), 0)]]] = True
    return new.view(mask.shape)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
def test_rows_are_filled_as_by_sorting(seed: int, shapes: list[tuple[int, ...]]) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:  # with many ties
        return torch.randint(-3, 4, shape, generator=generator).float()

    masks = {str(n): draw(shape) > 0 for n, shape in enumerate(shapes)}
    keep = {name: draw(tuple(mask.shape)) for name, mask in masks.items()}
    grow = {name: draw(tuple(mask.shape)) for name, mask in masks.items()}
    limits = [torch.randint(mask[0].numel() + 1, (len(mask),), generator=generator)
              for mask in masks.values()]  # fmt: skip
    found = fill_rows(masks, torch.cat(limits), keep, grow)
    for (name, mask), limit in zip(masks.items(), limits, strict=True):
        assert torch.equal(found[name], plain(mask, limit, keep[name], grow[name]))
        assert torch.equal(found[name].flatten(1).sum(1), limit)
    marks = torch.rand(sum(map(len, masks.values())), generator=generator) < 0.5

    def results() -> list[Any]:
        draws = {name: Draw(tuple(mask.shape), (seed,)) for name, mask in masks.items()}
        return [
            fill_rows(masks, torch.cat(limits), keep, grow),
            fill_rows(masks, torch.cat(limits), None, draws),
            within_rows(masks, marks),
            count_in_rows(masks, found),
            per_row(range(len(masks)), masks),
        ]

    expected = results()
    with together():
        torch.testing.assert_close(results(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_numbers_of_other_types_are_ranked(dtype: torch.dtype) -> None:
    scores = torch.tensor([[1.0, -3.0, float("nan"), 2.0], [0.0, -0.0, 5.0, 5.0]]).to(dtype)
    masks = {"a": torch.ones(2, 4, dtype=torch.bool)}
    counts = torch.tensor([2, 3])
    expected = [[False, True, True, False], [True, False, True, True]]
    assert fill_rows(masks, counts, {"a": scores}, {"a": scores})["a"].tolist() == expected
    with together():
        assert fill_rows(masks, counts, {"a": scores}, {"a": scores})["a"].tolist() == expected
