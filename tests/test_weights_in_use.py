"""Weights of others in the programs: fine-tuning them, and RigL's own checkpoints evaluated."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

import export
import main
from cli import convert, foreign, networks, predictions
from image_classification import checkpoint
from image_classification.models import create_model
from sparse import runtime
from tests import pictures
from tests.cli.test_convert import GRAPHS, noise, variables
from tests.test_main import SMALL, last, records, run

SYNTHETIC = "--data-backend synthetic --synthetic-batches 1 -b 2 --image-size 64 --cpu".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 training and 4 validation images of two classes."""
    return pictures.write(tmp_path_factory.mktemp("data"), train=8, val=2)


def start(data: Path, workspace: Path, *flags: str) -> tuple[str, dict[str, Tensor]]:
    """Train an epoch at a learning rate of 0; return what the log says and the weights."""
    still = "--lr 0 --wd 0 --epochs 1 --data-backend pytorch -j 0 --training-only".split()
    done = run(str(data), *SMALL, *still, "--workspace", str(workspace), *flags)
    assert done.returncode == 0, done.stderr
    state = checkpoint.load(workspace / "checkpoint.pth.tar")["state_dict"]
    return done.stdout + done.stderr, state


def the_mistake(data: Path, workspace: Path, *flags: str) -> str:
    done = run(str(data), *SMALL, "--workspace", str(workspace), *flags)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    return line


def test_training_starts_from_files_that_convert_reads(data: Path, tmp_path: Path) -> None:
    source = create_model("small_cnn", num_classes=2).state_dict()
    safetensors.torch.save_file(source, tmp_path / "in.safetensors")
    torch.save({"model": {f"module.{k}": v for k, v in source.items()}}, tmp_path / "in.pth")
    for name, entry in (("in.safetensors", ""), ("in.pth", ", entry 'model'")):
        file = tmp_path / name
        said, state = start(data, tmp_path / "run", "--pretrained-from-file", str(file))
        assert f"starting from {file}{entry}: {len(source)} of the {len(source)} tensors" in said
        assert "left out: nothing" in said
        assert all(torch.equal(state[k], v) for k, v in source.items() if k.endswith("weight"))


def test_another_number_of_classes_needs_a_new_head(data: Path, tmp_path: Path) -> None:
    source = create_model("small_cnn", num_classes=5).state_dict()
    torch.save(source, tmp_path / "five.pth")
    flags = ["--pretrained-from-file", str(tmp_path / "five.pth")]
    line = the_mistake(data, tmp_path / "run", *flags)
    assert "five.pth has 5 classes, the network 2: --new-head" in line
    said, state = start(data, tmp_path / "run", *flags, "--new-head")
    head = [name for name in source if name.startswith(list(source)[-1].rpartition(".")[0])]
    assert len(head) == 2
    assert f"left out: {', '.join(head)}" in said
    assert {name for name in source if state[name].shape != source[name].shape} == {*head}
    body = [name for name in source if name.endswith("weight") and name not in head]
    assert all(torch.equal(state[name], source[name]) for name in body)


def test_a_new_head_is_new_for_as_many_classes_too(data: Path, tmp_path: Path) -> None:
    source = create_model("small_cnn", num_classes=2).state_dict()
    torch.save(source, tmp_path / "two.pth")
    flags = ["--pretrained-from-file", str(tmp_path / "two.pth"), "--new-head"]
    _, state = start(data, tmp_path / "run", *flags)
    *_, bias = source
    assert not torch.equal(state[bias], source[bias])


def test_weights_that_cannot_be_started_from_are_one_line(data: Path, tmp_path: Path) -> None:
    torch.save(create_model("resnet18", num_classes=2).state_dict(), tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:-999])
    for name, words in {
        "other.pth": "other.pth does not fit --arch small_cnn: it is no small_cnn",
        "cut.pth": "truncated or damaged",
    }.items():
        flags = ["--pretrained-from-file", str(tmp_path / name)]
        assert words in the_mistake(data, tmp_path / "run", *flags)
    assert "has no effect without --pretrained" in the_mistake(data, tmp_path, "--new-head")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that comes of the RigL repository's ResNet-50, as its graph was run."""
    path = tmp_path_factory.mktemp("converted") / "ours.pth.tar"
    found = foreign.from_tf(variables("resnet50"), "tf_resnet50")
    assert found.arch is not None
    convert.write(found, path, arch=found.arch)
    return path


