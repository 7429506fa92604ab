"""compact_channels: smaller networks with the same outputs."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from image_classification.models import create_model
from sparse import runtime
from sparse.runtime import bindings
from tests.sparse.runtime.random_networks import RandomNetwork


class Net(nn.Module):
    """Layers `a`, `b`, ... and what computes with them."""

    def __init__(self, forward: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.names = "abcdefgh"[: len(layers)]
        for name, layer in zip(self.names, layers, strict=True):
            self.add_module(name, layer)
        self.computed = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.computed(x, *(getattr(self, name) for name in self.names))


def kill(layer: nn.Module, *channels: int, bias: float = 0.0) -> None:
    """Set the weights of output channels to 0, and their bias if there is one."""
    with torch.no_grad():
        layer.weight[list(channels)] = 0
        if layer.bias is not None:
            layer.bias[list(channels)] = bias


def compacted(model: nn.Module, *size: int, tolerance: float = 1e-5) -> nn.Module:
    """Compact a network; check the outputs, the model itself, and that nothing more can go."""
    images = torch.randn(*size, generator=torch.Generator().manual_seed(1))
    held = {name: value.clone() for name, value in model.state_dict().items()}
    small = runtime.compact_channels(model, images)
    for name, value in model.state_dict().items():
        assert torch.equal(value, held[name])
    others = torch.randn(*size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = model.eval()(others.clone())
        scale = max(1.0, float(wanted.abs().max()))
        assert float((small(others.clone()) - wanted).abs().max()) <= tolerance * scale
    again = runtime.compact_channels(small, images)
    assert shapes_of(again) == shapes_of(small)
    return small


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(v.shape) for n, v in model.state_dict().items() if v.dim() > 1}


def chain(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
    return model.eval()


def test_dead_neurons_go_into_the_bias_of_the_next_layer() -> None:
    model = chain(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 5, bias=False), nn.Linear(5, 3))
    kill(model[0], 1, 4, 7, bias=0.3)
    small = compacted(model, 4, 6)
    assert shapes_of(small) == {"0.weight": (5, 6), "2.weight": (5, 5), "3.weight": (3, 5)}
    assert small.state_dict()["2.bias"].shape == (5,)  # it had none


def test_what_nobody_reads_goes_back_to_the_first_layer() -> None:
    model = chain(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[4].weight[:, :4] = 0  # nobody reads neurons 0 to 3 of the second layer,
        model[2].weight[4:, 2:] = 0  # and only they read neurons 2 to 7 of the first
    small = compacted(model, 4, 6)
    assert shapes_of(small) == {"0.weight": (2, 6), "2.weight": (4, 2), "4.weight": (3, 4)}


def test_neurons_that_read_only_constants_are_constants() -> None:
    model = chain(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    kill(model[0], 0, 1, bias=0.7)
    with torch.no_grad():
        model[2].weight[:3, 2:] = 0
    small = compacted(model, 4, 6)
    assert shapes_of(small) == {"0.weight": (6, 6), "2.weight": (5, 6), "4.weight": (3, 5)}


@pytest.mark.parametrize(
    ("shift", "options", "left"),
    [
        (-1.0, {"padding": 1}, 6),  # the ReLU gives 0, as the padding does
        (1.0, {"padding": 1}, 8),  # 1 inside, 0 at the border
        (1.0, {"padding": "same"}, 8),
        (1.0, {"padding": 0}, 6),
        (1.0, {"padding": "valid"}, 6),
        (1.0, {"padding": 1, "padding_mode": "replicate"}, 6),
        (-1.0, {"padding": 1, "stride": 2, "dilation": 2}, 6),
    ],
)
def test_only_zeros_go_into_a_convolution_that_pads_with_zeros(
    shift: float, options: dict[str, object], left: int
) -> None:
    first, norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
    model = chain(first, norm, nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3, **options))
    kill(first, 2, 5)
    nn.init.zeros_(norm.running_mean)
    norm.bias.data[[2, 5]] = shift
    small = compacted(model, 2, 3, 9, 9)
    assert shapes_of(small)["0.weight"] == (left, 3, 3, 3)
    assert small.state_dict()["1.running_var"].shape == (left,)


def test_a_scale_of_zero_makes_a_channel_constant() -> None:
    model = chain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model[1].weight.data[:2] = 0
    model[1].bias.data[:2] = 0.5
    assert shapes_of(compacted(model, 2, 3, 9, 9))["0.weight"] == (6, 3, 3, 3)


@pytest.mark.parametrize(("dead", "left"), [("both", 6), ("first", 8), ("second", 8)])
def test_a_channel_of_a_sum_goes_only_from_all_its_terms(dead: str, left: int) -> None:
    model = Net(
        lambda x, a, b, c: c(F.relu(a(x) + b(x))),
        *(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, padding=1)),
    )
    for name, layer in (("first", model.a), ("second", model.b)):
        if dead in (name, "both"):
            kill(layer, 0, 7, bias=-0.1)
    shapes = shapes_of(compacted(model, 2, 3, 6, 6))
    assert shapes == {
        "a.weight": (left, 3, 3, 3), "b.weight": (left, 3, 1, 1), "c.weight": (4, left, 3, 3)
    }  # fmt: skip


def test_terms_that_cancel_are_one_constant() -> None:
    model = Net(lambda x, a, b, c: c(a(x) + b(x)), *(nn.Conv2d(3, 8, 1) for _ in "ab"),
                nn.Conv2d(8, 4, 3, padding=1))  # fmt: skip
    kill(model.a, 3, bias=0.5)
    kill(model.b, 3, bias=-0.5)
    assert shapes_of(compacted(model, 2, 3, 6, 6))["c.weight"] == (4, 7, 3, 3)


@pytest.mark.parametrize(("groups", "per_group", "left"), [(8, 1, 5), (8, 2, 5), (4, 2, 6)])
def test_grouped_convolutions_lose_whole_groups(groups: int, per_group: int, left: int) -> None:
    grouped = nn.Conv2d(8, groups * per_group, 3, padding=1, groups=groups)
    model = chain(nn.Conv2d(3, 8, 1), nn.ReLU(), grouped, nn.ReLU(),
                  nn.Conv2d(grouped.out_channels, 4, 3, padding=1))  # fmt: skip
    # one group of 8 dead before the grouped convolution, two of its own; with 4 groups one whole
    kill(model[0], 0, bias=-1)
    gone = range(2 * per_group, 4 * per_group) if groups == 8 else range(2, 5)
    kill(grouped, *gone, bias=-1)
    if groups == 8:
        kill(grouped, *range(per_group), bias=-1)
    small = compacted(model, 2, 3, 6, 6)
    width = grouped.weight.shape[1]
    assert shapes_of(small)["2.weight"] == (left * per_group // width, width, 3, 3)
    assert shapes_of(small)["0.weight"] == (left, 3, 1, 1)
    assert small.get_submodule("2").groups == left // width


def test_a_depthwise_convolution_keeps_what_it_pads_differently() -> None:
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    model = chain(nn.Conv2d(3, 8, 1), nn.ReLU(), depthwise, nn.Conv2d(8, 4, 1))
    kill(model[0], 0, bias=1.0)
    kill(model[0], 1, bias=-1.0)
    kill(depthwise, 2)
    assert shapes_of(compacted(model, 2, 3, 6, 6))["2.weight"] == (6, 1, 3, 3)


def test_the_last_layer_keeps_its_classes_and_every_layer_a_channel() -> None:
    model = chain(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                  nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))  # fmt: skip
    kill(model[0], *range(8), bias=0.2)
    kill(model[4], *range(5), bias=0.2)
    kill(model[6], 1, bias=0.3)
    shapes = shapes_of(compacted(model, 2, 3, 6, 6))
    assert shapes == {"0.weight": (1, 3, 3, 3), "4.weight": (1, 1), "6.weight": (3, 1)}


def test_flattened_maps_and_concatenations() -> None:
    model = Net(
        lambda x, a, b, c: c(torch.flatten(torch.cat([a(x), F.relu(b(x))], 1), 1)),
        *(nn.Conv2d(3, 8, 3), nn.Conv2d(3, 4, 3), nn.Linear(12 * 16, 5)),
    )
    kill(model.a, 0, 1, 5, bias=0.5)
    kill(model.b, 3, bias=0.5)
    shapes = shapes_of(compacted(model, 2, 3, 6, 6))
    assert (shapes["a.weight"][0], shapes["b.weight"][0]) == (5, 3)
    assert shapes["c.weight"] == (5, 8 * 16)


def test_a_gate_times_a_dead_channel_goes_with_it() -> None:
    model = Net(
        lambda x, a, b, c: c(torch.sigmoid(b(x.mean((2, 3), keepdim=True))) * F.relu(a(x))),
        *(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, padding=1)),
    )
    kill(model.a, 0, 1, bias=-0.5)
    shapes = shapes_of(compacted(model, 2, 3, 6, 6))
    assert (shapes["a.weight"][0], shapes["b.weight"][0]) == (6, 6)


@pytest.mark.parametrize(
    ("pool", "left"),
    [
        (nn.AvgPool2d(3, 1, 1), 8),  # counts the zeros of the padding
        (nn.AvgPool2d(3, 1, 1, count_include_pad=False), 6),
        (nn.AvgPool2d(2, divisor_override=3), 8),
        (nn.AvgPool2d(2), 6),
        (nn.MaxPool2d(3, 2, 1), 6),
    ],
)
def test_pools_keep_a_constant_unless_they_count_padding(pool: nn.Module, left: int) -> None:
    model = chain(nn.Conv2d(3, 8, 1), pool, nn.Conv2d(8, 4, 1))
    kill(model[0], 0, 1, bias=0.5)
    assert shapes_of(compacted(model, 2, 3, 6, 6))["0.weight"][0] == left


def shuffled(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> Tensor:
    y = F.relu(a(x)).view(2, 2, 4, 6, 6).transpose(1, 2).reshape(2, 8, 6, 6)
    return c(F.relu(b(y)))


def test_unknown_operations_keep_their_channels_and_others_lose_theirs() -> None:
    model = Net(shuffled, *(nn.Conv2d(i, 8, 1) for i in (3, 8)), nn.Conv2d(8, 4, 1))
    kill(model.a, 0, bias=-1)
    kill(model.b, 0, bias=-1)
    shapes = shapes_of(compacted(model, 2, 3, 6, 6))
    assert (shapes["a.weight"][0], shapes["b.weight"][0]) == (8, 7)


@pytest.mark.parametrize(
    "forward",
    [
        lambda x, a, b, c: c(b(b(a(x)))),  # called twice
        lambda x, a, b, c: c(b(a(x)) + F.conv2d(x.mean(1, True).expand(-1, 8, -1, -1), b.weight)),
    ],
)
def test_weights_used_twice_stay_whole(forward: Callable[..., Tensor]) -> None:
    model = Net(forward, *(nn.Conv2d(i, 8, 1) for i in (3, 8)), nn.Conv2d(8, 4, 1))
    kill(model.b, 0, 1)
    kill(model.a, 0, 1)
    assert shapes_of(compacted(model, 2, 3, 6, 6))["b.weight"] == (8, 8, 1, 1)


def overwritten(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    y = a(x)
    z = F.relu(y, inplace=True)
    return b(y + z)  # y, too, is without its negative numbers


def test_values_that_are_overwritten_are_read_as_they_are_then() -> None:
    model = Net(overwritten, nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, padding=1))
    kill(model.a, 0, 1, bias=-1)
    assert shapes_of(compacted(model, 2, 3, 6, 6))["a.weight"][0] == 6


@pytest.mark.parametrize(
    "change",
    [
        lambda model: nn.utils.parametrizations.spectral_norm(model[2]),
        lambda model: model[2].register_forward_hook(lambda module, inputs, y: y.roll(1, 1)),
        lambda model: model[1].register_forward_hook(lambda module, inputs, y: y.roll(1, 1)),
    ],
    ids=["parametrization", "hook of a layer", "hook of an activation"],
)
def test_parametrized_layers_and_modules_with_hooks_stay_whole(
    change: Callable[[nn.Module], object],
) -> None:
    model = chain(nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1))
    kill(model[0], 0, bias=1)
    kill(model[2], 0, bias=1)
    change(model)
    assert compacted(model, 2, 3, 6, 6).get_submodule("0").out_channels == 8


def kill_randomly(model: nn.Module, seed: int, share: float) -> None:
    """Set random output channels and random weights to 0, and make the rest of the state random."""
    rng = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            for mask in (torch.rand(len(module.weight), generator=rng) < share,
                         torch.rand(module.weight.shape, generator=rng) < share):  # fmt: skip
                module.weight.data[mask] = 0
        elif isinstance(module, nn.BatchNorm2d):
            for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.2),
                                    ("running_mean", -0.1, 0.1)):  # fmt: skip
                getattr(module, name).data.uniform_(low, high, generator=rng)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20), share=st.sampled_from([0.2, 0.5, 0.9, 1.0]))
def test_random_networks_compute_the_same(seed: int, share: float) -> None:
    torch.manual_seed(seed)
    model = RandomNetwork(random.Random(seed), 3, 12, 11).double()
    kill_randomly(model, seed, share)
    images = torch.randn(2, 3, 12, 11, dtype=torch.float64)
    small = runtime.compact_channels(model, images)
    with torch.no_grad():
        torch.testing.assert_close(small(images), model(images), rtol=1e-9, atol=1e-9)


ZOO: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(),
    "resnet50": lambda: torchvision.models.resnet50(),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(),
    "resnext": lambda: ResNet(Bottleneck, (1, 2, 1, 1), 7, groups=32, width_per_group=4),
    "mobilenet_v1": lambda: create_model("mobilenet_v1", num_classes=7, width=0.5),
    "wrn22_2": lambda: create_model("wrn22_2", num_classes=7),
    "small_cnn": lambda: create_model("small_cnn", num_classes=7),
}


@pytest.mark.parametrize("name", ZOO)
def test_architectures_become_smaller_and_compute_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = ZOO[name]().eval()
    kill_randomly(model, 0, 0.5)
    small = compacted(model, 2, 3, 64, 64)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    assert after < (0.99 if name == "resnext" else 0.85) * before


def test_the_runtime_computes_the_smaller_network(
    save: Callable[..., Path], kernel_cache: Path, kernels: bindings.Kernels
) -> None:
    torch.manual_seed(0)
    model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=7).eval()
    kill_randomly(model, 0, 0.5)
    images = torch.randn(2, 3, 64, 64)
    small = runtime.compact_channels(model, images)
    nodes = runtime.trace(small)
    assert len(nodes) == len(runtime.trace(model))
    path = save(small, density=1.0)
    for network in (
        runtime.load(path, backend="torch"),
        runtime.load(path, backend="native", tune=False, cache=kernel_cache),
    ):
        with torch.no_grad():
            torch.testing.assert_close(network(images), small(images), rtol=1e-4, atol=1e-5)


def branching(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    return a(x) if x.sum() > 0 else x


def overwritten_elsewhere(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    y = a(x)
    z = y.contiguous()  # the same memory
    F.relu(y, inplace=True)
    return b(z)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (branching, "Net cannot be traced: symbolically traced variables cannot be used"),
        (lambda x, a, b: a(x[:, :2]), r"Net cannot be run: Given groups=1, weight of size \[8, 3"),
        (lambda x, a, b: (a(x), x), "more than one output"),
        (overwritten_elsewhere, "computes something else without its dead channels"),
    ],
)
def test_refusals(forward: Callable[..., Tensor], message: str) -> None:
    model = Net(forward, nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1))
    kill(model.a, 0, bias=-9)
    with pytest.raises(ValueError, match=message) as caught:
        runtime.compact_channels(model, torch.randn(2, 3, 4, 4))
    assert "\n" not in str(caught.value)


def test_weights_that_hooks_compute_are_refused() -> None:
    model = chain(nn.Linear(3, 8), nn.Linear(8, 4))
    nn.utils.prune.random_unstructured(model[0], "weight", 3)
    with pytest.raises(ValueError, match="Sequential cannot be copied: Only Tensors"):
        runtime.compact_channels(model, torch.randn(2, 3))
    nn.utils.prune.remove(model[0], "weight")
    compacted(model, 2, 3)
