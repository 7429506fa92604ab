"""export.py --quantize: from a checkpoint and a folder of images to int8, and to ONNX."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import classify
import export
from cli import networks, qdq
from cli.predictions import load_image
from image_classification.models import create_model
from sparse import runtime
from sparse.runtime import integers
from sparse.runtime.integers import IntegerNetwork
from tests.sparse.runtime.integer_networks import draw, draw_mixed, with_heads, write, write_graph
from tests.sparse.runtime.plans import NETWORKS


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 20 images in folders of classes, and a file that is none."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(20):
        path = folder / "train" / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (50, 60, 3), np.uint8)).save(path)
    (folder / "train" / "readme.txt").write_text("no image")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write the checkpoint of a small sparse network."""
    torch.manual_seed(0)
    model = create_model("small_cnn", num_classes=4)
    for _ in range(3):
        model(torch.randn(8, 3, 40, 40))
    state = model.state_dict()
    masks = {"features.3.weight": torch.rand(state["features.3.weight"].shape) < 0.3}
    state["features.3.weight"] *= masks["features.3.weight"]
    config = {"num_classes": 4, "image_size": 40, "interpolation": "bicubic"}
    networks.write_checkpoint(tmp_path / "net.pth", "small_cnn", state, config=config, masks=masks)
    return tmp_path / "net.pth"


def convert(*arguments: object) -> str:
    return export.run(export.PROGRAM.parse([str(a) for a in arguments]))


def load_all(folder: Path) -> Tensor:
    return torch.cat(
        [
            load_image(path, image_size=40, interpolation="bicubic")
            for path in sorted(folder.rglob("*.png"))
        ]
    )


@pytest.mark.parametrize("method", runtime.METHODS)
def test_a_checkpoint_is_quantized_with_images_of_a_folder(
    tmp_path: Path, source: Path, images: Path, method: str
) -> None:
    flags = "--quantize", "int8", "--calibration", images, "--calibration-method", method
    told = convert(source, tmp_path / "net", *flags, "--num-images", 20)
    assert "masked weights active" in told
    compact = runtime.read(tmp_path / "net")
    trained = networks.read(source)
    assert torch.equal(compact.masks()["features.3.weight"], trained.masks["features.3.weight"])
    batch = load_all(images)
    nodes, wanted = runtime.calibrate(
        runtime.trace(trained.model()), trained.state, batch.split(16), method=method
    )
    assert compact.header.nodes == nodes
    for name, (scale, zero_point) in compact.header.activations.items():
        assert scale == pytest.approx(wanted[name][0], rel=0.05)
        assert abs(zero_point - wanted[name][1]) <= 6
    found = runtime.load(tmp_path / "net", backend="torch")(batch)
    with torch.no_grad():
        logits = trained.model()(batch)
    assert float((found - logits).norm() / logits.norm()) < 0.1


