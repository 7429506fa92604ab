"""Networks in int8: the kernels compute the integers of the reference, in every way they can."""

import random
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse import runtime
from sparse.runtime import bindings, integers
from sparse.runtime.execution_order import rows_read
from sparse.runtime.execution_plan import ExecutionPlan
from sparse.runtime.int8 import integer_layers
from sparse.runtime.layout import Map
from sparse.runtime.network import Network
from tests.sparse.runtime import integer_networks
from tests.sparse.runtime.conftest import LEVELS, prune_
from tests.sparse.runtime.fuzzed import content, rewrite
from tests.sparse.runtime.plans import NETWORKS, Api, member, number_at, replaced, table
from tests.sparse.runtime.random_networks import RandomChoices, another_plan

FEW, FEW_MIXED, MANY = 25, 8, 400
TOLERANCE = 1e-3
"""Of networks with float32 between units of int8: bytes may differ by one step, and rarely do."""


@pytest.fixture(params=["fast", "plain"])
def int8_kernels(
    request: pytest.FixtureRequest, each_kernels: bindings.Kernels
) -> Iterator[bindings.Kernels]:
    """Return kernels with the instruction for bytes that the processor has, and without."""
    if not each_kernels.fast_int8(1) and request.param == "fast":
        pytest.skip("the processor has no such instruction for vectors of this size")
    each_kernels.fast_int8(request.param == "fast")
    yield each_kernels
    each_kernels.fast_int8(1)


def compare(seed: int, kernels: bindings.Kernels, path: Path) -> None:
    """Compare a random network with the reference, for one thread and for several."""
    rng = random.Random(seed)
    model, images, how = integer_networks.draw(seed, joins=seed % 3 > 0)
    wanted = integers.run(
        integer_networks.write(path, model, size=images.shape[-1], **how).integers(), images
    )
    for threads in (1, 3):
        tuner = RandomChoices(rng) if rng.random() < 0.7 else None
        network = Network(path, threads=threads, kernels=kernels, tuner=tuner)
        with another_plan(rng, *images.shape[2:], kernels.num_lanes):
            assert torch.equal(network(images), wanted), (seed, threads)


def test_random_networks_give_the_integers_of_the_reference(
    int8_kernels: bindings.Kernels, tmp_path: Path
) -> None:
    for seed in range(FEW):
        compare(seed, int8_kernels, tmp_path / "network")


@pytest.mark.slow
@pytest.mark.parametrize("num_lanes", LEVELS)
def test_many_random_networks_give_the_integers_of_the_reference(
    num_lanes: int, libraries: dict[int, Path], tmp_path: Path
) -> None:
    kernels = bindings.Kernels(libraries[num_lanes])
    for i in range(MANY):
        kernels.fast_int8(i % 2)
        compare(1000 * num_lanes + i, kernels, tmp_path / "network")
    kernels.fast_int8(1)


def compare_mixed(seed: int, kernels: bindings.Kernels, path: Path) -> int:
    """Compare a random network of all operations with the reference; return its float32 units."""
    rng = random.Random(seed)
    nodes, state, images = integer_networks.draw_mixed(seed)
    found = integer_networks.write_graph(path, nodes, state, {}, shape=images.shape[1:]).integers()
    wanted = integers.run(found, images)
    for threads in (1, 3):
        tuner = RandomChoices(rng) if rng.random() < 0.7 else None
        network = Network(path, threads=threads, kernels=kernels, tuner=tuner)
        with another_plan(rng, *images.shape[2:], kernels.num_lanes):
            assert_close(network(images), wanted, seed)
    return sum(not unit.is_int8 for unit in found.units)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, what: object) -> None:
    assert found.shape == wanted.shape, what
    error = float((found - wanted).abs().max())
    assert error <= TOLERANCE * max(1e-3, float(wanted.abs().max())), (what, error)


def test_random_networks_of_all_operations_are_about_the_reference(
    int8_kernels: bindings.Kernels, tmp_path: Path
) -> None:
    counts = [compare_mixed(seed, int8_kernels, tmp_path / "net") for seed in range(FEW_MIXED)]
    assert sum(counts) > 2 * FEW_MIXED


@pytest.mark.slow
@pytest.mark.parametrize("num_lanes", LEVELS)
def test_many_random_networks_of_all_operations_are_about_the_reference(
    num_lanes: int, libraries: dict[int, Path], tmp_path: Path
) -> None:
    kernels = bindings.Kernels(libraries[num_lanes])
    for i in range(MANY):
        kernels.fast_int8(i % 2)
        compare_mixed(1000 * num_lanes + i, kernels, tmp_path / "network")
    kernels.fast_int8(1)


