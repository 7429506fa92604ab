"""Files of weights as torchvision, timm, hubs, wrappers and torch.nn.utils.prune write them."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models import resnet18

from cli import convert, foreign
from image_classification import weights
from image_classification.models import check_image_size, create_model, names

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return resnet18(num_classes=7).eval()


def same(one: State, other: State) -> bool:
    return list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one)


def read(path: Path, **options: Any) -> foreign.Network:
    return convert.read(path, arch="resnet18", **options)


def test_what_is_written_as_safetensors_is_read_back(network: nn.Module, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "in.pth")
    flags = ["--arch", "resnet18"]
    for source, target, more in (
        ("in.pth", "mid.safetensors", ["--to", "torchvision"]),
        ("mid.safetensors", "out.safetensors", ["--to", "nvidia"]),
        ("out.safetensors", "out.pth.tar", []),
    ):
        assert convert.main([str(tmp_path / source), str(tmp_path / target), *flags, *more]) == 0
    assert same(read(tmp_path / "out.pth.tar").state_dict, network.state_dict())


def shuffled(state: State) -> State:
    return {name: state[name] for name in sorted(state, key=hash)}


def without_counters(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if "num_batches" not in name}


@pytest.mark.parametrize("change", [shuffled, without_counters])
def test_order_and_counters_do_not_matter(
    network: nn.Module, tmp_path: Path, change: Callable[[State], State]
) -> None:
    torch.save(change(network.state_dict()), tmp_path / "in.pth")
    assert same(read(tmp_path / "in.pth").state_dict, network.state_dict())


def test_half_precision_comes_in_as_float32(network: nn.Module, tmp_path: Path) -> None:
    half = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    safetensors.torch.save_file(half, tmp_path / "in.safetensors")
    found = read(tmp_path / "in.safetensors").state_dict
    assert found["fc.weight"].dtype == torch.float32
    assert torch.equal(found["fc.weight"], half["fc.weight"].float())


@pytest.mark.parametrize("in_zip", [True, False])
def test_checkpoints_with_flags_and_accuracies(
    network: nn.Module, tmp_path: Path, in_zip: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torchvision's reference trainer and timm write them; `in_zip` as before torch 1.6."""
    averaged = torch.optim.swa_utils.AveragedModel(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    flags = argparse.Namespace(lr=0.1, output=tmp_path, betas=(0.9, 0.99), more=[1, None])
    state = {
        "model": network.state_dict(), "optimizer": optimizer.state_dict(), "args": flags,
        "model_ema": averaged.state_dict(), "best": np.float64(76.5), "epoch": np.int64(3),
    }  # fmt: skip
    torch.save(state, tmp_path / "in.pth", _use_new_zipfile_serialization=in_zip)
    assert convert.main([str(tmp_path / "in.pth"), str(tmp_path / "out"), "-a", "resnet18"]) == 0
    said = capsys.readouterr().out
    assert "from the entry 'model'" in said
    assert "left in 'model_ema': --ema takes them" in said
    found = read(tmp_path / "in.pth", ema=True)
    assert found.entry == "model_ema"
    assert same(found.state_dict, network.state_dict())


class Command:
    """Unpickled, it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("in_zip", [True, False])
def test_a_file_that_holds_a_command_is_refused_and_not_run(
    network: nn.Module, tmp_path: Path, in_zip: bool
) -> None:
    trace = tmp_path / "trace"
    flags = argparse.Namespace(lr=Command(f"touch {trace}"))
    state = {"model": network.state_dict(), "args": flags}
    torch.save(state, tmp_path / "in.pth", _use_new_zipfile_serialization=in_zip)
    with pytest.raises(
        ValueError, match=r"in\.pth holds objects besides tensors \(posix\.system\)"
    ):
        read(tmp_path / "in.pth")
    assert not trace.exists()


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.module."]
)
def test_names_without_what_wrappers_add(network: nn.Module, tmp_path: Path, prefix: str) -> None:
    named = {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": named}, tmp_path / "in.pth")
    assert same(read(tmp_path / "in.pth").state_dict, network.state_dict())


def test_names_of_the_wrappers_themselves(tmp_path: Path) -> None:
    model = create_model("small_cnn")
    whole = torch.optim.swa_utils.AveragedModel(torch.compile(nn.DataParallel(model)))
    model.features = torch.compile(model.features)
    torch.save(whole.state_dict(), tmp_path / "in.pth")
    found = convert.read(tmp_path / "in.pth", arch="small_cnn")
    assert same(found.state_dict, create_same(model))


def create_same(model: nn.Module) -> State:
    """Return the weights of a model of which a part was compiled, under plain names."""
    return {k.replace("_orig_mod.", ""): v for k, v in model.state_dict().items()}


def test_two_weights_of_one_name_are_refused(network: nn.Module, tmp_path: Path) -> None:
    state = network.state_dict()
    torch.save(state | {"module.fc.bias": state["fc.bias"]}, tmp_path / "in.pth")
    with pytest.raises(ValueError, match=r"two of its weights are fc\.bias, one of them module"):
        read(tmp_path / "in.pth")


def test_pruned_networks_bring_their_masks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("small_cnn", num_classes=7).eval()
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for layer in layers:
        prune.l1_unstructured(layer, "weight", amount=0.8)
    head = next(m for m in model.modules() if isinstance(m, nn.Linear))
    prune.random_unstructured(head, "bias", amount=3)
    torch.save({"model_state_dict": model.state_dict()}, tmp_path / "in.pth")
    found = convert.read(tmp_path / "in.pth", arch="small_cnn")
    assert len(found.masks) == len(layers)
    zeros = sum(int((~mask).sum()) for mask in found.masks.values())
    assert zeros / sum(mask.numel() for mask in found.masks.values()) == pytest.approx(0.8, 1e-3)
    again = create_model("small_cnn", num_classes=7).eval()
    again.load_state_dict(found.state_dict)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))

    assert convert.main([str(tmp_path / "in.pth"), str(tmp_path / "out"), "-a", "small_cnn"]) == 0
    masks = torch.load(tmp_path / "out", weights_only=True)["sparse"]["masks"]
    assert masks.keys() == found.masks.keys()

    broken = model.state_dict()
    del broken["features.0.weight_mask"]
    torch.save(broken, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match=r"0\.weight_orig but no features\.0\.weight_mask"):
        read(tmp_path / "broken.pth")


@pytest.mark.parametrize("entry", weights.ENTRIES)
def test_entries_of_checkpoints(network: nn.Module, tmp_path: Path, entry: str) -> None:
    torch.save({entry: network.state_dict(), "epoch": 3}, tmp_path / "in.pth")
    found = read(tmp_path / "in.pth")
    assert found.entry == entry
    assert same(found.state_dict, network.state_dict())


@pytest.mark.parametrize("entry", weights.AVERAGED_ENTRIES)
def test_averages_are_taken_on_request_only(network: nn.Module, tmp_path: Path, entry: str) -> None:
    torch.save({entry: network.state_dict()}, tmp_path / "in.pth")
    assert same(read(tmp_path / "in.pth", ema=True).state_dict, network.state_dict())
    with pytest.raises(ValueError, match=f"averaged weights only .{entry}.: .*--ema takes them"):
        read(tmp_path / "in.pth")


def files_that_hold_no_weights(folder: Path) -> dict[str, str]:
    """Write them; return file name -> what the error says."""
    (folder / "no.safetensors").write_bytes(b"{}")
    (folder / "random.pth").write_bytes(np.random.default_rng(0).bytes(999))
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), folder / "script.pt")
    (folder / "folder.pth").mkdir()
    compact = {"fc.mask": torch.ones(1, dtype=torch.uint8), "fc.values": torch.ones(3)}
    safetensors.torch.save_file(compact, folder / "compact.safetensors")
    return {
        "no.safetensors": "damaged, or no safetensors file",
        "random.pth": "no file of torch.save",
        "script.pt": "TorchScript archive: save the state_dict()",
        "folder.pth": "does not exist: name a file",
        "compact.safetensors": "python export.py FILE CHECKPOINT --to torch",
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_files_that_hold_no_weights_are_named_in_one_line(tmp_path: Path) -> None:
    for name, words in files_that_hold_no_weights(tmp_path).items():
        with pytest.raises(ValueError, match=name) as caught:
            weights.read(tmp_path / name)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arch", "extra"), [("googlenet", "aux1."), ("inception_v3", "AuxLogits.")]
)
def test_auxiliary_classifiers_are_left_out(arch: str, extra: str) -> None:
    own = {"fc.bias": torch.zeros(3)}
    held = {"fc.bias": torch.ones(3), f"{extra}fc.bias": torch.ones(3)}
    assert same(weights.fit(held, own, arch), {"fc.bias": torch.ones(3)})
    with pytest.raises(ValueError, match="which has no"):
        weights.fit(held, own, "resnet18")


@pytest.mark.parametrize(
    ("arch", "size"),
    [("vit_b_16", 32), ("vgg11", 16), ("inception_v3", 32), ("tf_resnet50", 225)],
)
def test_images_that_a_network_does_not_take_are_one_line(arch: str, size: int) -> None:
    assert arch in names()
    with torch.device("meta"):
        model = create_model(arch)
    check_image_size(model, arch, 299 if arch == "inception_v3" else 224)
    with pytest.raises(ValueError, match=f"^--image-size {size} does not suit {arch}") as caught:
        check_image_size(model, arch, size)
    assert "\n" not in str(caught.value)
    assert model.training
