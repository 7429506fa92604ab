"""Every kernel against torch, over random geometries and densities."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse.runtime import bindings, trace
from sparse.runtime.execution_plan import Choice, ExecutionPlan, dense_choices
from sparse.runtime.graph import ACTIVATIONS
from sparse.runtime.lower import lower
from sparse.runtime.network import Program
from sparse.runtime.tables import DENSE_CHANNELS

TOLERANCE = 1e-4

MODULES = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "sigmoid": nn.Sigmoid(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "tanh": nn.Tanh(),
}

FEW = settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert torch.isfinite(found).all()
    error = float((found - wanted).abs().max())
    assert error <= TOLERANCE * max(1e-3, float(wanted.abs().max())), error


def run(
    model: nn.Module,
    images: Tensor,
    kernels: bindings.Kernels,
    *,
    threads: int = 1,
    choice: Choice | None = None,
) -> Tensor:
    """Return what the kernels compute for a model; `choice` is used for all convolutions."""
    nodes = trace(model.eval())
    layers = lower(nodes, model.state_dict(), in_channels=images.shape[1])
    size = tuple(images.shape[1:])
    plan = ExecutionPlan(layers, size, lanes=kernels.num_lanes, num_parts=threads)
    for operation in plan.convolutions():
        if choice is not None and choice.dense:
            dense = dense_choices(operation)
            plan.choose(operation, choice if choice in dense else (dense or [Choice()])[0])
        elif choice is not None:
            plan.choose(operation, choice)
    return Program(plan, kernels, threads).run(images)


class Convolution(nn.Module):
    """A convolution and, on request, what the runtime fuses into it."""

    def __init__(self, *, relu: bool, add: bool, **options: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(**options)
        self.other = nn.Conv2d(**options) if add else None
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.other is not None:
            y = self.other(x) + y
        return self.relu(y)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Convolution, Tensor]:
    """Draw a convolution and an image that it fits."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    per_group, out_per_group = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (2, 3), (5, 1), (7, 7)]))
    dilation = draw(st.sampled_from([1, 1, 2]))
    padding = (draw(st.integers(0, 4)), draw(st.integers(0, 4)))
    least = [1 + dilation * (k - 1) - 2 * p for k, p in zip(kernel, padding, strict=True)]
    height = draw(st.integers(max(1, least[0]), 20))
    width = draw(st.integers(max(1, least[1]), 40))
    torch.manual_seed(draw(st.integers(0, 99)))
    model = Convolution(
        relu=draw(st.booleans()),
        add=draw(st.booleans()),
        in_channels=groups * per_group,
        out_channels=groups * out_per_group,
        kernel_size=kernel,
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
    )
    weight = model.conv.weight.data
    density = draw(st.sampled_from([0.0, 0.02, 0.2, 0.5, 1.0]))
    weight[torch.rand(weight.shape) >= density] = 0
    if draw(st.booleans()):
        weight[0] = 0  # an output channel without connections
    return model, torch.randn(groups * per_group, height, width)


@given(case=convolutions(), threads=st.sampled_from([1, 1, 2]), data=st.data())
@FEW
def test_convolutions_equal_torch(
    each_kernels: bindings.Kernels,
    case: tuple[Convolution, Tensor],
    threads: int,
    data: st.DataObject,
) -> None:
    model, image = case
    # several channels share their inputs only where rows are read without a stride
    strided = model.conv.stride[1] > 1
    group = 1 if strided else data.draw(st.sampled_from(sorted(each_kernels.max_tiles)))
    most = each_kernels.max_tiles[group]
    rows = 1 if model.conv.stride[1] > 2 else data.draw(st.integers(1, min(7, most)))
    sparse = Choice(
        group=group,
        tile_rows=rows,
        tile_vectors=data.draw(st.integers(1, min(8, most // rows))),
        num_blocks=data.draw(st.sampled_from([1, 2, 3, 9])),
    )
    dense = Choice(dense=True, tile_rows=data.draw(st.sampled_from([1, 2])))
    choice = data.draw(st.sampled_from([sparse, dense]))
    with torch.no_grad():
        wanted = model(image[None])
    assert_close(run(model, image[None], each_kernels, threads=threads, choice=choice), wanted)


@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    size=st.tuples(st.integers(5, 33), st.integers(5, 33)),
    offset=st.sampled_from([-5.0, 0.0]),
    ceil_mode=st.booleans(),
)
@FEW
def test_max_pooling_equals_torch(
    each_kernels: bindings.Kernels,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    size: tuple[int, int],
    offset: float,
    ceil_mode: bool,
) -> None:
    images = torch.randn(2, 3, *size) + offset  # with negative maxima the padding must not win
    padding = (min(padding[0], kernel[0] // 2), min(padding[1], kernel[1] // 2))
    model = nn.Sequential(nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil_mode))
    assert torch.equal(run(model, images, each_kernels), model(images))


def test_max_pooling_keeps_a_nan(kernels: bindings.Kernels) -> None:
    images = torch.randn(1, 1, 8, 8)
    images[0, 0, 3, 4] = torch.nan
    model = nn.Sequential(nn.MaxPool2d(3, 1, 1))
    found, wanted = run(model, images, kernels), model(images)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert int(found.isnan().sum()) == 9


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 8, 3, stride=2),
        nn.Conv2d(3, 8, 2, stride=2),
        nn.Conv2d(3, 8, (3, 1), stride=(3, 1)),
        nn.Conv2d(3, 6, 1, stride=4, groups=3),
        nn.Conv2d(3, 8, 5),
        nn.AvgPool2d(2),
        nn.MaxPool2d(2),
    ],
    ids=str,
)
def test_rows_that_a_layer_leaves_over_are_zero_for_the_next(
    each_kernels: bindings.Kernels, layer: nn.Module
) -> None:
    channels = getattr(layer, "out_channels", 3)
    model = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(channels, 8, 3, padding=1))
    for size in ((32, 32), (33, 33), (33, 56), (7, 65)):
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            wanted = model(images)
        assert_close(run(model, images, each_kernels), wanted)


