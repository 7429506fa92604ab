"""Vision transformers and ConvNeXt: traced with torch.export, executed by the kernels."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import Attention
from torch import Tensor, nn

import sparse
from sparse import runtime
from sparse.runtime import bindings, trace
from sparse.runtime.network import Network
from tests.sparse.runtime import random_transformers
from tests.sparse.runtime.conftest import LEVELS

FEW, MANY = 30, 600
TOLERANCE = 1e-4


def test_random_graphs_equal_torch(libraries: dict[int, Path], tmp_path: Path) -> None:
    kernels = [bindings.Kernels(path) for path in libraries.values()]
    for seed in range(FEW):
        random_transformers.compare(seed, kernels, tmp_path / "network")


@pytest.mark.slow
@pytest.mark.parametrize("num_lanes", LEVELS)
def test_many_random_graphs_equal_torch(
    num_lanes: int, libraries: dict[int, Path], tmp_path: Path
) -> None:
    kernels = [bindings.Kernels(libraries[num_lanes])]
    for seed in range(1000 * num_lanes, 1000 * num_lanes + MANY):
        random_transformers.compare(seed, kernels, tmp_path / "network")


def vit(**options: int) -> nn.Module:
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 20}
    return torchvision.models.VisionTransformer(**sizes, mlp_dim=32, num_classes=7, **options)


def convnext() -> nn.Module:
    block = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([block(8, 16, 2), block(16, None, 1)], num_classes=7)


def timm_vit(**options: object) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return timm.models.VisionTransformer(**sizes, num_classes=7, **options)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": vit,
    "convnext": convnext,
    "timm vit with registers": lambda: timm_vit(
        reg_tokens=3, init_values=0.5, no_embed_class=True, pre_norm=True
    ),
    "timm vit, average": lambda: timm_vit(class_token=False, global_pool="avg", act_layer="silu"),
    "timm convnext": lambda: timm.models.ConvNeXt(
        depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), num_classes=7
    ),
    "timm efficientnet": lambda: timm.models.efficientnet.EfficientNet(
        timm.models._efficientnet_builder.decode_arch_def([["ir_r1_k3_s2_e2_c8_se0.25"]]),
        stem_size=8,
        num_features=16,
        num_classes=7,
    ),
    "timm resnet50d": lambda: timm.create_model("resnet14t", num_classes=7),
}


def draw_(model: nn.Module, sparsity: float = 0.9) -> dict[str, Tensor]:
    """Draw all weights, with random masks at ERK; return the masks."""
    generator = torch.Generator().manual_seed(0)
    projections = [n for n, _ in model.named_parameters() if n.endswith("in_proj_weight")]
    weights = sparse.prunable(model.eval(), include=projections)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    counts = sparse.allocate(shapes, sparsity=sparsity, distribution="erk")
    masks = {}
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    for name, weight in weights.items():
        order = torch.randperm(weight.numel(), generator=generator)
        mask = (order < counts[name]).view_as(weight)
        nn.init.normal_(weight, std=(counts[name] / len(weight) + 1) ** -0.5, generator=generator)
        weight.data *= mask
        masks[name] = mask
    return masks


def export(model: nn.Module, path: Path, *, size: int, sparsity: float = 0.9) -> dict[str, Tensor]:
    masks = draw_(model, sparsity)
    runtime.save(
        path,
        model.state_dict(),
        masks,
        nodes=trace(model, image_size=size),
        arch="some",
        model={},
        image_size=size,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        fold=True,
    )
    return masks


def assert_equal_torch(model: nn.Module, network: Network, images: Tensor) -> None:
    with torch.inference_mode():
        wanted = model(images)
    error = float((network(images) - wanted).abs().max() / wanted.abs().max())
    assert error <= TOLERANCE, error


@pytest.mark.parametrize("name", MODELS)
def test_networks_equal_torch(name: str, kernels: bindings.Kernels, tmp_path: Path) -> None:
    model, path = MODELS[name](), tmp_path / "network"
    export(model, path, size=32)
    images = torch.randn(2, 3, 32, 32)
    for threads in (1, 3):
        network = Network(path, threads=threads, kernels=kernels, tuner=None)
        assert_equal_torch(model, network, images)
        assert_equal_torch(model, network, images[:1])
    assert_equal_torch(model, runtime.load(path, backend="torch"), images)


def test_the_input_projection_of_an_attention_is_stored_sparse(tmp_path: Path) -> None:
    model = vit()
    masks = export(model, tmp_path / "network", size=32)
    compact = runtime.read(tmp_path / "network")
    name = "encoder.layers.encoder_layer_1.self_attention.in_proj_weight"
    assert torch.equal(compact.masks()[name], masks[name])
    assert all(torch.equal(v, compact.state_dict()[n]) for n, v in model.state_dict().items())


def test_a_network_with_a_position_embedding_takes_one_size(
    kernels: bindings.Kernels, tmp_path: Path
) -> None:
    export(vit(), tmp_path / "network", size=32)
    message = "takes one size: 'class_token' is made for a map of 4x4"
    for network in (
        Network(tmp_path / "network", threads=1, kernels=kernels, tuner=None),
        runtime.load(tmp_path / "network", backend="torch"),
    ):
        for size in ((40, 40), (16, 64)):  # the second one has as many tokens
            with pytest.raises(ValueError, match=message) as error:
                network(torch.zeros(3, *size))
            assert "\n" not in str(error.value)


def test_a_convnext_takes_images_of_any_size(kernels: bindings.Kernels, tmp_path: Path) -> None:
    model = convnext()
    export(model, tmp_path / "network", size=32)
    network = Network(tmp_path / "network", threads=1, kernels=kernels, tuner=None)
    assert_equal_torch(model, network, torch.randn(2, 3, 44, 64))


class Sized(nn.Module):
    """Averages a map over windows that depend on its size."""

    def __init__(self, window: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.window = nn.Conv2d(3, 4, 3, padding=1), window

    def forward(self, x: Tensor) -> Tensor:
        return self.window(self.conv(x))


@pytest.mark.parametrize(
    "window",
    [
        lambda x: F.avg_pool2d(x, x.size()[2:]),
        lambda x: F.avg_pool2d(x, x.size(2) // 2),
        lambda x: F.adaptive_avg_pool2d(x, x.shape[2] // 4),
        lambda x: F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False),
    ],
)
def test_what_depends_on_the_size_of_the_images_takes_one_size(
    window: Callable[[Tensor], Tensor], kernels: bindings.Kernels, tmp_path: Path
) -> None:
    model = Sized(window)
    export(model, tmp_path / "network", size=16)
    network = Network(tmp_path / "network", threads=1, kernels=kernels, tuner=None)
    assert_equal_torch(model, network, torch.randn(2, 3, 16, 16))
    with pytest.raises(ValueError, match="takes one size: 'conv2d' is made for a map of 16x16"):
        network(torch.zeros(3, 24, 24))


class Tokens(nn.Module):
    """Applies a layer to the pixels of a small map, as tokens."""

    def __init__(self, layer: Callable[[Tensor], Tensor], channels: int = 12) -> None:
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, channels, 4, 4), layer

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.layer(x).mean(1)


class MultiHead(nn.Module):
    def __init__(self, *, causal: bool = False, crossed: bool = False, **options: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, **options)
        self.causal, self.crossed = causal, crossed

    def forward(self, x: Tensor) -> Tensor:
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
        count = x.shape[1 if self.attention.batch_first else 0]
        mask = torch.ones(count, count).triu(1).bool() if self.causal else None
        other = x.relu() if self.crossed else x
        y = self.attention(x, other, other, need_weights=False, attn_mask=mask)[0]
        return y if self.attention.batch_first else y.transpose(0, 1)


class Shifted(nn.Module):
    """Add a constant that has the shape of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)
        self.constant = torch.randn(1, 3, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.constant)


