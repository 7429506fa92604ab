"""Conversion of weights: real files, and logits of the original TensorFlow graphs.

tests/data/tf_graphs.json lists the variables of the RigL repository's own graphs and the logits
they gave for the values that `value` makes of a variable's name.
"""

import functools
import json
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from cli import convert, foreign
from cli.foreign import Network
from image_classification import checkpoint
from image_classification.models import create_model
from sparse.topology.bits import unpack

GRAPHS = json.loads((Path(__file__).parents[1] / "data/tf_graphs.json").read_text())


def noise(name: str, shape: Sequence[int]) -> np.ndarray[Any, Any]:
    """Return numbers in [-1, 1) that depend on a name: a hash of the index, exact everywhere."""
    low = np.uint64(0xFFFFFFFF)
    x = np.arange(np.prod(shape, dtype=int), dtype=np.uint64) * np.uint64(2654435761)
    x = (x + np.uint64(zlib.crc32(name.encode()))) & low
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & low
    x ^= x >> np.uint64(16)
    return (x.astype(np.float64) / 2**31 - 1).reshape(shape)


def value(name: str, shape: Sequence[int]) -> Tensor:
    """Return the value that a variable had when the logits were taken."""
    last = name.rpartition("/")[2]
    array = noise(name, shape)
    if last == "mask":
        array = array > 0.2
    elif last in ("gamma", "moving_variance"):
        array = 1 + 0.5 * array
    elif last in ("beta", "moving_mean", "biases", "bias"):
        array = 0.2 * array
    else:
        fan_in = np.prod(shape[:-2] if last == "depthwise_weights" else shape[:-1])
        array = array * np.sqrt(6 / fan_in)
    return torch.from_numpy(array.astype(np.float32))


@functools.cache
def variables(graph: str) -> dict[str, Tensor]:
    return {name: value(name, shape) for name, shape in GRAPHS[graph]["variables"].items()}


def to_tf(network: Network, arch: str) -> dict[str, Tensor]:
    """Undo `foreign.from_tf`, under the names of a graph whose every layer is sparse."""
    variables: dict[str, Tensor] = {}
    for name, scope in foreign.tf_kernels(arch):
        kernel = network.state_dict[f"{name}.weight"]
        last = "depthwise_weights" if name.endswith(".dw") else "weights"
        variables[f"resnet_model/{scope}/{last}"] = to_tf_layout(kernel, name)
        if (mask := network.masks.get(f"{name}.weight")) is not None:
            variables[f"resnet_model/{scope}/mask"] = to_tf_layout(mask.float(), name)
    for name, scope in foreign.tf_norms(arch):
        for ours, theirs in foreign.NORM.items():
            variables[f"resnet_model/{scope}/{theirs}"] = network.state_dict[f"{name}.{ours}"]
    variables["resnet_model/final_dense/biases"] = network.state_dict["fc.bias"]
    return variables


def to_tf_layout(kernel: Tensor, name: str) -> Tensor:
    if kernel.dim() == 2:
        return kernel.t().contiguous()
    order = (2, 3, 0, 1) if name.endswith(".dw") else (2, 3, 1, 0)
    return kernel.permute(order).contiguous()


def arch_of(graph: str) -> str:
    return graph.removesuffix("_conv1_dense").replace("resnet50", "tf_resnet50")


