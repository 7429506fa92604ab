"""Compact files: what they hold, what they cost, and that damage is noticed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

import sparse
from image_classification.models import create_model
from sparse import costs, runtime
from sparse.methods.layers import prunable
from sparse.topology.distributions import allocate
from tests.sparse.runtime.conftest import prune_

Save = Callable[..., Path]

# 10^6 bytes of ResNet-50 as published by Evci et al. (2020).
PUBLISHED = {("erk", 0.8): 23.683, ("erk", 0.9): 13.499, ("uniform", 0.9): 13.532}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def test_the_state_dict_comes_back_bit_for_bit(save: Save) -> None:
    model = create_model("small_cnn", num_classes=7)
    compact = runtime.read(save(model, density=0.13))
    assert_same(compact.state_dict(), model.state_dict())


BLOCKS = [(1, 4), (2, 2), (4, 1), (4, 8)]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", runtime.DTYPES)
@pytest.mark.parametrize("fold", [False, True])
def test_masks_of_blocks_take_a_bit_per_block(
    tmp_path: Path, block: tuple[int, int], dtype: str, fold: bool
) -> None:
    model, masks = network_of_blocks(block)
    single, blocked = tmp_path / "single", tmp_path / "blocked"
    write(single, model, masks, dtype=dtype, fold=fold)
    write(blocked, model, masks, dtype=dtype, fold=fold, block=block)
    before, found = map(runtime.read, (single, blocked))
    assert found.header.blocks == {"3.weight": block, "7.weight": block}  # not the first layer
    assert not before.header.blocks
    assert_same(found.masks(), masks)
    assert_same(found.state_dict(), before.state_dict())

    stored, old = map(safetensors.torch.load_file, (blocked, single))
    assert stored.keys() == old.keys()
    for name, value in old.items():
        if name in ("3.weight.mask", "7.weight.mask"):
            assert stored[name].numel() * block[0] * block[1] == value.numel()
        else:
            assert torch.equal(stored[name], value), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_is_folded_in_float32(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    half, masks = network_of_blocks((1, 4))
    half[1].running_var.mul_(1e-6)  # which scales weights beyond what float16 holds
    write(tmp_path / "half", half.to(dtype), masks, fold=True)
    write(tmp_path / "float", half.float(), masks, fold=True)
    found, wanted = (runtime.read(tmp_path / name) for name in ("half", "float"))
    assert_same(found.state_dict(), wanted.state_dict())


class WithNotes(nn.Conv2d):
    """A convolution whose state dict has an entry that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_entries_that_are_no_tensors_are_left_out(tmp_path: Path, kernel_cache: Path) -> None:
    model = nn.Sequential(WithNotes(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1)).eval()
    assert "0._extra_state" in model.state_dict()
    write(tmp_path / "net", model, {})
    state = runtime.read(tmp_path / "net").state_dict()
    assert list(state) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    found = runtime.hybrid(model, image_size=8, tune=False, cache=kernel_cache)
    images = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(found(images), model(images), rtol=1e-4, atol=1e-5)


def network_of_blocks(block: tuple[int, int]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Make a network whose masks have whole blocks, except that of the first layer."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, bias=False)
    model = nn.Sequential(
        first, nn.BatchNorm2d(16), nn.ReLU(), second, nn.BatchNorm2d(32),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 16),
    )  # fmt: skip
    masks = {"0.weight": torch.rand(16, 3, 3, 3) < 0.3}
    for name in ("3.weight", "7.weight"):
        outputs, inputs, *others = model.get_parameter(name).shape
        whole = torch.rand(outputs // block[0], inputs // block[1], *others) < 0.4
        masks[name] = whole.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)
    return model, masks


def test_a_mask_of_other_blocks_takes_a_bit_per_weight_as_in_earlier_versions(
    tmp_path: Path,
) -> None:
    model, masks = network_of_blocks((1, 4))
    masks["3.weight"][0, 0, 0, 0] ^= True
    model[3].weight.data.mul_(masks["3.weight"])
    write(tmp_path / "one", model, masks, block=(1, 4))
    assert runtime.read(tmp_path / "one").header.blocks == {"7.weight": (1, 4)}
    assert_same(runtime.read(tmp_path / "one").masks(), masks)
    for other in (None, (1, 1), (3, 5), (1, 8)):
        write(tmp_path / "other", model, masks, block=other)
        with safetensors.safe_open(tmp_path / "other", "pt") as file:
            assert '"blocks"' not in file.metadata()["header"]
    with pytest.raises(ValueError, match=r"block must be two numbers .* got \(0, 4\)"):
        write(tmp_path / "other", model, masks, block=(0, 4))


