"""A member of every family of torchvision's classifiers runs, and as in torch."""

from pathlib import Path

import pytest
import torch

from benchmarks import coverage
from sparse import runtime
from sparse.runtime import bindings, integers
from sparse.runtime.network import Network
from tests.sparse.runtime import integer_networks

TOLERANCE = 1e-4
INT8_TOLERANCE = 0.02
"""Of int8 against its reference, besides what it differs from float32: a byte may differ by
one step after a unit of float32, and deep networks amplify this."""
INT8_ERROR = 0.9
"""Of int8 against float32, for random weights and inputs."""

SMALL = {
    "mnasnet0_5": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "efficientnet_b0": 64,
    "densenet121": 64,
    "squeezenet1_0": 64,
    "squeezenet1_1": 64,
    "shufflenet_v2_x0_5": 64,
    "googlenet": 64,
}
LARGE = {
    "resnet18": 64,
    "resnext50_32x4d": 64,
    "alexnet": 224,
    "vgg11": 224,
    "vgg13_bn": 224,
    "inception_v3": 139,
    "efficientnet_v2_s": 96,
    "mobilenet_v3_large": 96,
    "wide_resnet50_2": 96,
    "swin_t": 72,
    "swin_v2_t": 72,
    "maxvit_t": 224,
}


@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        *SMALL.items(),
        *(pytest.param(*found, marks=pytest.mark.slow) for found in LARGE.items()),
    ],
)
def test_a_member_of_every_family_computes_what_torch_computes(
    name: str, image_size: int, tmp_path: Path
) -> None:
    result = coverage.attempt(name, tmp_path, image_size=image_size, num_classes=10)
    assert result.reason == ""
    assert result.error is not None
    assert result.error < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image_size"),
    [*SMALL.items(), *LARGE.items(), ("convnext_tiny", 64), ("vit_b_16", 224)],
)
def test_a_member_of_every_family_is_quantized_and_computes_what_the_reference_computes(
    name: str, image_size: int, kernels: bindings.Kernels, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, size = coverage.build(name, num_classes=10), (3, image_size, image_size)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # heads may be zero
            parameter.data += 0.02 * torch.randn(parameter.shape)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(8, *size))
    path, images = tmp_path / "network", torch.randn(2, *size)
    nodes = runtime.trace(model.eval(), image_size=image_size)
    compact = integer_networks.write_graph(
        path, nodes, model.state_dict(), {}, shape=size, method="minmax"
    )
    wanted = integers.run(compact.integers(), images)
    found = Network(path, threads=1, kernels=kernels, tuner=None)(images)
    with torch.no_grad():
        floats = model(images)
    error, noise = (float((other - wanted).abs().max()) for other in (found, floats))
    assert error <= noise + INT8_TOLERANCE * float(wanted.abs().max())
    assert float((wanted - floats).norm() / floats.norm()) < INT8_ERROR
