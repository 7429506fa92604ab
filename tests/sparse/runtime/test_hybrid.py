"""Networks with operations that the runtime does not know run as in torch, these parts by torch."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from sparse import runtime
from sparse.costs import trace_layers
from tests.sparse.runtime.conftest import prune_
from tests.sparse.runtime.random_networks import RandomNetwork

SIZE = 20
TOLERANCE = 1e-4


class Block(nn.Module):
    """A residual block whose first activation can be any module."""

    def __init__(self, channels: int, activation: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.activation = activation
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.norm1(self.conv1(x)))
        return torch.relu_(x + self.norm2(self.conv2(y)))


class Broadcast(nn.Module):
    """A sum of a map and of another one with one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.one(x)


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def network(
    *activations: nn.Module, first: nn.Module | None = None, last: nn.Module | None = None
) -> nn.Module:
    """Return a small ResNet with an activation for each block."""
    stem = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7)]
    blocks = [Block(8, activation) for activation in activations]
    parts = [first, *stem, *blocks, *head, last]
    model = nn.Sequential(*(part for part in parts if part is not None)).eval()
    prune_(model, 0.3)
    return model


def normalized(x: Tensor) -> Tensor:
    """Return images as torchvision's GoogLeNet with `transform_input` has them."""
    return torch.cat([x[:, i, None] * 0.4 + 0.1 * i for i in range(3)], 1)


def bilinear(x: Tensor) -> Tensor:
    return nn.functional.interpolate(x, scale_factor=2, mode="bilinear")[..., ::2, ::2]


class Mixer(nn.Module):
    """Linear layers over channels and over pixels, and an average that is written as an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 5, stride=5)
        self.norm = nn.LayerNorm(12)
        self.pixels = nn.Linear(16, 16)
        self.channels = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.pixels(self.norm(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm(x))
        return self.head(torch.einsum("btc->bc", x) / 16)


class Masked(nn.Module):
    """Attention with a mask, over tokens that come first or second."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 5, stride=5)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x if self.attention.batch_first else x.transpose(0, 1)
        mask = torch.ones(16, 16).triu(1).bool()
        x = self.attention(x, x, x, need_weights=False, attn_mask=mask)[0]
        return x.mean(1 if self.attention.batch_first else 0)


CASES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "two": (
        lambda: network(nn.PReLU(), nn.ReLU(), nn.LocalResponseNorm(3)),
        ["3.activation: PReLU", "5.activation: LocalResponseNorm"],
    ),
    "first and last": (
        lambda: network(nn.ReLU(), first=Applied(normalized), last=nn.Softmax(1)),
        ["0: Applied (aten.mul, aten.add, aten.cat)", "8: Softmax (aten.softmax)"],
    ),
    "functions": (
        lambda: network(
            Applied(bilinear), Applied(lambda x: torch.einsum("bchw,bdhw->bdhw", x, x.sin()))
        ),
        [
            "3.activation: Applied (aten.upsample_bilinear2d",
            "4.activation: Applied (aten.sin, aten.einsum)",
        ],
    ),
    "channels last": (
        lambda: network(Applied(lambda x: x.movedim(1, -1).cumsum(3).movedim(-1, 1))),
        ["3.activation: Applied (aten.cumsum)"],
    ),
    "mixer": (Mixer, ["Mixer (aten.add, aten.einsum, aten.div)"]),
    "masked": (lambda: Masked(batch_first=True), ["attention: MultiheadAttention"]),
    "masked, tokens first": (
        lambda: Masked(batch_first=False),
        ["attention: MultiheadAttention"],
    ),
}


def hybrid(model: nn.Module, cache: Path, **options: int) -> runtime.Hybrid:
    size = options.pop("image_size", SIZE)
    return runtime.hybrid(model, image_size=size, tune=False, cache=cache, **options)


