"""Order, shards, random numbers and crop windows: pure functions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2

from image_classification.data.crop import FLIP, crop_parameters, crop_windows
from image_classification.data.order import BatchPlan, draws, shuffled

SIZES = st.integers(1, 90)


def plans(num_samples: int, batch_size: int, world_size: int, *, training: bool, seed: int = 0):
    return [
        BatchPlan(
            num_samples=num_samples,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            training=training,
        )
        for rank in range(world_size)
    ]


@given(SIZES, st.integers(1, 7), st.integers(1, 5), st.integers(0, 3))
def test_training_shards_are_disjoint_full_and_of_one_length(n, batch_size, world_size, epoch):
    ranks = plans(n, batch_size, world_size, training=True)
    batches = [plan.batches(epoch) for plan in ranks]
    full = n // (batch_size * world_size)
    assert [len(plan) for plan in ranks] == [len(b) for b in batches] == [full] * world_size
    assert all(len(batch) == batch_size for rank in batches for batch in rank)
    # Each global batch is a stretch of one permutation of all images.
    order = shuffled(0, epoch, n)
    assert sorted(order) == list(range(n))
    for number in range(full):
        dealt = np.concatenate([rank[number] for rank in batches])
        size = batch_size * world_size
        assert sorted(dealt) == sorted(order[number * size : (number + 1) * size])


@given(SIZES, st.integers(1, 7), st.integers(1, 100))
def test_validation_deals_every_image_once(n, batch_size, world_size):
    ranks = plans(n, batch_size, world_size, training=False)
    batches = [plan.batches(0) for plan in ranks]
    assert [len(plan) for plan in ranks] == [len(b) for b in batches]
    dealt = [index for rank in batches for batch in rank for index in batch]
    assert sorted(dealt) == list(range(n))
    assert all(0 < len(batch) <= batch_size for rank in batches for batch in rank)


@given(SIZES, st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
def test_an_epoch_goes_on_where_it_was_left(n, batch_size, world_size, done):
    for training in (True, False):
        for plan in plans(n, batch_size, world_size, training=training):
            rest = plan.batches(2, start=min(done * plan.global_batch, n))
            expected = plan.batches(2)[done:]
            assert len(rest) == len(expected)
            assert all(map(np.array_equal, rest, expected))


def test_an_epoch_goes_on_with_other_ranks_and_the_same_global_batches():
    before = plans(50, 4, 2, training=True)
    after = plans(50, 2, 4, training=True)
    whole = [np.concatenate(step) for step in zip(*(p.batches(1) for p in before), strict=True)]
    rest = [np.concatenate(step) for step in zip(*(p.batches(1, 16) for p in after), strict=True)]
    assert [sorted(batch) for batch in rest] == [sorted(batch) for batch in whole[2:]]


def test_order_depends_on_seed_and_epoch_alone():
    base = shuffled(3, 5, 1000)
    assert np.array_equal(base, shuffled(3, 5, 1000))
    assert not np.array_equal(base, shuffled(3, 6, 1000))
    assert not np.array_equal(base, shuffled(4, 5, 1000))
    assert np.array_equal(shuffled(-1, 0, 10), shuffled(2**64 - 1, 0, 10))


@given(st.lists(st.integers(0, 2_000_000), min_size=1, max_size=20), st.integers(1, 64))
def test_draws_of_an_image_do_not_depend_on_its_neighbors(indices, count):
    together = draws(1, 2, np.array(indices), count)
    for row, index in zip(together, indices, strict=True):
        assert np.array_equal(row, draws(1, 2, np.array([index]), count)[0])


def test_draws_are_uniform_and_differ_between_images_epochs_and_seeds():
    numbers = draws(0, 0, np.arange(2000), 24)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert len(np.unique(numbers)) == numbers.size
    assert numbers.mean() == pytest.approx(0.5, abs=0.005)
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.08
    assert not np.isin(draws(0, 1, np.arange(2000), 24), numbers).any()
    assert not np.isin(draws(1, 0, np.arange(2000), 24), numbers).any()


@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 10**6))
def test_windows_lie_in_the_image_and_have_an_allowed_shape(height, width, index):
    parameters = crop_parameters(0, 0, np.array([index]))
    ((top, left, h, w),) = crop_windows(np.array([[height, width]]), parameters)
    assert 0 <= top <= height - h
    assert 0 <= left <= width - w
    assert h > 0
    assert w > 0
    # Rounding moves a side by at most half a pixel.
    assert (w - 0.5) / (h + 0.5) <= 4 / 3
    assert (w + 0.5) / (h - 0.5) >= 3 / 4


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (1, 57), (200, 5)])
def test_an_elongated_image_is_cropped_as_torchvision_does(size):
    # No attempt fits, so torchvision's window is not random either.
    reference = v2.RandomResizedCrop(8).make_params([torch.zeros(3, *size)])
    windows = crop_windows(np.array([size] * 20), crop_parameters(0, 0, np.arange(20)))
    expected = [reference[key] for key in ("top", "left", "height", "width")]
    assert windows.tolist() == [expected] * 20


def test_windows_are_distributed_as_torchvision_draws_them():
    count, size = 4000, (375, 500)
    ours = crop_windows(np.array([size] * count), crop_parameters(0, 0, np.arange(count)))
    torch.manual_seed(0)
    crop, image = v2.RandomResizedCrop(8), torch.zeros(3, *size)
    drawn = [crop.make_params([image]) for _ in range(count)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in drawn])
    for mine, reference in zip(ours.T, theirs.T, strict=True):
        error = 4 * np.sqrt(2 / count) * reference.std()  # four standard errors
        assert mine.mean() == pytest.approx(reference.mean(), abs=error)
        quantiles = np.quantile(mine, (0.1, 0.5, 0.9))
        assert quantiles == pytest.approx(np.quantile(reference, (0.1, 0.5, 0.9)), abs=3 * error)


def test_half_of_the_images_are_flipped():
    flips = crop_parameters(0, 0, np.arange(4000))[:, FLIP]
    assert set(flips) == {0, 1}
    assert flips.mean() == pytest.approx(0.5, abs=0.04)