def assert_logits_of_tensorflow(model: nn.Module | runtime.Network, atol: float = 1e-5) -> None:
    image = torch.from_numpy(noise("image", (1, 64, 64, 3)).astype(np.float32))
    with torch.no_grad():
        logits = model(image.permute(0, 3, 1, 2).contiguous())[0, :100]
    wanted = torch.tensor(GRAPHS["resnet50"]["logits"])
    torch.testing.assert_close(torch.as_tensor(logits), wanted, rtol=0, atol=atol)


def test_a_tensorflow_checkpoint_is_evaluated_as_its_graph(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--evaluate", "--resume", str(converted), *SYNTHETIC, "--workspace", str(tmp_path)]
    with contextlib.ExitStack() as stack:
        evaluate = main.prepare(argv, stack)
        evaluate()
        assert_logits_of_tensorflow(evaluate.__self__.trainer.model)
    assert "arch : tf_resnet50" in capsys.readouterr().out
    assert last(records(tmp_path), "sparse.sparsity") > 0.35


def test_a_tensorflow_checkpoint_is_exported_as_its_graph(converted: Path, tmp_path: Path) -> None:
    def convert_to(target: Path, *flags: str) -> Path:
        words = [str(converted), str(target), *flags]
        export.run(export.PROGRAM.parse(words))
        return target

    compact = convert_to(tmp_path / "net.safetensors")
    assert_logits_of_tensorflow(runtime.load(compact, backend="torch"), atol=1e-4)
    header = runtime.read(compact).header
    assert (header.arch, header.interpolation) == ("tf_resnet50", "tensorflow")
    again = convert_to(tmp_path / "back.pth.tar", "--to", "torch")
    trained = networks.read_checkpoint(again)
    assert_logits_of_tensorflow(trained.model())
    assert trained.interpolation == "tensorflow"


@pytest.mark.slow
def test_the_compiled_kernels_give_the_logits_of_tensorflow(
    converted: Path, tmp_path: Path
) -> None:
    target = tmp_path / "net.safetensors"
    export.run(export.PROGRAM.parse([str(converted), str(target)]))
    assert_logits_of_tensorflow(runtime.load(target, tune=False), atol=1e-4)


def test_a_checkpoint_is_evaluated_as_the_arch_that_is_named(
    converted: Path, tmp_path: Path
) -> None:
    """Where its weights fit, and the log says so."""
    state = checkpoint.load(converted)
    checkpoint.write(tmp_path / "plain.pth.tar", {**state, "arch": "resnet50"})
    argv = ["--evaluate", "--resume", str(tmp_path / "plain.pth.tar"), "--arch", "tf_resnet50"]
    done = run(*argv, *SYNTHETIC, "--workspace", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "plain.pth.tar holds resnet50, evaluated as tf_resnet50" in done.stdout


def test_the_geometry_of_the_original_is_told_apart(converted: Path, tmp_path: Path) -> None:
    pictures.write(tmp_path / "data", train=1, val=1)
    state = checkpoint.load(converted)
    two_classes = create_model("tf_resnet50", num_classes=2).state_dict()
    checkpoint.write(tmp_path / "two.pth.tar", {**state, "state_dict": two_classes, "sparse": None})
    argv = [str(tmp_path / "data"), "--evaluate", "--resume", str(tmp_path / "two.pth.tar")]
    argv += "--cpu -b 2 -j 1 --data-backend pytorch --image-size 32".split()
    plain = run(*argv, "--workspace", str(tmp_path / "plain"))
    original = run(*argv, "--interpolation", "tensorflow", "--workspace", str(tmp_path / "tf"))
    assert (plain.returncode, original.returncode) == (0, 0), plain.stderr + original.stderr
    told = "was trained with --interpolation tensorflow, images are resized with bilinear"
    assert told in plain.stdout
    assert told not in original.stdout
    assert last(records(tmp_path / "plain"), "val.loss") != last(
        records(tmp_path / "tf"), "val.loss"
    )


def test_images_are_seen_as_the_checkpoint_was_trained(tmp_path: Path) -> None:
    """classify.py: the original's crop comes before its filter."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (90, 121, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    ours, theirs = (
        predictions.load_image(tmp_path / "x.png", image_size=32, interpolation=name)
        for name in ("bicubic", "tensorflow")
    )
    assert ours.shape == theirs.shape
    assert float(theirs.std()) > 1.5 * float(ours.std())  # noise that no filter has averaged
