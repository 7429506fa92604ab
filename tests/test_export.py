"""export.py on real checkpoints: to a compact file, back, and to ONNX."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import classify
import export
import sparse
from cli import networks
from cli.weights import read_sparse
from image_classification import checkpoint
from image_classification.config import Config
from image_classification.models import create_model, factory
from image_classification.models.spec import ModelSpec
from sparse import runtime

ROOT = Path(export.__file__).parent


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Set torch's switches as a training without --tf32 does: its exporter alone fails then."""
    part = torch.backends.cudnn.conv
    before, part.fp32_precision = part.fp32_precision, "ieee"
    yield
    part.fp32_precision = before


def train(
    directory: Path,
    *,
    method: bool = True,
    block: tuple[int, int] | None = None,
    **options: object,
) -> tuple[Path, nn.Module]:
    """Write the checkpoint of a small sparse network after a step, and return it with the network.

    One connection is active with the value 0, as after a topology update.
    """
    flags = {"data": "x", "arch": "small_cnn", "num_classes": 4, "image_size": 40} | options
    config = Config(**flags)
    torch.manual_seed(0)
    model = create_model(config.arch, num_classes=4, stem=config.stem, width=config.width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = {"sparsity": 0.8, "distribution": "erk", "seed": 1, "block": block}
    sparsifier = sparse.static(model, optimizer, **rule)
    model(torch.randn(4, 3, 40, 40)).sum().backward()
    optimizer.step()
    if method:
        weight = model.features[3].weight
        active = sparsifier.masks["features.3.weight"].nonzero()[0]
        weight.data[tuple(active)] = 0.0
    state = {
        "epoch": 1,
        "arch": config.arch,
        "state_dict": model.state_dict(),
        "ema": {"n_averaged": torch.tensor(1)}
        | {f"module.{n}": v * 2 if v.is_floating_point() else v for n, v in state_of(model)},
        "config": {**vars(config), **({"block": list(block)} if block else {})},
    }
    if method:
        state["sparse"] = sparsifier.state_dict()
    return checkpoint.save(directory, state, epoch=1, is_best=False), model.eval()


def state_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    return list(model.state_dict().items())


def convert(*arguments: object) -> str:
    return export.run(export.PROGRAM.parse([str(a) for a in arguments]))


def assert_same_state(found: dict[str, Tensor], model: nn.Module, factor: float = 1.0) -> None:
    wanted = model.state_dict()
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        expected = value * factor if value.is_floating_point() else value
        assert torch.equal(found[name], expected), name


def test_there_and_back_gives_the_same_state_dict(tmp_path: Path) -> None:
    source, model = train(tmp_path / "run")
    compact, back = tmp_path / "net.safetensors", tmp_path / "back.pth.tar"
    convert(source, compact, "--keep-batch-norm")
    convert(compact, back, "--to", "torch")
    state = checkpoint.load(back)
    assert state["arch"] == "small_cnn"
    assert_same_state(state["state_dict"], model)


def test_an_output_that_exists_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    source, model = train(tmp_path / "run")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "net.pth.tar").write_text("what was there")
    convert(source, folder / "net.pth.tar", "--to", "torch")
    assert [path.name for path in folder.iterdir()] == ["net.pth.tar"]
    assert_same_state(checkpoint.load(folder / "net.pth.tar")["state_dict"], model)


def test_a_folded_file_gives_back_the_folded_network_bit_for_bit(tmp_path: Path) -> None:
    source, model = train(tmp_path / "run")
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    convert(source, first)
    convert(first, tmp_path / "back.pth.tar", "--to", "torch")
    folded = checkpoint.load(tmp_path / "back.pth.tar")["state_dict"]
    assert list(folded) == list(model.state_dict())
    convert(tmp_path / "back.pth.tar", second, "--keep-batch-norm")
    stored = runtime.read(second).state_dict()
    assert all(torch.equal(stored[name], value) for name, value in folded.items())
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        wanted = model(images)
        model.load_state_dict(folded)
        assert torch.allclose(model(images), wanted, rtol=1e-4, atol=1e-5)


