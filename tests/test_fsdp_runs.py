"""main.py --fsdp: what DDP computes, and checkpoints that go from one to the other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import main
from tests.forks import finish, finish_together, losses, state

pytestmark = pytest.mark.distributed

SMALL = (
    "--cpu --data-backend synthetic --synthetic-batches 4 -b 4 --image-size 32 --num-classes 5 "
    "--epochs 2 --print-freq 2 --seed 1 --lr 0.05 --console summary"
)
SPARSE = "--sparse-method {method} --sparsity 0.8 --delta-t 2"
RUNS = {
    "ema": "--arch small_cnn --use-ema 0.9 " + SPARSE.format(method="rigl"),
    "resnet": "--arch resnet18 --amp --amp-dtype bfloat16 " + SPARSE.format(method="rigl"),
    "accumulation": "--arch mobilenet_v1 --width 0.25 --optimizer adamw --lr 0.001 "
    "--optimizer-batch-size 16 " + SPARSE.format(method="set"),
    "float16": "--arch small_cnn --image-size 16 --amp --dynamic-loss-scale "
    + SPARSE.format(method="snfs"),
}


def train(workspace: Path, flags: str, world_size: int = 2) -> dict[str, Any]:
    workspace.mkdir(exist_ok=True)
    argv = [*SMALL.split(), *flags.split(), "--workspace", str(workspace)]
    output = workspace / "output"
    if world_size == 1:
        assert finish(argv, output) == 0, output.read_text()[-3000:]
    else:
        statuses = finish_together(argv, output, world_size)
        assert statuses == [0] * world_size, output.read_text()[-3000:]
    return state(workspace)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare checkpoints: masks exactly, numbers up to the order in which gradients add up."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
        elif isinstance(value, Tensor):
            assert torch.equal(found[name], value), name
        elif not name.endswith(".fused"):  # torch's fused SGD takes no sharded weights
            assert found[name] == value, name


@pytest.mark.parametrize("run", RUNS)
def test_sharded_training_is_that_of_ddp(run: str, tmp_path: Path) -> None:
    expected = train(tmp_path / "ddp", RUNS[run])
    assert_same(train(tmp_path / "fsdp", RUNS[run] + " --fsdp"), expected)
    whole, sharded = losses(tmp_path / "ddp"), losses(tmp_path / "fsdp")
    assert sharded == pytest.approx(whole, rel=1e-3, abs=1e-5)


def test_a_run_goes_on_sharded_whole_or_alone(tmp_path: Path) -> None:
    flags = RUNS["ema"]
    expected = train(tmp_path / "at once", flags)
    for number, (first, then) in enumerate([("--fsdp", ""), ("", "--fsdp"), ("--fsdp", "--fsdp")]):
        workspace = tmp_path / str(number)
        train(workspace, f"{flags} {first} --run-epochs 1")
        assert_same(train(workspace, f"{flags} {then} --resume auto"), expected)
    validated = train(tmp_path / "0", f"{flags} --resume auto --evaluate", world_size=1)
    assert_same(validated, expected)


@pytest.mark.slow
def test_a_vision_transformer_is_that_of_ddp(tmp_path: Path) -> None:
    flags = (
        "--arch vit_b_32 --image-size 224 -b 1 --synthetic-batches 3 --run-epochs 1 "
        "--include *in_proj_weight " + SPARSE.format(method="set")
    )
    expected = train(tmp_path / "ddp", flags)
    assert_same(train(tmp_path / "fsdp", flags + " --fsdp"), expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--memory-format nhwc", "--fsdp shards contiguous weights only"),
        ("--optimizer apex-sgd", "--optimizer apex-sgd takes no sharded weights"),
        ("--grad-compress bf16", "--grad-compress is for the all-reduce of DDP"),
    ],
)
def test_what_sharding_excludes_is_refused(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([*SMALL.split(), "--fsdp", *flags.split(), "--dry-run"]) == 2
    assert message in capsys.readouterr().err
