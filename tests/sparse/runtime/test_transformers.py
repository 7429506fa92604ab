"""Vision transformers and ConvNeXt: traced with torch.export, executed by the kernels."""

import math
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
from sparse.runtime import bindings, graph, trace
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


def swin(*, is_v2: bool = False) -> nn.Module:
    found = torchvision.models.swin_transformer
    options = {"depths": [2, 1], "num_heads": [2, 3], "window_size": [3, 4]}
    if is_v2:
        options |= {"block": found.SwinTransformerBlockV2, "downsample_layer": found.PatchMergingV2}
    return found.SwinTransformer([4, 4], embed_dim=12, num_classes=7, **options)


def maxvit() -> nn.Module:
    sizes = {"input_size": (32, 32), "stem_channels": 8, "partition_size": 2, "head_dim": 4}
    return torchvision.models.MaxVit(
        block_channels=[8, 12], block_layers=[1, 1], stochastic_depth_prob=0, num_classes=7, **sizes
    )


def timm_vit(**options: object) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return timm.models.VisionTransformer(**sizes, num_classes=7, **options)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": vit,
    "convnext": convnext,
    "swin": swin,
    "swin v2": lambda: swin(is_v2=True),
    "maxvit": maxvit,
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


def test_a_network_with_position_biases_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = swin(is_v2=True)
    export(model, tmp_path / "network", size=32)
    found = runtime.read(tmp_path / "network").state_dict()
    assert found.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_the_graph_of_a_network_in_half_precision_is_that_of_its_float32() -> None:
    model = vit()
    graph_of_float = trace(model, image_size=32)
    assert trace(model.half(), image_size=32) == graph_of_float


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


ONES = torch.ones(1, 4, 1, 4, 4)


class Windowed(nn.Module):
    """Attends in windows of 2 x 2 of a map of 4 x 4, with all products written out."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor], *, shift: int = 0) -> None:
        super().__init__()
        self.qkv, self.own = nn.Linear(12, 36), nn.Parameter(torch.randn(3, 4, 4))
        self.change, self.shift = change, shift

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1).roll((-self.shift,) * 2, (1, 2))
        x = x.reshape(-1, 2, 2, 2, 2, 12).transpose(2, 3).reshape(-1, 4, 12)
        q, k, v = self.qkv(x).reshape(-1, 4, 3, 3, 4).permute(2, 0, 3, 1, 4)
        x = self.change(q @ (k * 0.5).mT, self.own) @ v
        x = x.transpose(1, 2).reshape(-1, 2, 2, 2, 2, 12).transpose(2, 3).reshape(-1, 4, 4, 12)
        return x.roll((self.shift,) * 2, (1, 2)).mean((1, 2))


def trace_windowed(
    change: Callable[[Tensor, Tensor], Tensor], *, shift: int = 0
) -> list[graph.Node]:
    model = nn.Sequential(nn.Conv2d(3, 12, 4, 4), Windowed(change, shift=shift))
    return trace(model.eval(), image_size=16)


def test_windows_are_no_operations() -> None:
    nodes = trace_windowed(lambda scores, own: scores.softmax(-1))
    assert [node.op for node in nodes] == ["conv", "pixel_linear", "attention", "mean_pool"]
    assert (nodes[2].window, nodes[2].score_scale, nodes[2].heads) == ((2, 2), 0.5, 3)
    assert {node.op for node in trace(maxvit().eval(), image_size=32)}.isdisjoint(
        ("slice", "concat")
    )


@pytest.mark.parametrize(
    ("change", "shift", "message"),
    [
        (lambda scores, own: scores.softmax(-1), 1, "shifted, and pixels .* not masked"),
        (lambda scores, own: scores.softmax(-2), 0, "no softmax of an attention's scores"),
        (lambda scores, own: scores, 0, "other numbers than the shares of a softmax"),
        (lambda scores, own: (scores + 1).softmax(-1), 0, "1: Windowed .aten.add"),
        (lambda scores, own: (scores + own).softmax(-1), 0, "position bias .* is not known"),
        (lambda scores, own: (scores * own).softmax(-1), 0, "other weights than a logit_scale"),
        (lambda scores, own: (scores + ONES[0, 0]).softmax(-1), 0, "mask that it adds is not"),
        (lambda scores, own: (scores.unflatten(0, (-1, 4)) + ONES).flatten(0, 1).softmax(-1), 1,
         "no mask of shifted windows"),
    ],
)  # fmt: skip
def test_windows_that_the_runtime_has_not_are_refused(
    change: Callable[[Tensor, Tensor], Tensor], shift: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        trace_windowed(change, shift=shift)
    assert "\n" not in str(error.value)


class Cosine(nn.Module):
    """Attends by cosines, over the tokens of a map of 4 x 4, as Swin v2 does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.width = nn.Linear(12, 36), width
        self.logit_scale = nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.qkv(x.flatten(2).mT).reshape(-1, 16, 3, 12 // self.width, self.width)
        q, k, v = (part.reshape(-1, 16, 3, 4).transpose(1, 2) for part in self.normalized(x))
        scores = (q @ k.mT) * self.logit_scale.clamp(max=math.log(100)).exp()
        return (scores.softmax(-1) @ v).mean(2).flatten(1)

    def normalized(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = x.unbind(2)
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v


@pytest.mark.parametrize("width", [2, 4, 12])
def test_cosines_are_those_of_heads(width: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 4, 4), Cosine(width)).eval()
    if width == 4:
        nodes = trace(model, image_size=16)
        assert [node.op for node in nodes] == ["conv", "pixel_linear", "attention", "mean_pool"]
        assert nodes[2].cosine
        return
    with pytest.raises(ValueError, match=r"1: Cosine .*normalized otherwise than by head"):
        trace(model, image_size=16)


def test_a_constant_is_not_taken_for_the_images() -> None:
    with pytest.raises(ValueError, match=r"the runtime does not know .*constant"):
        trace(Shifted(), image_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_b_16", "convnext_tiny", "swin_t", "swin_v2_t", "maxvit_t"])
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
