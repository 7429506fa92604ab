"""A member of every family of torchvision's classifiers runs, and as in torch."""

from pathlib import Path

import pytest

from benchmarks import coverage

TOLERANCE = 1e-4

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
