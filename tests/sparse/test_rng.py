"""The keyed generator: the same everywhere, uniform, and independent between keys."""

import math

import torch

from sparse.topology import rng
from sparse.topology.rng import CHUNK, Draw, normal, uniform


def test_any_part_is_a_part_of_the_whole() -> None:
    draw = Draw((3, CHUNK), (1, 2, 3))
    whole = draw.tensor().view(-1)
    read = draw.reader()
    for start, stop, step in (
        (0, CHUNK, 1),
        (CHUNK, CHUNK + 9, 1),
        (5, 99, 1),
        (70, 3 * CHUNK, 977),
    ):
        assert torch.equal(torch.from_numpy(read(start, stop, step)), whole[start:stop:step])
    assert whole.min() >= 0


def test_a_device_draws_the_same() -> None:
    draw = Draw((2, CHUNK), (4, 5))
    index = torch.arange(draw.numel, dtype=torch.int32)
    first, second = rng.words(draw.key)  # the steps of a device, taken by torch on the CPU
    expected = rng._mix(index.bitwise_xor_(first), second)
    assert torch.equal(draw.tensor().view(-1), expected)


def test_values_depend_on_every_part_of_the_key() -> None:
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0)]
    draws = [Draw((1000,), key).tensor() for key in keys]
    for index, draw in enumerate(draws):
        for other in draws[:index]:
            assert (draw == other).sum() <= 1


def test_values_are_known_constants() -> None:
    # They are part of what a seed means: a change of the hash would silently change every run.
    assert Draw((4,), (0, 0, 0, 0)).tensor().tolist() == [
        1301054507,
        496239738,
        1233223144,
        308385893,
    ]


def test_uniform_is_uniform() -> None:
    count = 1 << 18
    for key in range(5):
        cells = torch.histc(uniform((count,), (key,)), bins=256, min=0.0, max=1.0)
        chi_square = ((cells - count / 256).square() / (count / 256)).sum().item()
        assert abs(chi_square - 255) < 6 * math.sqrt(2 * 255)


def test_streams_and_neighbors_are_uncorrelated() -> None:
    count = 1 << 18
    streams = torch.stack([uniform((count,), (7, step)) for step in range(6)])
    lagged = torch.stack([streams[0].roll(shift) for shift in (1, 2, 64, 4096)])
    correlation = torch.corrcoef(torch.cat([streams, lagged])).fill_diagonal_(0.0)
    assert correlation.abs().max() < 5 / math.sqrt(count)


def test_normal_has_its_moments() -> None:
    values = normal((1 << 18,), (3,)).double()
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1.0) < 0.01
    assert abs((values**4).mean() - 3.0) < 0.1
    assert values.abs().max() < 5.8