def test_masks_come_from_the_sparsifier_and_else_from_the_zeros(tmp_path: Path) -> None:
    with_masks, _ = train(tmp_path / "a")
    without, _ = train(tmp_path / "b", method=False)
    for source, inactive_zeros in ((with_masks, 1), (without, 0)):
        convert(source, tmp_path / "net")
        compact = runtime.read(tmp_path / "net")
        weight = compact.state_dict()["features.3.weight"]
        mask = compact.masks()["features.3.weight"]
        assert int((weight[mask] == 0).sum()) == inactive_zeros
        assert not weight[~mask].any()


def test_the_exported_network_computes_what_the_model_computes(tmp_path: Path) -> None:
    source, model = train(tmp_path / "run")
    convert(source, tmp_path / "net")
    network = runtime.load(tmp_path / "net", backend="torch")
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.allclose(network(images), model(images), rtol=1e-4, atol=1e-5)
    header = network.header
    assert (header.arch, header.image_size, header.interpolation) == ("small_cnn", 40, "bilinear")
    assert header.model == {"num_classes": 4, "stem": "imagenet", "width": 1.0}


def test_the_average_of_the_weights_on_request(tmp_path: Path) -> None:
    source, model = train(tmp_path / "run")
    convert(source, tmp_path / "net", "--ema", "--keep-batch-norm")
    assert_same_state(runtime.read(tmp_path / "net").state_dict(), model, factor=2.0)


BLOCKED = {f"features.{layer}.weight": (1, 4) for layer in (3, 6, 9)}  # fc is full


@pytest.mark.parametrize("options", [[], ["--ema"], ["--keep-batch-norm"], ["--dtype", "int8"]])
def test_a_network_of_blocks_has_a_bit_per_block_in_every_file(
    tmp_path: Path, options: list[str]
) -> None:
    source, _ = train(tmp_path / "run", block=(1, 4))
    single, net, again = (tmp_path / name for name in ("single", "net", "again"))
    convert(source, net, *options)
    found = runtime.read(net)
    assert found.header.blocks == BLOCKED
    masks = networks.read(source).masks
    for name, mask in read_sparse(net).masks.items():
        assert torch.equal(mask, masks[name])
    if "--ema" not in options:
        convert(net, again, *options)
        assert runtime.read(again).header.blocks == BLOCKED
        if "--dtype" not in options:  # which rounds anew
            assert_same_content(again, found)
    # the same network with a bit per weight
    trained = networks.read(source, ema="--ema" in options)
    plain = dataclasses.replace(trained, block=None)
    dtype, fold = "int8" if "int8" in options else "float32", "--keep-batch-norm" not in options
    networks.write_compact(plain, single, dtype=dtype, fold=fold)
    assert not runtime.read(single).header.blocks
    assert_same_content(single, found)
    bits = sum(masks[name].numel() for name in BLOCKED) / 8
    sizes = {path: path.stat().st_size - header_size(path) for path in (single, net)}
    assert sizes[single] - sizes[net] == pytest.approx(bits * 3 / 4, abs=8)


@pytest.mark.parametrize("options", [[], ["--dtype", "int8"], ["--keep-batch-norm"]])
def test_the_way_over_a_checkpoint_keeps_masks_and_blocks(
    tmp_path: Path, options: list[str]
) -> None:
    source, _ = train(tmp_path / "run", block=(1, 4), interpolation="bicubic")
    net, back, again = (tmp_path / name for name in ("net", "back.pth.tar", "again"))
    convert(source, net, *options)
    convert(net, back, "--to", "torch")
    convert(back, again, *options)
    first, second = map(runtime.read, (net, again))
    assert first.header.blocks
    assert second.header == first.header
    assert second.masks().keys() == first.masks().keys()  # also those of layers without a zero
    for name, mask in first.masks().items():  # also of active weights that are 0
        assert torch.equal(second.masks()[name], mask)
    assert read_sparse(back).config["block"] == [1, 4]


