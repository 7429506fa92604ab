"""Drop and grow, by hand and by its properties; packing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sparse
from sparse.methods.snfs import bernoulli_growth
from sparse.topology.bits import pack, unpack


def mask_of(*active: int, size: int = 8) -> Tensor:
    return torch.zeros(size, dtype=torch.bool).index_fill(0, torch.tensor(active), True)


WEIGHTS = torch.tensor([0.5, -0.1, 0.3, 0.0, -0.9, 0.0, 0.2, 0.0])


@pytest.mark.parametrize(
    ("scores", "num_dropped", "expected"),
    [
        # active are 0 1 2 4 6; |w| 0.5 0.1 0.3 0.9 0.2
        ([0, 0, 0, 9, 0, 5, 0, 7], 2, (0, 2, 4, 3, 7)),  # 1 and 6 go, 3 and 7 come
        ([0, 8, 0, -9, 0, 5, 0, 7], 2, (0, 2, 4, 3, 1)),  # 1 returns at once; -9 counts as 9
        ([9, 9, 9, 0, 9, 0, 9, 0], 1, (0, 2, 4, 6, 1)),  # survivors are no candidates
        ([0, 0, 0, 0, 0, 0, 0, 0], 2, (0, 2, 4, 1, 3)),  # ties: lower index first
        ([1, 2, 3, 4, 5, 6, 7, 8], 5, (3, 4, 5, 6, 7)),  # all dropped, the best five come back
        ([1, 2, 3, 4, 5, 6, 7, 8], 0, (0, 1, 2, 4, 6)),
    ],
)
def test_drop_and_grow_by_hand(
    scores: list[float], num_dropped: int, expected: tuple[int, ...]
) -> None:
    new = sparse.drop_and_grow(
        mask_of(0, 1, 2, 4, 6), WEIGHTS, torch.tensor(scores).float(), num_dropped
    )
    assert torch.equal(new, mask_of(*expected))


def test_an_active_zero_is_not_mistaken_for_an_inactive_one() -> None:
    weights = torch.tensor([0.0, 0.0, 0.0, 0.4])
    mask = mask_of(2, 3, size=4)
    scores = torch.tensor([1.0, 2.0, 0.0, 0.0])
    ours = sparse.drop_and_grow(mask, weights, scores, 0)
    assert torch.equal(ours, mask)
    # The original without noise keeps position 0 in place of the active zero at 2.
    quirk = sparse.drop_and_grow(mask, weights, scores, 0, active_first=False)
    assert torch.equal(quirk, mask_of(0, 3, size=4))


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    """Draw mask, weights and scores without ties, and a number to drop."""
    size = draw(st.integers(2, 60))
    permutation = st.permutations(range(1, size + 1))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    weights = torch.tensor(draw(permutation)).float() * mask
    scores = torch.tensor(draw(permutation)).float()
    return mask, weights, scores, draw(st.integers(0, int(mask.sum())))


@given(layers())
def test_counts_are_conserved_and_the_strongest_kept(
    layer: tuple[Tensor, Tensor, Tensor, int],
) -> None:
    mask, weights, scores, num_dropped = layer
    new = sparse.drop_and_grow(mask, weights, scores, num_dropped)
    assert new.sum() == mask.sum()
    kept = sparse.topk_mask(weights, int(mask.sum()) - num_dropped, mask)
    assert not (kept & ~new).any()
    grown, passed_over = scores[new & ~kept], scores[~new]
    if len(grown) and len(passed_over):
        assert grown.min() > passed_over.max()


@given(layers(), st.randoms(use_true_random=False))
def test_without_ties_the_order_of_weights_does_not_matter(
    layer: tuple[Tensor, Tensor, Tensor, int], random: object
) -> None:
    mask, weights, scores, num_dropped = layer
    order = list(range(len(mask)))
    random.shuffle(order)  # type: ignore[attr-defined]
    new = sparse.drop_and_grow(mask, weights, scores, num_dropped)
    shuffled = sparse.drop_and_grow(mask[order], weights[order], scores[order], num_dropped)
    assert torch.equal(shuffled, new[order])


@given(st.integers(0, 200), st.integers(0, 5))
def test_random_masks_are_exact_and_repeatable(count: int, seed: int) -> None:
    mask = sparse.random_mask((10, 20), count, (seed, 0, 0))
    assert int(mask.sum()) == count
    assert torch.equal(mask, sparse.random_mask((10, 20), count, (seed, 0, 0)))


def test_random_masks_cover_all_places_equally() -> None:
    draws = 400
    total = sum(sparse.random_mask((16, 16), 64, (seed,)).float() for seed in range(draws))
    expected, variance = draws / 4, draws * 3 / 16
    assert ((total - expected).abs() < 5 * variance**0.5).all()


def test_bernoulli_growth_takes_numbers_below_the_share_of_candidates() -> None:
    kept = mask_of(0, 1, 2, 3)
    numbers = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1, 0.3, 0.24, 0.9])
    (new,) = bernoulli_growth({"": kept}, torch.tensor([1]), {"": numbers}).values()
    assert torch.equal(new, mask_of(0, 1, 2, 3, 4, 6))  # one of four: below 0.25


@given(st.lists(st.booleans(), max_size=70))
def test_packing_takes_a_bit_per_weight_and_loses_nothing(values: list[bool]) -> None:
    mask = torch.tensor(values, dtype=torch.bool)
    packed = pack(mask)
    assert packed.numel() == (len(values) + 7) // 8
    assert torch.equal(unpack(packed, mask.shape), mask)


def test_the_first_entry_is_the_lowest_bit() -> None:
    assert pack(mask_of(0, 1, 7, size=10)).tolist() == [0b10000011, 0]
    with pytest.raises(ValueError, match=r"do not hold a mask of \(30,\)"):
        unpack(torch.zeros(2, dtype=torch.uint8), (30,))