@pytest.mark.parametrize("graph", GRAPHS)
def test_logits_of_the_tensorflow_graphs_are_reproduced(graph: str) -> None:
    network = foreign.from_tf(variables(graph), arch_of(graph))
    model = create_model(arch_of(graph)).eval()
    model.load_state_dict(network.state_dict)
    image = torch.from_numpy(noise("image", (1, 64, 64, 3)).astype(np.float32))
    with torch.no_grad():
        logits = model(image.permute(0, 3, 1, 2))[0]
    torch.testing.assert_close(
        logits[:100], torch.tensor(GRAPHS[graph]["logits"]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("graph", "dense"),
    [("resnet50", 0), ("resnet50_conv1_dense", 1), ("mobilenet_v1", 1 + 13)],
)
def test_masks_of_a_tensorflow_checkpoint_come_along(graph: str, dense: int) -> None:
    network = foreign.from_tf(variables(graph), arch_of(graph))
    kernels = [name for name, tensor in network.state_dict.items() if tensor.dim() >= 2]
    assert len(network.masks) == len(kernels) - dense
    for name, mask in network.masks.items():
        assert mask.dtype == torch.bool
        assert not network.state_dict[name][~mask].any()
    # HWIO -> OIHW, by hand for one entry
    original = GRAPHS[graph]["variables"]
    scope = "contraction_1x1_3" if "mobile" in graph else "bottleneck_2_block_group2_1_1"
    mask = value(f"resnet_model/{scope}/mask", original[f"resnet_model/{scope}/mask"])
    ours = "blocks.3.pw.weight" if "mobile" in graph else "layer2.1.conv2.weight"
    assert network.masks[ours][5, 7, 0, 0] == bool(mask[0, 0, 7, 5])
    assert torch.equal(network.masks[ours].sum(), mask.sum().long())


@pytest.mark.parametrize("graph", ["resnet50", "mobilenet_v1"])
def test_tensorflow_names_and_layouts_round_trip(graph: str) -> None:
    there = foreign.from_tf(variables(graph), arch_of(graph))
    back = to_tf(there, arch_of(graph))
    again = foreign.from_tf(back, arch_of(graph))
    assert same(again.state_dict, there.state_dict)
    assert same(again.masks, there.masks)
    assert back.keys() <= variables(graph).keys() | {"resnet_model/initial_conv/weights"}


def test_a_missing_variable_is_named() -> None:
    broken = dict(variables("mobilenet_v1"))
    del broken["resnet_model/contraction_1x1_4/weights"]
    with pytest.raises(ValueError, match="resnet_model/contraction_1x1_4/weights"):
        foreign.from_tf(broken, "mobilenet_v1")
    with pytest.raises(ValueError, match="tf_resnet50 and mobilenet_v1, not vgg11"):
        foreign.from_tf({}, "vgg11")


@pytest.mark.slow
def test_a_tensorflow_checkpoint_is_read_from_its_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    wanted = variables("mobilenet_v1")
    np.savez(tmp_path / "values.npz", **{k: v.numpy() for k, v in wanted.items()})
    writer = (
        "import sys, numpy as np, tensorflow as tf\n"
        "values = np.load(sys.argv[1])\n"
        "names = list(values)\n"
        "tf.raw_ops.SaveV2(prefix=sys.argv[2], tensor_names=names,"
        " shape_and_slices=[''] * len(names), tensors=[values[n] for n in names])\n"
    )
    prefix = tmp_path / "model.ckpt-320000"
    subprocess.run(
        [sys.executable, "-c", writer, tmp_path / "values.npz", prefix], check=True, timeout=300
    )
    network = convert.read(prefix)
    assert network.arch == "mobilenet_v1"
    assert same(network.masks, foreign.from_tf(wanted, "mobilenet_v1").masks)


def test_torchvision_weights_go_in_and_out_unchanged(tmp_path: Path) -> None:
    source = resnet18(num_classes=7).eval()
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    convert_in(tmp_path, "resnet18.pth", "in.pth.tar", "--arch", "resnet18")

    path = tmp_path / "in.pth.tar"
    state = checkpoint.load(path)
    assert state["arch"] == "resnet18"
    model = create_model("resnet18", num_classes=7).eval()
    checkpoint.restore({"state_dict": model}, state, path)
    image = torch.rand(2, 3, 64, 64)
    assert torch.equal(model(image), source(image))

    convert_in(tmp_path, "in.pth.tar", "out.pth", "--to", "torchvision")
    assert same(torch.load(tmp_path / "out.pth", weights_only=True), source.state_dict())


def test_nvidia_names_go_in_and_out(tmp_path: Path) -> None:
    source = resnet18(num_classes=7).state_dict()
    stages = {
        "layer1": "layers.0",
        "layer2": "layers.1",
        "layer3": "layers.2",
        "layer4": "layers.3",
    }
    renamed = {}
    for name, tensor in source.items():
        stage, _, rest = name.partition(".")
        renamed[f"module.{stages.get(stage, stage)}.{rest}"] = tensor
    state = {"epoch": 90, "best_prec1": 76.5, "state_dict": renamed, "optimizer": {}}
    torch.save(state, tmp_path / "nvidia.pth.tar")
    network = convert.read(tmp_path / "nvidia.pth.tar", arch="resnet18")
    assert same(network.state_dict, source)

    convert_in(tmp_path, "nvidia.pth.tar", "out.safetensors", "-a", "resnet18", "--to", "nvidia")
    written = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert same(written, {k.removeprefix("module."): v for k, v in renamed.items()})


def port_checkpoint() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what the port saves, with its first and last layers dense, and the masks by name."""
    weights = create_model("small_cnn").state_dict()
    kernels = [name for name, tensor in weights.items() if tensor.dim() >= 2]
    masks = {name: torch.rand(weights[name].shape) < 0.2 for name in kernels[1:-1]}
    pruner = {
        "dense_allocation": 0.2,
        "S": [0 if name not in masks else 0.8 for name in kernels],
        "N": [weights[name].numel() for name in kernels],
        "hyperparams": {"delta_T": 100, "alpha": 0.3},
        "step": 12,
        "backward_masks": [masks.get(name) for name in kernels],
    }
    named = {f"module.{name}": tensor for name, tensor in weights.items()}
    return {"epoch": 3, "state_dict": named, "pruner": pruner, "arch": "small_cnn"}, masks


def test_the_masks_of_the_port_end_up_in_the_checkpoint(tmp_path: Path) -> None:
    state, masks = port_checkpoint()
    torch.save(state, tmp_path / "port.pth.tar")
    root = Path(__file__).parents[2]
    command = ["-m", "cli.convert", tmp_path / "port.pth.tar"]
    done = subprocess.run(
        [sys.executable, *command, tmp_path / "ours.pth.tar"],
        cwd=root, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert f"small_cnn, {len(state['state_dict'])} tensors, {len(masks)} masks" in done.stdout

    ours = checkpoint.load(tmp_path / "ours.pth.tar")
    packed = ours["sparse"]["masks"]
    assert same({k: unpack(m["bits"], m["shape"]) for k, m in packed.items()}, masks)
    for name, mask in masks.items():
        expected = state["state_dict"][f"module.{name}"] * mask
        assert torch.equal(ours["state_dict"][name], expected)

    again = convert.read(tmp_path / "ours.pth.tar")
    assert same(again.masks, masks)


def test_averaged_weights_are_taken_on_request(tmp_path: Path) -> None:
    model, averaged = create_model("small_cnn"), create_model("small_cnn")
    ema = torch.optim.swa_utils.AveragedModel(averaged)
    state = {
        "epoch": 1,
        "arch": "small_cnn",
        "state_dict": model.state_dict(),
        "ema": ema.state_dict(),
    }
    checkpoint.save(tmp_path, state, epoch=1, is_best=False, filename="run.pth.tar")
    plain = convert.read(tmp_path / "run.pth.tar")
    mean = convert.read(tmp_path / "run.pth.tar", ema=True)
    assert same(plain.state_dict, model.state_dict())
    assert same(mean.state_dict, averaged.state_dict())


class Code:
    """Pickled, an instance of this needs code."""


def files_that_do_not_convert(folder: Path) -> dict[str, str]:
    """Write them; return file name -> what the error says."""
    torch.save({"state_dict": Code()}, folder / "code.pth")
    torch.save(torch.ones(3), folder / "tensor.pth")
    torch.save(nn.Linear(2, 2).state_dict(), folder / "linear.pth")
    (folder / "text.pth").write_text("not a file of weights")
    state, _ = port_checkpoint()
    state["pruner"]["backward_masks"].pop()
    torch.save(state, folder / "masks.pth")
    whole = folder / "whole.pth"
    torch.save(create_model("small_cnn").state_dict(), whole)
    (folder / "cut.pth").write_bytes(whole.read_bytes()[:-3000])
    return {
        "absent.pth": "does not exist",
        "code.pth": "objects besides tensors (tests.cli.test_convert.Code)",
        "tensor.pth": "holds a Tensor",
        "linear.pth": "it is no resnet50: fc.bias is missing",
        "whole.pth": "it is no resnet50",
        "text.pth": "no file of torch.save",
        "masks.pth": "masks do not fit",
        "cut.pth": "truncated or damaged",
    }


def test_what_cannot_be_converted_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, words in files_that_do_not_convert(tmp_path).items():
        assert convert.main([str(tmp_path / name), str(tmp_path / "target")]) == 2
        said = capsys.readouterr().err
        assert name in said
        assert words in said, said
        assert said.count("\n") == 1
        assert not (tmp_path / "target").exists()


def test_targets_are_never_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "there.pth"
    target.write_text("precious")
    network = Network(create_model("small_cnn").state_dict())
    with pytest.raises(ValueError, match=r"there\.pth exists"):
        convert.write(network, target, arch="small_cnn")
    with pytest.raises(ValueError, match="--to torchvision"):
        convert.write(network, tmp_path / "new.safetensors", arch="small_cnn")
    assert target.read_text() == "precious"


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def convert_in(folder: Path, source: str, target: str, *flags: str) -> None:
    """Run the command line in this process."""
    assert convert.main([str(folder / source), str(folder / target), *flags]) == 0
