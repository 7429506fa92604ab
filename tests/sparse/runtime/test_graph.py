"""Graphs and lowering: the same function in fewer layers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from image_classification.models import create_model
from sparse import runtime
from sparse.runtime import graph, trace
from sparse.runtime.check import check
from sparse.runtime.lower import lower
from tests.sparse.runtime.conftest import prune_


@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d", "mobilenet_v1", "wrn22_2"])
def test_a_graph_computes_what_the_model_computes(arch: str) -> None:
    model = create_model(arch, num_classes=7).eval()
    prune_(model, 0.5)
    nodes = graph.from_json(json.loads(json.dumps(graph.to_json(trace(model)))))
    assert nodes == trace(model)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(graph.run(nodes, model.state_dict(), images), model(images))


def test_a_bottleneck_network_becomes_convolutions_pools_and_one_classifier() -> None:
    model = create_model("resnet50", num_classes=7).eval()
    layers = lower(trace(model), model.state_dict(), in_channels=3)
    assert [layer.kind for layer in layers] == ["conv", "max_pool", *["conv"] * 52, *TAIL]
    assert sum(layer.residual is not None for layer in layers) == 16
    assert sum(layer.activation == "relu" for layer in layers) == 49
    assert {layer.groups for layer in layers} == {1}


TAIL = ("mean_pool", "linear")


def test_folding_leaves_the_tensors_of_the_model_as_they_are() -> None:
    model = create_model("resnet18", num_classes=7).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lower(trace(model), model.state_dict(), in_channels=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Odd(nn.Module):
    """Things that cannot be folded: a value read twice, a sum with itself, an early ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = self.norm(x) + F.relu(x)
        y = y + y
        return self.pool(F.relu(self.other(y)) + x.relu())


def test_what_cannot_be_folded_becomes_a_depthwise_convolution() -> None:
    model = Odd().eval()
    prune_(model, 1.0)
    nodes = trace(model)
    layers = lower(nodes, model.state_dict(), in_channels=3)
    assert {layer.kind for layer in layers} == {"conv"}
    assert sum(layer.groups == 4 for layer in layers) == len(layers) - 1
    images, values = torch.randn(2, 3, 8, 8), {}
    values[graph.INPUT] = images
    for layer in layers:
        y = F.conv2d(
            values[layer.source],
            torch.from_numpy(layer.weight),
            torch.from_numpy(layer.bias),
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )
        if layer.residual is not None:
            y = y + values[layer.residual]
        values[layer.name] = F.relu(y) if layer.activation else y
    with torch.no_grad():
        assert torch.allclose(values[layers[-1].name], model(images), rtol=1e-4, atol=1e-5)