def test_the_way_over_a_checkpoint_finds_no_blocks_that_no_run_had(tmp_path: Path) -> None:
    source, _ = train(tmp_path / "run", block=(1, 4))
    state = checkpoint.load(source)
    del state["config"]["block"]  # masks that happen to consist of whole blocks
    checkpoint.write(source, state)
    convert(source, tmp_path / "net")
    convert(tmp_path / "net", tmp_path / "back.pth.tar", "--to", "torch")
    convert(tmp_path / "back.pth.tar", tmp_path / "again")
    first, second = (runtime.read(tmp_path / name) for name in ("net", "again"))
    assert second.header == first.header
    assert not first.header.blocks
    assert_same_content(tmp_path / "again", first)


def test_a_dense_network_stays_dense_on_the_way_over_a_checkpoint(tmp_path: Path) -> None:
    source, _ = train(tmp_path / "run", method=False)
    state = checkpoint.load(source)
    weights = create_model("small_cnn", num_classes=4).state_dict()
    checkpoint.write(source, state | {"state_dict": weights})
    convert(source, tmp_path / "net")
    convert(tmp_path / "net", tmp_path / "back.pth.tar", "--to", "torch")
    assert "sparse" not in checkpoint.load(tmp_path / "back.pth.tar")


def foreign_file(path: Path, arch: str, mean: float = 0.5) -> Path:
    """Write the compact file of a network that main.py has not trained."""
    model = create_model("small_cnn", num_classes=4).eval()
    nodes = runtime.trace(model, image_size=40)
    rule: dict[str, Any] = {"arch": arch, "model": {"num_classes": 4}, "image_size": 40}
    normalization = {"mean": (mean,) * 3, "std": (0.25,) * 3}
    runtime.save(path, model.state_dict(), {}, nodes=nodes, **rule, **normalization)
    return path


def test_the_normalization_of_a_file_stays_with_what_is_made_of_it(tmp_path: Path) -> None:
    net = foreign_file(tmp_path / "net", "small_cnn")
    convert(net, tmp_path / "again")
    convert(net, tmp_path / "smaller", "--compact-channels")
    for name in ("again", "smaller"):
        header = runtime.read(tmp_path / name).header
        assert (header.mean, header.std) == ((0.5,) * 3, (0.25,) * 3)
    with pytest.raises(ValueError, match=r"normalized with mean \(0\.5, .* those of main\.py with"):
        convert(net, tmp_path / "back.pth.tar", "--to", "torch")
    assert not (tmp_path / "back.pth.tar").exists()


@pytest.mark.parametrize("to", ["compact", "torch", "onnx"])
def test_a_file_of_an_unknown_architecture_is_no_source(tmp_path: Path, to: str) -> None:
    net = foreign_file(tmp_path / "net", "mine")
    with pytest.raises(ValueError, match=r"no architecture 'mine' .*sparse\.runtime\.save"):
        convert(net, tmp_path / "out", "--to", to)
    assert not (tmp_path / "out").exists()


def header_size(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def assert_same_content(path: Path, wanted: runtime.Compact) -> None:
    found = runtime.read(path)
    for one, other in ((found.state_dict(), wanted.state_dict()), (found.masks(), wanted.masks())):
        assert list(one) == list(other)
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_whatever_is_made_of_a_file_with_blocks_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    source, model = train(tmp_path / "run", block=(2, 2))
    net, images = tmp_path / "net", torch.randn(2, 3, 40, 40)
    convert(source, net)
    assert set(runtime.read(net).header.blocks.values()) == {(2, 2)}
    with torch.no_grad():
        wanted = model(images)
        found = runtime.load(net, backend="torch")(images)
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    flags = "--to", "plan", "--level", "portable", "--image-size", 48, "--no-tune"
    for start in (source, net):
        convert(start, tmp_path / f"{start.name}.plan", *flags)
        convert(start, tmp_path / f"{start.name}.pth.tar", "--to", "torch")
    plans = [tmp_path / f"{start.name}.plan" for start in (source, net)]
    assert plans[0].read_bytes() == plans[1].read_bytes()
    state = checkpoint.load(tmp_path / "net.pth.tar")["state_dict"]
    assert all(torch.equal(runtime.read(net).state_dict()[n], value) for n, value in state.items())
    lines = []
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)).save(picture)
    for flags in (["--model", str(net)], ["--resume", str(source), "--cpu"]):
        told = classify.report(classify.PROGRAM.parse([str(picture), *flags])).splitlines()
        lines.append([line for line in told if " ms for " not in line])
    assert lines[0] == lines[1]