class FloatEnd(nn.Module):
    """Int8 layers, and float32 after the last of them only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 9, 1)
        self.third, self.norm = nn.Conv2d(9, 9, 3, 2, 1), nn.BatchNorm2d(9)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        y = F.hardswish(self.third(x))
        return self.norm(y + F.gelu(y)).mean((2, 3))


@pytest.mark.parametrize("channels", [4, 7, 33])
def test_bytes_before_the_first_unit_of_float32_are_those_of_the_reference(
    channels: int, each_kernels: bindings.Kernels, tmp_path: Path
) -> None:
    torch.manual_seed(channels)
    compact = integer_networks.write(tmp_path / "network", FloatEnd(channels), size=19)
    images = 2 * torch.randn(2, 3, 19, 19)
    wanted = integers.run(compact.integers(), images)
    for threads in (1, 2):
        network = Network(tmp_path / "network", threads=threads, kernels=each_kernels, tuner=None)
        assert torch.allclose(network(images), wanted, rtol=1e-5, atol=1e-6)


class Fires(nn.Module):
    """Fire modules, with and without a pool behind them, as in SqueezeNet."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(24, 8, 3, padding=1)
        self.squeezes = nn.ModuleList(nn.Conv2d(inputs, 4, 1) for inputs in (8, 24, 24))
        self.small, self.large = (
            nn.ModuleList(nn.Conv2d(4, 12, kernel, padding=kernel // 2) for _ in range(3))
            for kernel in (1, 3)
        )
        self.activation, self.fc = activation, nn.Linear(8, 5)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for i, squeeze in enumerate(self.squeezes):
            y = self.activation(squeeze(x))
            branches = [self.activation(convs[i](y)) for convs in (self.small, self.large)]
            x = torch.cat(branches, 1)
            if i:
                x = F.max_pool2d(x, 3, i, 1)
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Identity()])
def test_what_only_int8_reads_is_joined_and_pooled_in_bytes(
    activation: nn.Module, int8_kernels: bindings.Kernels, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    path, images = tmp_path / "network", 2 * torch.randn(2, 3, 19, 19)
    compact = integer_networks.write(path, Fires(activation), size=19, stretch=0.7)
    wanted = integers.run(compact.integers(), images)
    assert sum(not unit.is_int8 for unit in compact.integers().units) == 5  # joined and pooled
    for threads in (1, 2):
        network = Network(path, threads=threads, kernels=int8_kernels, tuner=None)
        assert torch.equal(network(images), wanted)
        operations = network.program(19, 19).plan.operations
        layers = [operation.layer for operation in operations if operation.layer is not None]
        assert "quantize" not in {layer.kind for layer in layers[1:]}  # the images alone are
        assert all(layer.integers is not None for layer in layers)


class Joins(nn.Module):
    """Two branches that are joined, and read by a convolution and perhaps by a pool."""

    def __init__(self, channels: int, readers: str) -> None:
        super().__init__()
        self.stem, self.readers = nn.Conv2d(3, 8, 1), readers
        self.branches = nn.ModuleList(nn.Conv2d(8, n, 1) for n in (channels, 8))
        self.convs = nn.ModuleList(nn.Conv2d(channels + 8, 8, 1) for _ in range(2))
        self.fc = nn.Linear(8, 5)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        first, second = (branch(x) for branch in self.branches)
        x = torch.cat([first, second], 1)
        y = self.convs[0](x)
        if self.readers.startswith("pool"):
            y = y + self.convs[1](F.max_pool2d(x, 3, 1, 1))
        elif self.readers == "branch":
            y = y + second
        return self.fc(y.mean((2, 3)))


@pytest.mark.parametrize(
    ("channels", "readers", "floats"),
    [
        (12, "conv", set()),
        (12, "pool", set()),
        (12, "pool of another scale", {"branches_0", "branches_1", "cat"}),
        (12, "branch", {"branches_1"}),
        (11, "conv", {"branches_0", "branches_1", "cat"}),  # a plane holds 4 channels
    ],
)
def test_what_anything_else_reads_stays_float32(
    channels: int, readers: str, floats: set[str], kernels: bindings.Kernels, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    path, images = tmp_path / "network", torch.randn(2, 3, 9, 9)
    integer_networks.write(path, Joins(channels, readers), size=9)
    if readers == "pool of another scale":
        header, tensors = content(path)
        header["activations"]["max_pool2d"] = [0.5, 3]
        rewrite(path, header, tensors)
    found = runtime.read(path).integers()
    network = Network(path, threads=1, kernels=kernels, tuner=None)
    assert_close(network(images), integers.run(found, images), readers)
    layers = {layer.name: layer.integers for layer in integer_layers(found, in_channels=3)}
    branches = {name for name in ("branches_0", "branches_1") if layers[name].rescale is None}
    assert branches | {name for name in ("cat",) if layers[name] is None} == floats


class PreActivation(nn.Module):
    """BatchNorm and ReLU before the convolutions, as in Wide ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.short = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 1, 2)
        self.first = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
        self.convs = nn.Sequential(
            *(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
            nn.Conv2d(16, 16, 3, padding=1),
        )
        self.last, self.fc = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU()), nn.Linear(16, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.stem(x))
        return self.fc(self.last(self.convs(x) + self.short(x)).mean((2, 3)))


@pytest.mark.parametrize("name", ["vit", "concat", "pre-activation"])
def test_a_network_with_float32_between_is_a_file_and_a_plan_and_near_float32(
    name: str, kernels: bindings.Kernels, kernel_cache: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make = PreActivation if name == "pre-activation" else NETWORKS[name]
    model = integer_networks.with_heads(make())
    path = tmp_path / "network"
    compact = integer_networks.write(path, model, size=32)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        floats = model(images)
    wanted = integers.run(compact.integers(), images)
    assert 0 < float((wanted - floats).norm() / floats.norm()) < 0.05
    assert_close(runtime.load(path, cache=kernel_cache)(images), wanted, name)
    runtime.save_plan(path, tmp_path / "plan", threads=2, tune=False)
    api = Api(kernels.path)
    network = api.open(tmp_path / "plan")
    assert not isinstance(network, str), network
    assert_close(network.run(images)[..., 0, 0], wanted, name)
    assert api.call("retune", network.handle) == "SPARSE_OK", api.error()
    assert_close(network.run(images)[..., 0, 0], wanted, name)


class Branches(nn.Module):
    """Sums of values that no convolution of their own computes, in both orders."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, outputs, 3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 1)
        self.head = nn.Linear(outputs, 5)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)  # signed: the padding is not 0
        b = torch.relu(self.second(a))
        c = torch.relu(b + a) + b
        c = c + c
        return self.head(torch.nn.functional.adaptive_avg_pool2d(c + self.second(c), 1).flatten(1))


@pytest.mark.parametrize(("channels", "outputs"), [(3, 8), (3, 7), (3, 33)])
def test_sums_of_all_kinds_give_the_integers_of_the_reference(
    channels: int, outputs: int, each_kernels: bindings.Kernels, tmp_path: Path
) -> None:
    torch.manual_seed(outputs)
    path = tmp_path / "network"
    compact = integer_networks.write(path, Branches(channels, outputs), size=19)
    images = 2 * torch.randn(2, channels, 19, 19)
    wanted = integers.run(compact.integers(), images)
    for threads in (1, 2):
        network = Network(path, threads=threads, kernels=each_kernels, tuner=None)
        assert torch.equal(network(images), wanted)


def test_padding_is_written_before_rows_that_read_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, padding=2), nn.Conv2d(8, 8, 3)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    compact = integer_networks.write(tmp_path / "network", model, size=24)
    plan = ExecutionPlan(integer_layers(compact.integers(), in_channels=3), (3, 24, 24), lanes=4)
    padded = plan.convolutions()[1]
    assert isinstance(padded.source, Map)
    assert padded.source.fill > 0  # the zero point, which the padding is
    rows = [rows_read(padded, padded.source, y, y + 1) for y in (0, 1, 2, 25, 26, 27)]
    assert rows == [range(1), range(1), range(1), range(23, 24), range(23, 24), range(23, 24)]