class Gain(nn.Module):
    """Multiply by one learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def test_attention_is_one_operation_however_it_is_written() -> None:
    for layer in (
        MultiHead(batch_first=True),
        MultiHead(batch_first=False),
        Attention(12, 3, qkv_bias=True),
    ):
        nodes = trace(Tokens(layer).eval(), image_size=16)
        ops = [node.op for node in nodes]
        assert ops == ["conv", "pixel_linear", "attention", "pixel_linear", "mean_pool"]
        assert nodes[2].heads == 3
        assert nodes[2].score_scale == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Mish(), "does not know layer: Mish .aten.mish"),
        (nn.LayerNorm((16, 12)), "layer: LayerNorm .*normalizes other numbers"),
        (nn.Sequential(nn.Linear(12, 4), nn.Softmax(2)), "does not know layer.1: Softmax"),
        (
            MultiHead(causal=True, batch_first=True),
            "layer.attention: MultiheadAttention .*scaled_dot.*mask",
        ),
        (MultiHead(crossed=True, batch_first=True), "layer.attention: MultiheadAttention"),
        (Attention(12, 3, qk_norm=True, norm_layer=nn.LayerNorm), "layer.q_norm: LayerNorm"),
        (nn.Conv1d(16, 16, 1), "does not know layer: Conv1d .aten.conv1d"),
        (Gain(), "does not know layer: Gain .aten.mul"),
    ],
)
def test_what_the_runtime_has_not_is_named_with_its_module(layer: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        trace(Tokens(layer).eval(), image_size=16)
    assert "\n" not in str(error.value)


def test_a_constant_is_not_taken_for_the_images() -> None:
    with pytest.raises(ValueError, match=r"the runtime does not know .*constant"):
        trace(Shifted(), image_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_b_16", "convnext_tiny"])
def test_networks_of_torchvision_equal_torch(
    name: str, kernels: bindings.Kernels, tmp_path: Path
) -> None:
    check_large(torchvision.models.get_model(name), kernels, tmp_path / "network")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("resnet50d", "convnext_tiny", "vit_base_patch16_224", "vit_small_patch16_224"),
        *("efficientnet_b0", "mobilenetv3_large_100"),
    ],
)
def test_networks_of_timm_equal_torch(name: str, kernels: bindings.Kernels, tmp_path: Path) -> None:
    check_large(timm.create_model(name), kernels, tmp_path / "network")


def check_large(model: nn.Module, kernels: bindings.Kernels, path: Path) -> None:
    export(model, path, size=224)
    network = Network(path, threads=1, kernels=kernels, tuner=None)
    assert_equal_torch(model, network, torch.randn(2, 3, 224, 224))


def test_transformers_are_traced_after_a_training_in_exact_float32() -> None:
    part = torch.backends.cudnn.conv
    before = part.fp32_precision
    part.fp32_precision = "ieee"  # as the trainer does without --tf32
    try:
        assert trace(vit(), image_size=32)
        assert part.fp32_precision == "ieee"
    finally:
        part.fp32_precision = before