@given(
    channels=st.integers(1, 20),
    classes=st.integers(1, 20),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    threads=st.sampled_from([1, 2]),
)
@FEW
def test_pooled_classifiers_equal_torch(
    each_kernels: bindings.Kernels,
    channels: int,
    classes: int,
    density: float,
    size: tuple[int, int],
    threads: int,
) -> None:
    model = nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(1),
        nn.Linear(channels, channels),
        nn.ReLU(),
        nn.Linear(channels, classes),
    )
    for layer in (model[2], model[4]):
        layer.weight.data[torch.rand(layer.weight.shape) >= density] = 0
    images = torch.randn(3, channels, *size)
    with torch.no_grad():
        wanted = model(images)
    assert_close(run(model, images, each_kernels, threads=threads), wanted)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_as_exact_as_those_of_torch(
    name: str, each_kernels: bindings.Kernels
) -> None:
    model, function = nn.Sequential(MODULES[name]), MODULES[name]
    values = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-1e4, -100, 0, 100, 1e4])])
    images = values.reshape(1, 1, 2, -1)
    wanted = function(images.double())
    error = (run(model, images, each_kernels) - wanted).abs()
    assert float((error / images.abs().clamp(min=1)).max()) < 5e-7
    vectors = nn.Sequential(nn.AdaptiveAvgPool2d(1), MODULES[name], nn.Flatten())
    images = values.reshape(1, -1, 1, 1)
    error = (run(vectors, images, each_kernels) - function(images.double()).flatten(1)).abs()
    assert float((error / images.flatten(1).abs().clamp(min=1)).max()) < 5e-7


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dense", [False, True])
def test_what_lies_outside_the_image_stays_zero_after_an_activation(
    name: str, dense: bool, each_kernels: bindings.Kernels
) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), MODULES[name], nn.Conv2d(5, 4, 3, padding=1)
    )
    images = torch.randn(1, 3, 9, 19)
    choice = Choice(dense=True, tile_rows=2) if dense else Choice(group=2, tile_rows=2)
    with torch.no_grad():
        assert_close(run(model, images, each_kernels, choice=choice), model(images))


def test_a_nan_is_not_hidden_by_relu(kernels: bindings.Kernels) -> None:
    model = Convolution(relu=True, add=False, in_channels=1, out_channels=4, kernel_size=1)
    images = torch.zeros(1, 1, 8, 8)
    images[0, 0, 3, 4] = torch.nan
    for dense in (False, True):
        found = run(model, images, kernels, choice=Choice(dense=dense))
        assert torch.equal(found.isnan(), images.isnan().expand(1, 4, 8, 8))


def test_channels_beyond_a_group_of_the_dense_kernel_stay_untouched(
    kernels: bindings.Kernels,
) -> None:
    for channels in range(1, 2 * DENSE_CHANNELS):
        model = nn.Sequential(nn.Conv2d(2, channels, 3, padding=1), nn.Conv2d(channels, 3, 1))
        images = torch.randn(1, 2, 9, 9)
        with torch.no_grad():
            wanted = model(images)
        assert_close(run(model, images, kernels, choice=Choice(dense=True)), wanted)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 1), (6, 1), (5, 2), (7, 2), (9, 2)])
def test_rows_computed_in_pairs_equal_torch(
    each_kernels: bindings.Kernels, kernel: int, stride: int
) -> None:
    model = Convolution(
        relu=True,
        add=True,
        in_channels=3,
        out_channels=6,
        kernel_size=kernel,
        stride=stride,
        padding=kernel // 2,
    )
    for height in range(2 * stride, 9 * stride):
        images = torch.randn(1, 3, height, 20)
        with torch.no_grad():
            wanted = model(images)
        for threads in (1, 2):
            choice = Choice(dense=True, tile_rows=2)
            found = run(model, images, each_kernels, threads=threads, choice=choice)
            assert_close(found, wanted)


def test_an_image_without_output_is_refused(kernels: bindings.Kernels) -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 5))
    with pytest.raises(ValueError, match=r"images of 4x9 are too small .* after layer '_0'"):
        run(model, torch.zeros(1, 1, 4, 9), kernels)