def test_a_network_with_blocks_is_tuned_and_runs(kernel_cache: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    masks = prune_(model.eval(), 1.0)
    blocks = torch.rand(64, 8, 3, 3) < 0.2
    masks["2.weight"] = blocks.repeat_interleave(4, 1)
    model[2].weight.data *= masks["2.weight"]
    compact = integer_networks.write(tmp_path / "network", model, size=32, masks=masks)
    network = runtime.load(tmp_path / "network", cache=kernel_cache)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network(images), integers.run(compact.integers(), images))
    layer = network.program(32, 32).plan.convolutions()[1].layer
    assert layer is not None
    assert layer.num_active == int(blocks.sum())  # four weights are one connection


def test_a_plan_of_a_quantized_file_has_its_integers(
    kernels: bindings.Kernels, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    compact = integer_networks.write(tmp_path / "network", Branches(3, 8), size=19)
    images = torch.randn(2, 3, 19, 19)
    wanted = integers.run(compact.integers(), images)
    runtime.save_plan(tmp_path / "network", tmp_path / "plan", threads=2, tune=False)
    api = Api(kernels.path)
    for threads in (1, 2):
        network = api.open(tmp_path / "plan", threads)
        assert not isinstance(network, str), network
        assert torch.equal(network.run(images)[..., 0, 0], wanted)
        assert api.call("retune", network.handle) == "SPARSE_OK", api.error()
        assert torch.equal(network.run(images)[..., 0, 0], wanted)


def test_channels_of_a_plane_that_are_apart_are_refused(
    kernels: bindings.Kernels, tmp_path: Path
) -> None:
    integer_networks.write(tmp_path / "network", Branches(3, 8), size=19)
    runtime.save_plan(tmp_path / "network", tmp_path / "plan", tune=False)
    plan = (tmp_path / "plan").read_bytes()
    place = table(plan, bindings.QUANT_CONV, "row_channel")
    second, first = divmod(number_at(plan, place), 2**32)
    assert second == first + 1
    refused = Api(kernels.path).open(replaced(plan, {place: first * 2**32 + second}))
    assert isinstance(refused, str)
    assert refused.endswith("channels of a plane are apart")


@pytest.mark.parametrize("divisor", [0.0, -1.0, float("nan")])
def test_a_divisor_that_is_not_above_0_is_refused(
    divisor: float, kernels: bindings.Kernels, tmp_path: Path
) -> None:
    integer_networks.write(tmp_path / "network", Fires(nn.ReLU()), size=19)
    runtime.save_plan(tmp_path / "network", tmp_path / "plan", tune=False)
    plan = (tmp_path / "plan").read_bytes()
    place = table(plan, bindings.QUANT_CONV, "rescale") + 8  # after the zero point and the range
    found, own_last = struct.unpack_from("<2f", plan, place)
    assert (found, own_last) == (1.0, 0.0)
    (number,) = struct.unpack("<q", struct.pack("<2f", divisor, own_last))
    refused = Api(kernels.path).open(replaced(plan, {place: number}))
    assert isinstance(refused, str)
    assert refused.endswith("integers are out of range")


@pytest.mark.parametrize(
    ("kind", "name", "value", "told"),
    [
        (bindings.QUANTIZE, "in_channels", 10**6, "the planes have other channels"),
        (bindings.QUANTIZE, "channels", 1, "the planes have other channels"),
        (bindings.QUANTIZE, "num_parts", 1, "a part is no plane"),
        (bindings.QUANTIZE, "in_", 2**20, "a member is out of range|outside the arena"),
        (bindings.QUANTIZE, "in_plane", 2**20, "outside the arena"),
        (bindings.QUANTIZE, "rescale", 0, "a table is missing"),
        (bindings.QUANTIZE_VECTOR, "in_channels", 1, "the planes have other channels"),
        (bindings.QUANTIZE_VECTOR, "out", -1, "the output is no vector of bytes"),
        (bindings.QUANTIZE_VECTOR, "scales", 0, "a table is missing"),
        (bindings.QUANT_CONV, "scales", 0, "a table is missing"),
        (bindings.QUANT_CONV, "out_row", 64, "the planes or rows of the output overlap"),
    ],
)
def test_a_plan_with_float32_between_that_does_not_fit_is_refused(
    kind: int, name: str, value: int, told: str, kernels: bindings.Kernels, mixed_plan: bytes
) -> None:
    refused = Api(kernels.path).open(replaced(mixed_plan, {member(mixed_plan, kind, name): value}))
    assert isinstance(refused, str)
    assert refused.startswith("SPARSE_BAD_PLAN: the plan is damaged: operation ")
    assert re.search(told, refused), refused


@pytest.fixture(scope="module")
def mixed_plan(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the plan of a small transformer in int8 and float32."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("plan") / "network"
    integer_networks.write(path, NETWORKS["vit"]().eval(), size=32)
    runtime.save_plan(path, path.with_suffix(".plan"), tune=False)
    return path.with_suffix(".plan").read_bytes()
