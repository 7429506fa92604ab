"""Models by name: shapes, counts, initialization, options, and what training asks of them."""

import math

import pytest
import torch
import torchvision
from torch import nn

from image_classification.models import create_model, default_image_size, names

OWN = ["mobilenet_v1", "wrn22_2", "small_cnn"]

# The smallest of each of torchvision's families.
SMALLEST = """alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet
    inception_v3 maxvit_t mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf
    resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11
    vgg11_bn vit_b_16 wide_resnet50_2""".split()

# The kernels of the MobileNet-v1 that the RigL results were trained with, in traversal order:
# conv1, (depthwise, pointwise) of 13 blocks, fc.
MOBILENET_KERNELS = [
    (32, 3, 3, 3),
    *[
        shape
        for channels_in, channels_out in [
            (32, 64),
            (64, 128),
            (128, 128),
            (128, 256),
            (256, 256),
            (256, 512),
            *[(512, 512)] * 5,
            (512, 1024),
            (1024, 1024),
        ]
        for shape in [(channels_in, 1, 3, 3), (channels_out, channels_in, 1, 1)]
    ],
    (1000, 1024),
]


def meta(arch: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return create_model(arch, **options)


def _check_on_meta(arch: str) -> None:
    model = meta(arch, num_classes=7)
    assert all(p.is_meta for p in model.parameters())
    assert all(b.is_meta for b in model.buffers())
    size = default_image_size(arch)
    logits = model.eval()(torch.empty(2, 3, size, size, device="meta"))
    assert logits.shape == (2, 7)
    # a checkpoint tells the number of classes by its last entry
    *_, last = model.state_dict().values()
    assert len(last) == 7


def kernels(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


class TestArchitectures:
    def test_mobilenet_has_the_published_kernels(self) -> None:
        model = meta("mobilenet_v1")
        layers = kernels(model)
        assert [tuple(weight.shape) for weight in layers.values()] == MOBILENET_KERNELS
        assert sum(weight.numel() for weight in layers.values()) == 4_209_088
        assert list(layers)[:3] == ["conv1", "blocks.0.dw", "blocks.0.pw"]
        strides = [model.conv1.stride[0], *(block.dw.stride[0] for block in model.blocks)]
        assert strides == [2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]

    def test_mobilenet_width_scales_channels(self) -> None:
        layers = kernels(meta("mobilenet_v1", width=0.25, num_classes=7))
        assert layers["conv1"].shape == (8, 3, 3, 3)
        assert layers["blocks.12.pw"].shape == (256, 256, 1, 1)
        assert layers["fc"].shape == (7, 256)
        # 32 * 0.4 = 12.8 is nearer to 16 than to 8, and 8 is the least
        assert kernels(meta("mobilenet_v1", width=0.4))["conv1"].shape[0] == 16
        assert kernels(meta("mobilenet_v1", width=0.01))["blocks.0.pw"].shape[:2] == (8, 8)

    def test_resnet50_is_v1_5_with_the_published_size(self) -> None:
        model = meta("resnet50")
        assert sum(p.numel() for p in model.parameters()) == 25_557_032
        assert sum(weight.numel() for weight in kernels(model).values()) == 25_502_912
        assert model.layer2[0].conv1.stride == (1, 1)
        assert model.layer2[0].conv2.stride == (2, 2)

    def test_wrn22_2_has_22_convolutions_of_the_published_widths(self) -> None:
        model = meta("wrn22_2", num_classes=10)
        layers = kernels(model)
        shortcuts = [name for name in layers if "shortcut" in name]
        assert len(layers) - 1 == 22  # besides fc
        assert shortcuts == [f"layer{i}.0.shortcut" for i in (1, 2, 3)]
        widths = {
            name: layers[f"{name}.0.conv1"].shape[0] for name in ("layer1", "layer2", "layer3")
        }
        assert widths == {"layer1": 32, "layer2": 64, "layer3": 128}
        # per stage: 9 (in out + 5 out^2) + in out, besides 432 for conv1 and 1280 for fc
        stages = sum(10 * i * o + 9 * 5 * o * o for i, o in [(16, 32), (32, 64), (64, 128)])
        assert sum(weight.numel() for weight in layers.values()) == 432 + stages + 1280

    def test_pre_activation_block_adds_to_an_untouched_input(self) -> None:
        torch.manual_seed(0)
        model = create_model("wrn22_2").eval()
        block = model.layer1[1]
        nn.init.zeros_(block.conv2.weight)
        images = torch.randn(2, 32, 8, 8)
        assert torch.equal(block(images.clone()), images)

    def test_small_cnn_size(self) -> None:
        layers = kernels(meta("small_cnn", num_classes=10))
        assert sum(weight.numel() for weight in layers.values()) == 131_168
        assert len(layers) == 5

    @pytest.mark.parametrize("arch", [*OWN, *SMALLEST])
    def test_one_of_each_family_builds_without_memory_at_its_size(self, arch: str) -> None:
        _check_on_meta(arch)

    @pytest.mark.slow
    @pytest.mark.parametrize("arch", sorted({*names()} - {*OWN, *SMALLEST}))
    def test_all_others_build_without_memory_at_their_size(self, arch: str) -> None:
        _check_on_meta(arch)

    def test_single_output_in_training(self) -> None:
        for arch in ("inception_v3", "googlenet"):
            logits = meta(arch).train()(torch.empty(2, 3, 299, 299, device="meta"))
            assert logits.shape == (2, 1000)

    @pytest.mark.parametrize(
        ("arch", "size"),
        [("resnet50", 224), ("inception_v3", 299), ("vit_h_14", 224), ("wrn22_2", 32)],
    )
    def test_default_image_size(self, arch: str, size: int) -> None:
        assert default_image_size(arch) == size


class TestTraining:
    # At 0.05 mobilenet_v1 diverges or not by seed and rounding: BatchNorm sees eight images.
    @pytest.mark.parametrize(
        ("arch", "size", "lr"),
        [
            ("mobilenet_v1", 32, 0.01),
            ("wrn22_2", 32, 0.05),
            ("small_cnn", 32, 0.05),
            ("small_cnn", 8, 0.05),
        ],
    )
    def test_learns_a_batch_in_channels_last(self, arch: str, size: int, lr: float) -> None:
        torch.manual_seed(0)
        model = create_model(arch, num_classes=4).to(memory_format=torch.channels_last)
        images = torch.randn(8, 3, size, size).to(memory_format=torch.channels_last)
        labels = torch.arange(8) % 4
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        losses = []
        for _ in range(15):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert all(p.grad is not None for p in model.parameters())
        assert losses[-1] < losses[0] / 2

    @pytest.mark.parametrize("arch", OWN)
    def test_channels_last_gives_the_same_logits(self, arch: str) -> None:
        torch.manual_seed(0)
        model = create_model(arch, num_classes=4).eval()
        images = torch.randn(2, 3, 32, 32)
        plain = model(images)
        model.to(memory_format=torch.channels_last)
        with torch.no_grad():
            other = model(images.to(memory_format=torch.channels_last))
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("arch", OWN)
    def test_traces_into_one_graph(self, arch: str) -> None:
        torch.manual_seed(0)
        model = create_model(arch, num_classes=4).eval()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(compiled(images), model(images))
        torch.compiler.reset()


class TestInitialization:
    def test_mobilenet_default(self) -> None:
        torch.manual_seed(0)
        model = create_model("mobilenet_v1")
        for weight in (model.blocks[11].pw.weight, model.fc.weight):
            fan_in = weight[0].numel()
            assert weight.std().item() * math.sqrt(fan_in) == pytest.approx(1, abs=0.01)
            # cut at two deviations of the uncut distribution
            cut = 2 / 0.87962566 / math.sqrt(fan_in)
            assert 0.99 * cut < weight.abs().max().item() <= cut
        depthwise = model.blocks[12].dw.weight
        bound = math.sqrt(6 / (9 + 9 * 1024))
        assert 0.99 * bound < depthwise.abs().max().item() <= bound
        assert model.fc.bias.count_nonzero() == 0
        assert all((bn.weight == 1).all() for bn in _batchnorms(model))

    @pytest.mark.parametrize("arch", ["resnet18", "wrn22_2", "mobilenet_v1"])
    @pytest.mark.parametrize(("init", "dimension"), [("fanin", 1), ("classic", 0)])
    def test_nvidia_options(self, arch: str, init: str, dimension: int) -> None:
        torch.manual_seed(0)
        model = create_model(arch, init=init)
        last = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1][-1].weight
        fan = last.shape[dimension] * last[0, 0].numel()
        assert last.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.02)
        first = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight
        fan = first.shape[dimension] * first[0, 0].numel()
        assert first.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.1)
        assert all((bn.weight == 1).all() and (bn.bias == 0).all() for bn in _batchnorms(model))

    @pytest.mark.parametrize(("arch", "last"), [("resnet18", "bn2"), ("resnet50", "bn3")])
    @pytest.mark.parametrize("init", ["torchvision", "fanin"])
    def test_zero_gamma_makes_residual_blocks_start_as_the_identity(
        self, arch: str, last: str, init: str
    ) -> None:
        model = create_model(arch, zero_gamma=True, init=init, num_classes=2)
        zero = {n for n, m in model.named_modules() if _is_zero_batchnorm(m)}
        blocks = [n for n, m in model.named_modules() if n.count(".") == 1 and n[:5] == "layer"]
        assert zero == {f"{block}.{last}" for block in blocks}
        images = torch.rand(1, model.layer1[1].conv1.in_channels, 4, 4)
        assert torch.equal(model.eval().layer1[1](images), images)

    def test_same_seed_same_weights(self) -> None:
        for arch in ("mobilenet_v1", "wrn22_2", "small_cnn", "resnet18"):
            states = []
            for _ in range(2):
                torch.manual_seed(3)
                states.append(create_model(arch, init="fanin").state_dict())
            assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