def assert_equal_torch(model: nn.Module, found: runtime.Hybrid, size: int = SIZE) -> None:
    for count in (1, 3):
        images = torch.randn(count, 3, size, size)
        with torch.no_grad():
            wanted = model(images)
        difference = float((found(images) - wanted).abs().max())
        assert difference <= TOLERANCE * float(wanted.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_torch_runs_what_the_runtime_does_not_know(name: str, kernel_cache: Path) -> None:
    make, parts = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    found = hybrid(model, kernel_cache, threads=2)
    assert_equal_torch(model, found)
    for part in parts:
        assert any(line.startswith(part) for line in found.report.parts), found.report.parts
        assert f"\n  {part}" in str(found.report)


def test_the_report_says_which_share_of_the_multiply_adds_torch_computes(
    kernel_cache: Path,
) -> None:
    model = network(nn.ReLU(), nn.ConvTranspose2d(8, 8, 3, padding=1))
    report = hybrid(model, kernel_cache).report
    by_name = {layer.name: layer.macs for layer in trace_layers(model, SIZE)}
    of_torch = by_name["4.activation.weight"]
    assert report.torch_macs == of_torch == 8 * 8 * 9 * 100
    assert report.torch_macs + report.native_macs == sum(by_name.values())
    density = {n: float((p != 0).float().mean()) for n, p in model.named_parameters()}
    left = sum(count * density[n] for n, count in by_name.items() if n != "4.activation.weight")
    assert report.active_macs == pytest.approx(left, abs=1)
    assert report.share == pytest.approx(of_torch / (of_torch + report.native_macs))
    assert report.active_share == pytest.approx(of_torch / (of_torch + left), rel=1e-4)
    head = f"torch runs {report.share:.1%} of the multiply-adds ({report.active_share:.1%} of those"
    assert str(report).startswith(head)


def compare_random(seed: int, cache: Path) -> runtime.Hybrid:
    """Draw a network, some of whose operations the runtime does not know; compare it with torch."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    size = rng.randint(4, 24)
    model = RandomNetwork(rng, 3, size, size).eval()
    model = nn.Sequential(nn.Conv2d(3, 3, 1), model).eval()
    others = (torch.sin, lambda x: x.flip(1), lambda x: 0.3 * x.cumsum(1))
    for step in model[1]._steps:
        if rng.random() < 0.25:
            step.operation = compose(rng.choice(others), step.operation)
    found = hybrid(model, cache, image_size=size, threads=rng.choice((1, 3)))
    assert_equal_torch(model, found, size)
    return found


def compose(second: Callable[..., Tensor], first: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *values: second(first(*values))


def test_random_networks_equal_torch(kernel_cache: Path) -> None:
    reports = [compare_random(seed, kernel_cache).report for seed in range(6)]
    assert any(report.parts and report.native_macs for report in reports)


@pytest.mark.slow
def test_many_random_networks_equal_torch(kernel_cache: Path) -> None:
    reports = [compare_random(1000 + i, kernel_cache).report for i in range(200)]
    assert sum(bool(report.parts and report.native_macs) for report in reports) > 100


def test_products_of_activations_count(kernel_cache: Path) -> None:
    report = hybrid(Masked(batch_first=True).eval(), kernel_cache).report
    products = 2 * 16 * 16 * 12
    assert report.torch_macs in (products, products + 16 * 12 * 12)  # and the last linear layer


def test_torch_runs_nothing_of_a_network_that_the_runtime_knows(kernel_cache: Path) -> None:
    model = network(nn.ReLU(), nn.SiLU())
    found = hybrid(model, kernel_cache)
    assert_equal_torch(model, found)
    assert (found.report.parts, found.report.share) == ((), 0.0)
    assert str(found.report) == "torch runs no part of this network"


def test_a_residual_branch_around_an_unknown_operation_does_not_undo_the_rest(
    kernel_cache: Path,
) -> None:
    """Only the operation, and the sum which has two sources, stay with torch."""
    report = hybrid(network(nn.ReLU(), nn.PReLU(), nn.ReLU()), kernel_cache).report
    assert report.parts == ("4.activation: PReLU (aten.prelu)", "4: Block (aten.add)")
    assert report.torch_macs == 0


def test_the_first_convolution_need_not_read_the_images(kernel_cache: Path) -> None:
    model = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 8, 3), nn.PReLU(), nn.Conv2d(8, 4, 3))
    with pytest.raises(ValueError, match="in_channels must be at least 1, got 0"):
        hybrid(model.eval(), kernel_cache, in_channels=0)
    with pytest.raises(ValueError, match=r"to have 12 channels, but got 48 .*in_channels="):
        hybrid(model, kernel_cache)
    found = hybrid(model, kernel_cache, in_channels=3)
    assert found.report.share == 0
    assert_equal_torch(model, found)
    with pytest.raises(ValueError, match=r"does not know 0: PixelUnshuffle .*hybrid"):
        runtime.trace(model, image_size=SIZE, in_channels=3)


def test_paddings_with_a_name_are_numbers(kernel_cache: Path) -> None:
    for padding, kernel, share in (("same", (3, 5), 0), ("valid", 3, 0), ("same", (3, 4), 1)):
        model = nn.Sequential(nn.Conv2d(3, 4, kernel, padding=padding, dilation=(2, 1))).eval()
        found = hybrid(model, kernel_cache)
        assert found.report.share == share  # an even kernel pads more on one side: torch runs it
        assert_equal_torch(model, found)


def test_what_has_no_weights_is_left_to_torch(kernel_cache: Path) -> None:
    def twice(x: Tensor) -> Tensor:
        return torch.relu(torch.sin(x)).sin()

    report = hybrid(network(nn.ReLU(), first=Applied(twice)), kernel_cache).report
    assert report.parts == ("0: Applied (aten.sin, aten.relu)",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("googlenet", 64, {"aux_logits": False, "init_weights": False, "transform_input": True}),
        ("inception_v3", 96, {"aux_logits": False, "init_weights": False, "transform_input": True}),
        ("swin_v2_t", 64, {}),
        ("maxvit_t", 224, {}),
    ],
)
def test_networks_of_torchvision_equal_torch(
    name: str, size: int, options: dict[str, bool], kernel_cache: Path
) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=7, **options).eval()
    found = hybrid(model, kernel_cache, image_size=size)
    assert_equal_torch(model, found, size)
    assert found.report.share < 0.6


def test_images_are_those_of_any_network(kernel_cache: Path) -> None:
    model = network(nn.PReLU())
    found = hybrid(model, kernel_cache)
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        wanted = model(images)
    one = found(images[0].numpy())
    assert one.shape == (7,)
    assert torch.allclose(torch.from_numpy(one), wanted[0], rtol=1e-4, atol=1e-5)
    with ThreadPoolExecutor(4) as pool:
        for logits in pool.map(found, [images] * 8):
            assert torch.allclose(logits, wanted, rtol=1e-4, atol=1e-5)
    for wrong, message in (
        (images.double(), "must be float32 on the CPU"),
        (images[:, :2], r"must be \(N, 3, H, W\)"),
        (images[..., 1:], "images of 20x19 do not fit this network, .* for 20x20"),
    ):
        with pytest.raises(ValueError, match=message):
            found(wrong)


def test_the_precision_of_a_surrounding_autocast_does_not_matter(kernel_cache: Path) -> None:
    model = network(nn.PReLU(), first=nn.Sequential(nn.ConvTranspose2d(3, 3, 1), nn.Mish()))
    found = hybrid(model, kernel_cache)
    images = torch.randn(1, 3, SIZE, SIZE)
    before = found(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        after = found(images)
    assert torch.equal(after, before)
    assert not after.is_inference()


def test_later_changes_of_the_model_do_not_change_the_network(kernel_cache: Path) -> None:
    model = network(nn.PReLU()).train()
    found = hybrid(model, kernel_cache)
    assert model.training
    images = torch.randn(1, 3, SIZE, SIZE)
    before = found(images)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1)
    assert torch.equal(found(images), before)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Applied(lambda x: x if x.sum() > 0 else -x), "Applied cannot be exported"),
        (Applied(lambda x: x.view(2, -1)), "cannot be exported for batches of any size"),
        (Applied(lambda x: x[x > 0]), "Applied has branches or sizes that depend on the data"),
        (
            Applied(lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))),
            "Applied has branches or sizes that depend on the data",
        ),
        (Applied(lambda x: (x, x.sin())), "must take images and return one tensor"),  # type: ignore[arg-type,return-value]
        (nn.Conv2d(3, 4, 1).double(), "must be float32 on the CPU, 'weight' is torch.float64"),
        (nn.Conv2d(3, 4, 1, device="meta"), "must be float32 on the CPU, .* on meta"),
    ],
)
def test_what_cannot_run_is_refused_in_a_line(
    model: nn.Module, message: str, kernel_cache: Path
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        hybrid(model.eval(), kernel_cache)
    assert "\n" not in str(error.value)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        runtime.hybrid(network(nn.PReLU()), threads=0)
    with pytest.raises(ValueError, match="sse2"):
        runtime.hybrid(network(nn.PReLU()), level="sse2")


def test_the_remedy_is_named_where_it_helps() -> None:
    for helped, model in (
        (True, nn.Sequential(nn.Conv2d(3, 4, 1), nn.Mish())),
        (True, nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"))),
        (True, Broadcast()),
        (False, Applied(lambda x: (x, x))),  # type: ignore[arg-type,return-value]
        (False, Applied(lambda x: x if x.sum() > 0 else -x)),
    ):
        with pytest.raises(ValueError, match=r".") as error:
            runtime.trace(model, image_size=8)
        assert ("--fallback torch" in str(error.value)) is helped