def test_the_bits_of_1x4_blocks_are_a_quarter(tmp_path: Path) -> None:
    model = torchvision.models.resnet18(weights=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparse.static(model, optimizer, sparsity=0.9, block=(1, 4))
    path, masks = tmp_path / "network.safetensors", sparsifier.masks
    sizes = {}
    for block in (None, (1, 4)):
        write(path, model, masks, fold=True, block=block)
        tensors = safetensors.torch.load_file(path)
        sizes[block] = sum(t.numel() for n, t in tensors.items() if n.endswith(".mask"))
    assert sizes[1, 4] == sizes[None] / 4  # the first layer, which has 3 inputs, is full
    # what the costs say of it
    layers = costs.trace_layers(model)
    densities = {name: float(mask.double().mean()) for name, mask in masks.items()}
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    wanted = costs.size_bytes(layers, densities, block=(1, 4))
    assert path.stat().st_size - header == pytest.approx(wanted, rel=1e-5)


def test_an_active_weight_may_be_zero(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3))
    mask = torch.zeros(5, 3, 3, 3, dtype=torch.bool)
    mask[::2, :, 1] = True
    model[0].weight.data.mul_(mask)
    model[0].weight.data[2, 0, 1, 1] = 0.0  # grown, and not yet trained
    path = tmp_path / "file"
    write(path, model, {"0.weight": mask})
    compact = runtime.read(path)
    assert torch.equal(compact.masks()["0.weight"], mask)
    assert_same(compact.state_dict(), model.state_dict())


def write(path: Path, model: nn.Module, masks: dict[str, Tensor], **options: object) -> None:
    runtime.save(
        path,
        model.state_dict(),
        masks,
        nodes=options.pop("nodes", None) or runtime.trace(model.eval()),
        arch="resnet50",
        model={},
        image_size=224,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        **options,
    )


@pytest.mark.parametrize(("distribution", "sparsity"), PUBLISHED)
def test_folded_files_have_the_published_size(
    tmp_path: Path, distribution: str, sparsity: float
) -> None:
    model = torchvision.models.resnet50(weights=None)
    weights = prunable(model)
    counts = allocate(
        {name: tuple(w.shape) for name, w in weights.items()},
        sparsity=sparsity,
        distribution=distribution,
    )
    masks = {}
    for name, weight in weights.items():
        masks[name] = torch.arange(weight.numel()).view_as(weight) < counts[name]
        weight.data.masked_fill_(~masks[name], 0.0)
    path = tmp_path / "network.safetensors"
    published = 1e6 * PUBLISHED[distribution, sparsity]

    write(path, model, masks, fold=True)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert header < 50_000
    assert path.stat().st_size - header == pytest.approx(published, rel=0.001)

    # Unfolded, each of the 26,560 channels has four vectors of BatchNorm instead of one bias.
    write(path, model, masks)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    normalization = 3 * 4 * 26_560
    assert path.stat().st_size - header - normalization == pytest.approx(published, rel=0.001)