def test_channels_that_go_may_break_blocks(tmp_path: Path) -> None:
    source, _ = train(tmp_path / "run", block=(1, 4))
    state = checkpoint.load(source)
    state["state_dict"]["features.0.weight"][:3] = 0
    state["state_dict"]["features.1.bias"][:3] = 0
    checkpoint.write(source, state)
    convert(source, tmp_path / "net", "--compact-channels")
    found = runtime.read(tmp_path / "net")
    assert "features.3.weight" not in found.header.blocks  # has 29 inputs
    assert found.header.blocks["features.6.weight"] == (1, 4)
    convert(source, tmp_path / "whole")
    network, whole = (runtime.load(tmp_path / n, backend="torch") for n in ("net", "whole"))
    images = torch.randn(2, 3, 40, 40)
    assert torch.allclose(network(images), whole(images), rtol=1e-4, atol=1e-5)


def test_onnx_computes_what_the_model_computes(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs onnx and onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs the graph")
    source, model = train(tmp_path / "run", block=(1, 4))
    convert(source, tmp_path / "net")
    assert runtime.read(tmp_path / "net").header.blocks
    images = torch.randn(3, 3, 40, 40)
    with torch.no_grad():
        wanted = model(images)
    starts = source, tmp_path / "net"
    # in a process of its own: where a training has set the precision, torch's exporter fails
    code = (
        "import sys, export\nfor s in sys.argv[1:]: export.main([s, f'{s}.onnx', '--to', 'onnx'])"
    )
    subprocess.run([sys.executable, "-c", code, *starts], cwd=ROOT, check=True)
    for start in starts:
        session = onnxruntime.InferenceSession(f"{start}.onnx")
        (found,) = session.run(None, {"images": images.numpy()})
        assert torch.allclose(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)


def train_with_dead_channels(directory: Path) -> tuple[Path, nn.Module]:
    """Write a checkpoint in which 20 channels of two layers are dead, and return the network."""
    source, model = train(directory)
    state = checkpoint.load(source)
    for conv, norm in (("features.0", "features.1"), ("features.3", "features.4")):
        state["state_dict"][f"{conv}.weight"][:20] = 0
        state["state_dict"][f"{norm}.bias"][:20] = -0.5
    checkpoint.write(source, state)
    model.load_state_dict(state["state_dict"])
    return source, model


def test_compact_channels_computes_the_same_as_compact_file_and_as_program(tmp_path: Path) -> None:
    source, model = train_with_dead_channels(tmp_path / "run")
    images = torch.randn(3, 3, 40, 40)
    with torch.no_grad():
        wanted = model(images)
    for options in ([], ["--keep-batch-norm"]):
        told = convert(source, tmp_path / "net", "--compact-channels", *options)
        assert "\nremoved 40 of 292 channels and 10.9 of 30.9 million multiply-adds" in told
        network = runtime.load(tmp_path / "net", backend="torch")
        assert network.state_dict()["features.3.weight"].shape == (44, 12, 3, 3)
        assert torch.allclose(network(images), wanted, rtol=1e-5, atol=1e-5)
    convert(source, tmp_path / "net.pt2", "--compact-channels", "--to", "torch")
    program = torch.export.load(tmp_path / "net.pt2")
    assert program.state_dict["features.3.weight"].shape == (44, 12, 3, 3)
    for batch in (1, 3):
        found = program.module()(images[:batch])
        assert torch.allclose(found, wanted[:batch], rtol=1e-5, atol=1e-5)


def test_compact_channels_computes_the_same_as_onnx(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="reads the graph")
    pytest.importorskip("onnxscript", reason="needs onnx and onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs the graph")
    source, model = train_with_dead_channels(tmp_path / "run")
    images = torch.randn(3, 3, 40, 40)
    given = [str(source), str(tmp_path / "net.onnx"), "--to", "onnx", "--compact-channels"]
    # in a process of its own, as above
    subprocess.run([sys.executable, "export.py", *given], cwd=ROOT, check=True)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (found,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(found), model(images), rtol=1e-5, atol=1e-5)
    stored = onnx.load(tmp_path / "net.onnx").graph.initializer
    assert [44, 12, 3, 3] in [list(tensor.dims) for tensor in stored]


@pytest.mark.parametrize("to", ["torch", "onnx"])
def test_a_file_of_compact_channels_is_no_checkpoint(tmp_path: Path, to: str) -> None:
    source, _ = train_with_dead_channels(tmp_path / "run")
    convert(source, tmp_path / "net", "--compact-channels")
    with pytest.raises(
        ValueError, match=r"small_cnn does not have .* convert the checkpoint instead"
    ):
        convert(tmp_path / "net", tmp_path / "out", "--to", to)
    assert not (tmp_path / "out").exists()


def test_depthwise_convolutions_lose_channels_with_those_before_them(tmp_path: Path) -> None:
    source, target = tmp_path / "mobilenet", tmp_path / "net.pt2"
    torch.manual_seed(0)
    model = create_model("mobilenet_v2", num_classes=2).eval()
    model.features[3].conv[1][0].weight.data[5:] = 0  # depthwise, of 144 channels
    config = {**vars(Config()), "arch": "mobilenet_v2", "image_size": 64}
    state = {"epoch": 0, "arch": "mobilenet_v2", "state_dict": model.state_dict()}
    checkpoint.write(source, state | {"config": config})
    told = convert(source, target, "--compact-channels", "--to", "torch")
    assert "removed 278 of " in told  # also of the convolution before it
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = torch.export.load(target).module()(images)
        assert torch.allclose(found, model(images), rtol=1e-5, atol=1e-5)
        compact = tmp_path / "net.safetensors"
        assert "removed 278 of " in convert(source, compact, "--compact-channels")
        found = runtime.load(compact, tune=False)(images)
        assert torch.allclose(found, model(images), rtol=1e-4, atol=1e-5)


def unknown_swin(num_classes: int) -> nn.Module:
    """Return a network with an activation that the runtime does not know."""
    model = create_model("swin_t", num_classes=num_classes)
    model.features[1][0].mlp[1] = nn.Softplus()
    return model


@pytest.mark.slow
def test_networks_that_the_runtime_does_not_know_lose_channels_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(factory.OWN, "swin", ModelSpec(create=unknown_swin, image_size=64))
    source, target = tmp_path / "swin", tmp_path / "net.pt2"
    model = create_model("swin", num_classes=2).eval()
    model.features[1][0].mlp[0].weight.data[:50] = 0
    config = {**vars(Config()), "arch": "swin", "image_size": 64}
    state = {"epoch": 0, "arch": "swin", "state_dict": model.state_dict()}
    checkpoint.write(source, state | {"config": config})
    with pytest.raises(ValueError, match="the runtime does not know"):
        convert(source, target, "--compact-channels")
    assert not target.exists()
    told = convert(source, target, "--compact-channels", "--to", "torch")
    assert "removed " in told


def test_a_plan_is_the_same_from_the_checkpoint_and_from_the_compact_file(tmp_path: Path) -> None:
    source, _ = train(tmp_path / "run")
    compact, first, second = (tmp_path / name for name in ("net", "first", "second"))
    convert(source, compact)
    flags = "--to", "plan", "--level", "portable", "--image-size", 48, "--threads", 2, "--no-tune"
    told = convert(source, first, *flags)
    assert told.endswith(" masked weights active, level portable, not tuned")
    convert(compact, second, *flags)
    assert first.read_bytes() == second.read_bytes()
    convert(source, second, "--ema", *flags)
    assert first.read_bytes() != second.read_bytes()


def test_a_plan_of_fewer_channels_is_written_from_either_file(tmp_path: Path) -> None:
    source, _ = train(tmp_path / "run")
    state = checkpoint.load(source)
    state["state_dict"]["features.0.weight"][3] = 0
    state["state_dict"]["features.1.weight"][3] = 0
    checkpoint.write(source, state)
    compact, first, second = (tmp_path / name for name in ("net", "first", "second"))
    flags = "--to", "plan", "--no-tune"
    assert "removed " in convert(source, first, "--compact-channels", *flags)
    convert(source, compact, "--compact-channels")
    convert(compact, second, *flags)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "out"], "missing cannot be read: No such file"),
        (["net", "out", "--ema"], "--ema needs a checkpoint"),
        (["net", "out", "--to", "onnx", "--keep-batch-norm"], "--keep-batch-norm have no effect"),
        (["net", "out", "--to", "plan", "--dtype", "int8"], "--dtype and .* no effect .* plan"),
        (["net", "out", "--level", "avx2", "--no-tune"], "--level, --no-tune only with --to plan"),
        (["net", "out", "--to", "plan", "--level", "sse"], "level must be one of .*, got 'sse'"),
        (["net", "out", "--to", "plan", "--threads", "0"], "threads must be 1 to 1024, got 0"),
        (["net", "no/out", "--to", "plan", "--no-tune"], "no/out cannot be written"),
        (["net", "no/such/directory/out"], "cannot be written"),
        (["net", "no/out", "--compact-channels", "--to", "torch"], "no/out cannot be written"),
        (["net", "out", "--compact-channels=2"], "compact-channels"),
        (["cut", "out"], "cut .*damaged"),
        (["zip", "out"], "zip "),
        (["net"], "required: output"),
    ],
)
def test_mistakes_are_told_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    source, _ = train(tmp_path / "run")
    convert(source, "net")
    Path("cut").write_bytes(Path("net").read_bytes()[:-100])
    Path("zip").write_bytes(source.read_bytes()[:-100])
    assert export.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("export.py: error: ")
    assert error.count("\n") == 1
    assert not Path("out").exists()
    with pytest.raises(ValueError, match=message):
        convert(*arguments)