class TestStem:
    def test_cifar_stem_keeps_resolution(self) -> None:
        torch.manual_seed(0)
        model = create_model("resnet18", stem="cifar", num_classes=10)
        assert model.conv1.weight.shape == (64, 3, 3, 3)
        assert model.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.1)
        sizes = []
        model.layer1.register_forward_hook(lambda _m, _i, out: sizes.append(out.shape[-1]))
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
        assert sizes == [32]

    def test_names_stay_those_of_torchvision(self) -> None:
        reference = torchvision.models.resnet18()
        assert list(meta("resnet18", stem="cifar").state_dict()) == list(reference.state_dict())


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("resnet-50", {}, r"unknown arch 'resnet-50'; did you mean .*resnet50"),
        ("mobilenetv1", {}, "did you mean .*mobilenet_v1"),
        ("zzz", {}, "unknown arch 'zzz'; known are mobilenet_v1"),
        ("resnet50", {"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ("resnet50", {"init": "xavier"}, "init must be one of torchvision, classic, fanin"),
        ("resnet50", {"stem": "tiny"}, "stem must be one of imagenet, cifar"),
        ("resnet50", {"width": 0.5}, "width 0.5 has no effect on resnet50"),
        ("mobilenet_v1", {"width": 0.0}, "width must be above 0"),
        ("mobilenet_v1", {"zero_gamma": True}, "zero gamma has no effect on mobilenet_v1"),
        ("wrn22_2", {"zero_gamma": True}, "zero gamma has no effect on wrn22_2"),
        ("wrn22_2", {"stem": "cifar"}, "stem cifar has no effect on wrn22_2"),
        ("vgg11", {"stem": "cifar"}, "stem cifar has no effect on vgg11"),
    ],
)
def test_bad_requests_are_refused_in_one_line(arch: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        meta(arch, **options)
    assert "\n" not in str(caught.value)


def test_unknown_arch_has_no_image_size() -> None:
    with pytest.raises(ValueError, match="unknown arch 'resnet51'; did you mean"):
        default_image_size("resnet51")


def _batchnorms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def _is_zero_batchnorm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d) and bool((module.weight == 0).all())