def test_a_quantized_file_of_blocks_is_what_its_integers_take(tmp_path: Path) -> None:
    model = torchvision.models.resnet50(weights=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = sparse.static(model, optimizer, sparsity=0.95, block=(1, 4)).masks
    nodes, activations = runtime.calibrate(
        runtime.trace(model.eval()), model.state_dict(), [torch.randn(1, 3, 64, 64)]
    )
    path = tmp_path / "network"
    options = {"dtype": "int8", "fold": True, "block": (1, 4), "activations": activations}
    write(path, model, masks, nodes=nodes, **options)
    num_weights = sum(int(mask.sum()) for mask in masks.values())
    # The first layer has 3 inputs and a bit per weight.
    partial = [mask for mask in masks.values() if not mask.all()]
    num_bits = sum(mask.numel() // (4 if mask.shape[1] > 3 else 1) for mask in partial)
    num_channels = 26_560 + 1000  # a scale and a bias each
    wanted = num_weights + num_bits / 8 + 8 * num_channels
    assert wanted < path.stat().st_size < 1.01 * wanted


def test_files_that_earlier_versions_read_have_the_first_version(tmp_path: Path) -> None:
    model, masks = network_of_blocks((1, 4))
    for block, version in ((None, 1), ((1, 4), 2)):
        write(tmp_path / "file", model, masks, block=block)
        with safetensors.safe_open(tmp_path / "file", "pt") as file:
            assert file.metadata()["format"] == f"compact-sparse-{version}"


def test_a_file_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    safetensors.torch.save_file({"x": torch.zeros(3)}, path, {"format": "compact-sparse-3"})
    with pytest.raises(ValueError, match=r"is not a compact sparse network .* compact-sparse-2"):
        runtime.read(path)


def test_other_readers_of_safetensors_find_the_documented_entries(save: Save) -> None:
    model = create_model("small_cnn", num_classes=7)
    path = save(model, density=0.5)
    tensors = safetensors.torch.load_file(path)
    weight = model.state_dict()["features.3.weight"].flatten()
    bits = tensors["features.3.weight.mask"]
    active = torch.stack([bits >> i & 1 for i in range(8)], 1).flatten().bool()
    assert torch.equal(active, weight != 0)
    assert torch.equal(tensors["features.3.weight.values"], weight[weight != 0])
    assert torch.equal(tensors["fc.bias"], model.fc.bias)


@pytest.mark.parametrize(
    ("dtype", "error"), [("float16", 6e-4), ("bfloat16", 5e-3), ("int8", 4e-3)]
)
def test_narrow_values_are_close_and_small(save: Save, dtype: str, error: float) -> None:
    model = create_model("small_cnn", num_classes=7)
    full = save(model, density=0.5).stat().st_size
    path = save(model, density=1.0, dtype=dtype)  # weights are pruned already: all whole
    pruned = save(model, density=0.5, dtype=dtype)
    assert pruned.stat().st_size < full * (0.6 if dtype != "int8" else 0.4)
    for state in (runtime.read(path).state_dict(), runtime.read(pruned).state_dict()):
        wanted = model.state_dict()
        assert list(state) == list(wanted)
    for name, value in runtime.read(pruned).state_dict().items():
        assert value.dtype == model.state_dict()[name].dtype
        largest = model.state_dict()[name].abs().max()
        assert torch.allclose(value, model.state_dict()[name], rtol=0, atol=float(error * largest))
    assert torch.equal(value, model.state_dict()[name])  # the last one, a bias, is exact


def test_a_folded_file_gives_a_state_dict_that_computes_the_same(save: Save) -> None:
    model = create_model("resnet18", num_classes=7)
    images = torch.randn(2, 3, 64, 64)
    compact = runtime.read(save(model, fold=True))
    with torch.no_grad():
        wanted = model(images)
        model.load_state_dict(compact.state_dict())
        assert torch.allclose(model(images), wanted, rtol=1e-4, atol=1e-4)
    assert not any(compact.state_dict()[n][~m].any() for n, m in compact.masks().items())


def test_a_damaged_byte_anywhere_is_noticed(save: Save) -> None:
    path = save(create_model("small_cnn", num_classes=7))
    whole = path.read_bytes()
    for position in range(0, len(whole), len(whole) // 40):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"network\.safetensors is (damaged|not)") as error:
            runtime.read(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 something else", bytes(1000)])
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some.file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"some\.file is damaged or not a compact") as error:
        runtime.read(path)
    assert "\n" not in str(error.value)


def test_other_safetensors_files_and_missing_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    safetensors.torch.save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="is not a compact sparse network"):
        runtime.read(path)
    with pytest.raises(ValueError, match="does not exist"):
        runtime.read(tmp_path / "missing")


def test_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3))
    inactive = torch.zeros(5, 3, 3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"'0.weight' has weights that are not 0"):
        write(tmp_path / "file", model, {"0.weight": inactive})
    with pytest.raises(ValueError, match=r"the mask of '0.weight' is \(5, 3\)"):
        write(tmp_path / "file", model, {"0.weight": inactive[..., 0, 0]})
    with pytest.raises(ValueError, match=r"no weight for the mask of .1\.weight."):
        write(tmp_path / "file", model, {"1.weight": inactive})
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole(save: Save) -> None:
    model = create_model("small_cnn", num_classes=7)
    path = save(model, density=0.5)
    prune_(model, 0.1)
    path = save(model, density=0.1)
    assert_same(runtime.read(path).state_dict(), model.state_dict())
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