def test_images_are_spread_over_the_folder(tmp_path: Path, source: Path, images: Path) -> None:
    flags = "--quantize", "int8", "--calibration", images
    files = []
    for name, number in (("a", 3), ("b", 3), ("c", 20)):
        convert(source, tmp_path / name, *flags, "--num-images", number)
        files.append(runtime.read(tmp_path / name).header.activations)
    assert files[0] == files[1]
    assert files[0] != files[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantize", "int8"], "needs images: name a folder with --calibration"),
        (["--calibration", "IMAGES"], "--calibration only with --quantize int8"),
        (["--num-images", "3"], "--num-images only with --quantize int8"),
        (["--calibration-method", "minmax"], "--calibration-method only with --quantize int8"),
        (["--quantize", "int4"], "--quantize"),
        (["--quantize", "int8", "--calibration", "IMAGES"], "20 images, --num-images is 256"),
        (["--quantize", "int8", "--calibration", "no"], "--calibration no is no folder"),
        (["--quantize", "int8", "--calibration", "empty"], "empty has 0 images, --num-images is"),
        (["--quantize", "int8", "--calibration", "IMAGES", "--num-images", "0"], "at least 1, got"),
        (["--quantize", "int8", "--calibration", "bad", "--num-images", "1"], "cannot read image"),
        (["--quantize", "int8", "--calibration", "IMAGES", "--to", "onnx"], "leave out --to"),
        (["--quantize", "int8", "--calibration", "IMAGES", "--dtype", "float16"], "leave out --to"),
        (["--quantize", "int8", "--calibration", "IMAGES", "--keep-batch-norm"], "leave out --to"),
    ],
)
def test_mistakes_are_told_in_one_line(
    tmp_path: Path,
    source: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("bad").mkdir()
    Path("bad/a.png").write_text("no image")
    given = [str(images) if argument == "IMAGES" else argument for argument in arguments]
    assert export.main([str(source), "out", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("export.py: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not Path("out").exists()


def test_a_quantized_file_is_no_source_of_float_networks(
    tmp_path: Path, source: Path, images: Path
) -> None:
    flags = "--quantize", "int8", "--calibration", images, "--num-images", 4
    convert(source, tmp_path / "net", *flags)
    for more in ((), ("--to", "onnx", "--compact-channels"), flags):
        with pytest.raises(ValueError, match="net is quantized: export the checkpoint"):
            convert(tmp_path / "net", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_a_network_with_operations_that_int8_lacks_is_quantized_and_classifies(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = create_model("shufflenet_v2_x0_5", num_classes=4)
    for _ in range(3):
        model(torch.randn(8, 3, 32, 32))
    config = {"num_classes": 4, "image_size": 32, "interpolation": "bicubic"}
    source, net = tmp_path / "net.pth", tmp_path / "net"
    networks.write_checkpoint(source, "shufflenet_v2_x0_5", model.state_dict(), config=config)
    convert(source, net, "--quantize", "int8", "--calibration", images, "--num-images", 8)
    compact = runtime.read(net)
    assert {unit.is_int8 for unit in compact.integers().units} == {True, False}
    pictures = sorted(images.rglob("*.png"))
    batch = torch.cat([load_image(p, image_size=32, interpolation="bicubic") for p in pictures])
    found = runtime.load(net, backend="torch")(batch)
    with torch.no_grad():
        logits = model.eval()(batch)
    assert float((found - logits).norm() / logits.norm()) < 0.1
    assert classify.main([str(pictures[0]), "--model", str(net), "--topk", "1"]) == 0
    _, share, number, *_ = capsys.readouterr().out.split()
    assert int(number) == int(found[0].argmax())
    assert float(share) == pytest.approx(float(found[0].softmax(0).max()), abs=1e-3)


def values_of_onnxruntime(
    network: IntegerNetwork, images: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits of the graph as it is written, and all uint8 values of the same graph."""
    onnx = pytest.importorskip("onnx", reason="writes the graph")
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs the graph")
    model = qdq.to_onnx(network, in_channels=3)
    logits = run_onnxruntime(onnxruntime, model, images)[0]
    names = ["input", *(unit.name for unit in network.units[:-1])]
    kind = onnx.TensorProto.UINT8
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(f"{name}:uint8", kind, [None] * 4) for name in names
    )
    _, *values = run_onnxruntime(onnxruntime, model, images)
    return logits, dict(zip(names, values, strict=True))


def run_onnxruntime(onnxruntime: Any, model: Any, images: Tensor) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # shapes of vectors that are declared as maps
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [torch.from_numpy(v) for v in session.run(None, {"images": images.numpy()})]


def assert_equal_integers(network: IntegerNetwork, images: Tensor) -> None:
    wanted: dict[str, Tensor] = {}
    logits = integers.run(network, images, values=wanted)
    found, values = values_of_onnxruntime(network, images)
    assert values.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(values[name].reshape(value.shape), value), name
    assert torch.equal(found, logits)


def compare(seed: int, path: Path) -> None:
    """Compare a random network with ONNX Runtime, with scales that saturate or not."""
    model, images, how = draw(seed)
    compact = write(path, model, size=images.shape[-1], **how)
    assert_equal_integers(compact.integers(), images)


@pytest.mark.parametrize("seed", range(25))
def test_onnx_runtime_computes_the_same_integers(tmp_path: Path, seed: int) -> None:
    compare(seed, tmp_path / "net")


@pytest.mark.slow
def test_onnx_runtime_computes_the_same_integers_of_many_networks(tmp_path: Path) -> None:
    for seed in range(1000, 1300):
        compare(seed, tmp_path / "net")


def compare_mixed(network: IntegerNetwork, images: Tensor, what: object) -> None:
    """Compare a network with float32 between units of int8 with ONNX Runtime."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs the graph")
    pytest.importorskip("onnx", reason="writes the graph")
    channels, size = images.shape[1:3]
    model = qdq.to_onnx(network, in_channels=channels, image_size=size)
    wanted = integers.run(network, images)
    (found,) = run_onnxruntime(onnxruntime, model, images)
    assert found.shape == wanted.shape, what
    error = float((found - wanted).abs().max())
    assert error <= 1e-2 * max(1e-3, float(wanted.abs().max())), (what, error)


def compare_drawn(seed: int, path: Path) -> None:
    nodes, state, images = draw_mixed(seed, is_square=True)
    compact = write_graph(path, nodes, state, {}, shape=images.shape[1:])
    compare_mixed(compact.integers(), images, seed)


def test_onnx_runtime_computes_about_the_same_with_float32_between(tmp_path: Path) -> None:
    for seed in range(8):
        compare_drawn(seed, tmp_path / "net")


@pytest.mark.slow
def test_onnx_runtime_computes_about_the_same_for_many_networks(tmp_path: Path) -> None:
    for seed in range(1000, 1200):
        compare_drawn(seed, tmp_path / "net")


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_runtime_computes_about_the_same_for_networks_of_every_kind(
    tmp_path: Path, name: str
) -> None:
    torch.manual_seed(0)
    compact = write(tmp_path / "net", with_heads(NETWORKS[name]()), size=32)
    compare_mixed(compact.integers(), torch.randn(3, 3, 32, 32), name)


def resnet(arch: str) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(arch, num_classes=10)
    for _ in range(2):
        model(torch.randn(4, 3, 64, 64))
    return model.eval()


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2"])
def test_onnx_runtime_computes_the_same_integers_of_whole_networks(
    tmp_path: Path, arch: str
) -> None:
    compact = write(tmp_path / "net", resnet(arch), size=64)
    assert_equal_integers(compact.integers(), torch.randn(2, 3, 64, 64))
    assert_equal_integers(compact.integers(), torch.randn(1, 3, 96, 65))


def test_a_quantized_file_becomes_onnx(tmp_path: Path, source: Path, images: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs the graph")
    onnx = pytest.importorskip("onnx", reason="reads the graph")
    net, graph = tmp_path / "net", tmp_path / "net.onnx"
    convert(source, net, "--quantize", "int8", "--calibration", images, "--num-images", 8)
    convert(net, graph, "--to", "onnx")
    batch = load_all(images)
    model = onnx.load(graph)
    onnx.checker.check_model(model, full_check=True)
    weights = [t for t in model.graph.initializer if t.name.endswith(":weight:scale")]
    assert weights
    assert all(len(scale.dims) == 1 for scale in weights)
    (found,) = run_onnxruntime(onnxruntime, model, batch)
    assert torch.equal(found, runtime.load(net, backend="torch")(batch))
