"""Graphs and lowering: the same function in fewer layers."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from image_classification.models import create_model
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
    assert sum(layer.relu for layer in layers) == 49
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
        values[layer.name] = F.relu(y) if layer.relu else y
    with torch.no_grad():
        assert torch.allclose(values[layers[-1].name], model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding="same")), "pads with numbers"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), "flattens only what"),
        (nn.Sequential(nn.MaxPool2d(2, ceil_mode=True)), "ceil_mode"),
        (nn.Sequential(nn.BatchNorm2d(3, affine=False)), "BatchNorm without"),
        (nn.Sequential(nn.Sigmoid()), "does not know 0: Sigmoid"),
    ],
)
def test_unknown_operations_are_named(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(model)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "it has 0"),
        ([{"name": "a", "op": "sigmoid", "inputs": ["input"]}], "whose op is 'sigmoid'"),
        ([{"name": "a", "op": "relu", "inputs": ["b"]}], r"'a' .relu. reads .'b',."),
        ([{"nam": "a"}], "a node that is none"),
    ],
)
def test_graphs_that_cannot_run_are_refused(rows: list[dict[str, object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(graph.from_json(rows))