class Applied(nn.Module):
    """Applies a function to a module's value."""

    def __init__(self, function: Callable[[Tensor, Tensor], object], *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.modules_ = function, nn.Sequential(*modules)

    def forward(self, x: Tensor) -> object:
        return self.function(x, self.modules_(x))


CONV = nn.Conv2d(3, 4, 1)
POOL = nn.AdaptiveAvgPool2d(1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding="same")), "pads with numbers"),
        (
            nn.Sequential(CONV, nn.Flatten()),
            "needs .N, C, H, W. or .N, C., but _1 is .N, C . H . W.",
        ),
        (nn.Sequential(nn.MaxPool2d(2, dilation=2)), "max-pooling with dilation"),
        (nn.Sequential(nn.AvgPool2d(2, ceil_mode=True)), "average-pooling with options"),
        (nn.Sequential(nn.MaxPool2d(2, return_indices=True)), "return_indices"),
        (nn.Sequential(nn.BatchNorm2d(3, affine=False)), "BatchNorm without"),
        (nn.Sequential(nn.Softplus()), "does not know 0: Softplus"),
        (nn.Sequential(nn.Identity()), "it has 0"),
        (nn.Sequential(nn.AvgPool2d(3, padding=(1, 2))), "more than half of the kernel"),
        (nn.Sequential(nn.Conv2d(3, 4, 1, padding=2000)), "more than 1024 pixels"),
        # what has been averaged
        (nn.Sequential(POOL, CONV), "_1 keeps a height and a width of 1: flatten it"),
        (nn.Sequential(POOL, nn.SiLU()), "_1 keeps a height and a width of 1: flatten it"),
        (nn.Sequential(POOL), "flatten it"),
        (Applied(lambda x, y: x + y, nn.Conv2d(3, 3, 1), POOL), "flatten it"),
        (Applied(lambda x, y: y.mean([2, 3], keepdim=True), CONV), "flatten it"),
        (Applied(lambda x, y: y.mean([2, 3]) + y.mean([2, 3]), CONV), "no add of vectors"),
        (nn.Sequential(CONV, nn.Linear(8, 4)), "no linear layer of images"),
        (nn.Sequential(POOL, nn.Conv2d(3, 4, 3, padding=1), nn.Flatten()), "only plain 1x1 conv"),
        (nn.Sequential(POOL, nn.MaxPool2d(1), nn.Flatten()), "flatten it"),
        # arguments that are none, or depend on the image
        (Applied(lambda x, y: y.mean(x.size(2)), CONV), "does not know .*mean"),
        (Applied(lambda x, y: F.dropout(y, 0.5), CONV), "does not know .*dropout"),
        # channels
        (Applied(lambda x, y: y.chunk(2, 1), CONV), "more than one output"),
        (Applied(lambda x, y: y.chunk(2, 1)[:1], CONV), "does not know .*getitem"),
        (Applied(lambda x, y: y.chunk(x.size(2), 1)[0], CONV), "does not know .*chunk"),
        (Applied(lambda x, y: y.chunk(3, 1)[0], CONV), "reads 4 channels, .* not 3 equal groups"),
        (Applied(lambda x, y: y.chunk(2, 0)[0], CONV), "does not know .*chunk"),
        (Applied(lambda x, y: y.view(1, -1), CONV), "does not know .*view"),
        (Applied(lambda x, y: F.channel_shuffle(y, 3), CONV), "not 3 equal groups"),
        (Applied(lambda x, y: torch.cat((x, y), 2), CONV), "does not know .*cat"),
        (Applied(lambda x, y: torch.cat((y, y)), CONV), "does not know .*cat"),
        (Applied(lambda x, y: torch.cat((x, y), 1), POOL), "flatten it"),
        (Applied(lambda x, y: y.chunk(2, 1)[0].relu_() + y.chunk(2, 1)[1], CONV), "overwrites"),
        # products
        (Applied(lambda x, y: x * y, nn.Conv2d(3, 3, 1)), "multiplies maps only by what was av"),
        (Applied(lambda x, y: y * y, POOL), "multiplies maps only by what was averaged"),
        (Applied(lambda x, y: x * 2, POOL), "does not know .*mul"),
        (Applied(lambda x, y: x * y, nn.Sequential(POOL, CONV)), "reads values of 3 and 4 chan"),
        # sums
        (Applied(lambda x, y: x + y, CONV), "'add' reads values of 3 and 4 channels"),
        (Applied(lambda x, y: torch.add(x, y, alpha=2), nn.ReLU()), "does not know .*alpha"),
        (Applied(lambda x, y: x + 1, CONV), "does not know"),
        # channels
        (nn.Sequential(CONV, nn.Conv2d(3, 4, 1)), "'1.weight' is .4, 3, 1, 1., the graph needs"),
        (nn.Sequential(CONV, nn.BatchNorm2d(3)), "'1.weight' is .3,., the graph needs .4,."),
        (nn.Sequential(POOL, nn.Flatten(), nn.Linear(3, 4), nn.Linear(5, 4)), "'3.weight' is"),
        (nn.Sequential(weight_norm(nn.Conv2d(3, 4, 1))), "0 is parametrized: .*remove_param"),
        (Applied(lambda x, y: (x, y), CONV), "more than one output"),
        (Applied(lambda x, y: {"a": y}, CONV), "more than one output"),
    ],
)
def test_unknown_operations_are_named(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        trace(model)
    assert "\n" not in str(error.value)


def test_what_is_not_read_is_left_out() -> None:
    def head(x: Tensor, y: Tensor) -> Tensor:
        x.relu().mean((2, 3))  # an auxiliary head, whose value nobody uses
        return y

    model = Applied(head, nn.Conv2d(3, 4, 1), nn.ReLU())
    assert [node.op for node in trace(model)] == ["conv", "relu"]


@pytest.mark.parametrize("inplace", [True, False])
def test_what_is_changed_in_place_is_changed_for_all_who_read_it_later(inplace: bool) -> None:
    first = nn.Conv2d(3, 4, 1)
    for change in (
        nn.ReLU(inplace),
        lambda y: F.relu(y, inplace),
        lambda y: F.relu(y, inplace=inplace),
    ):

        def total(x: Tensor, y: Tensor, change: Callable[[Tensor], Tensor] = change) -> Tensor:
            before = y + y
            after = change(y)
            return (y + after) + before

        model = Applied(total, first, nn.Identity())
        if isinstance(change, nn.Module):
            model.add_module("change", change)
        images = torch.randn(2, 3, 5, 5)
        with torch.no_grad():
            found = graph.run(trace(model), model.state_dict(), images)
            assert torch.allclose(found, model(images))


def test_a_shared_layer_is_not_folded_twice(tmp_path: Path) -> None:
    conv, norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), conv, nn.BatchNorm2d(4), conv, norm, nn.ReLU(), norm)
    model.eval()
    prune_(model, 1.0)
    path = tmp_path / "network"
    header = {"arch": "", "model": {}, "image_size": 8, "mean": (0,) * 3, "std": (1,) * 3}
    runtime.save(path, model.state_dict(), {}, nodes=trace(model), fold=True, **header)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        wanted = model(images)
    assert torch.allclose(runtime.load(path, backend="torch")(images), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "it has 0"),
        ([{"name": "a", "op": "softplus", "inputs": ["input"]}], "whose op is 'softplus'"),
        ([{"name": "a", "op": "relu", "inputs": ["b"]}], r"'a' .relu. reads .'b',."),
        ([{"nam": "a"}], "a node that is none"),
    ],
)
def test_graphs_that_cannot_run_are_refused(rows: list[dict[str, object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(graph.from_json(rows))