def test_the_command_line_says_what_it_wrote(tmp_path: Path) -> None:
    source, _ = train(tmp_path / "run")
    target = tmp_path / "net.safetensors"
    command = [sys.executable, "export.py", str(source), str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    masks = runtime.read(target).masks().values()
    active, total = sum(int(m.sum()) for m in masks), sum(m.numel() for m in masks)
    assert f"{target}: small_cnn, " in done.stdout
    assert f", {active} of {total} masked weights active" in done.stdout
    assert not done.stderr


def test_classify_runs_the_exported_file_and_ranks_as_with_the_checkpoint(tmp_path: Path) -> None:
    source, _ = train(tmp_path / "run")
    convert(source, tmp_path / "net")
    images = []
    for i in range(3):
        images.append(tmp_path / f"{i}.png")
        pixels = np.random.default_rng(i).integers(0, 255, (50, 60, 3), np.uint8)
        Image.fromarray(pixels).save(images[-1])

    def lines_of(*arguments: object) -> list[str]:
        return classify.report(classify.PROGRAM.parse([str(a) for a in arguments])).splitlines()

    trained = lines_of(*images, "--resume", source, "--cpu", "--topk", 2)
    for options in ([], ["--batch"]):
        exported = lines_of(*images, "--model", tmp_path / "net", "--topk", 2, *options)
        times = [line for line in exported if " ms for " in line]
        assert [line for line in exported if line not in times] == trained
        assert len(times) == (1 if options else 3)
    with pytest.raises(ValueError, match="--batch has no effect"):
        lines_of(images[0], "--resume", source, "--batch")
    with pytest.raises(ValueError, match="there is no image"):
        lines_of("--model", tmp_path / "net")
