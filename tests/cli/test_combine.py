"""P-GaP: runs from one checkpoint that grow a partition each, and the network of all of them."""

import contextlib
import io
from pathlib import Path

import pytest
import torch

import main
from cli import combine
from image_classification import checkpoint
from sparse.training.checkpoints import read_masks

SMALL = (
    "--data-backend synthetic --synthetic-batches 3 --arch small_cnn --image-size 16 --cpu -b 4 "
    "--num-classes 4 --lr 0.05 --seed 3 --training-only --epochs 1"
).split()
PARTS = ["features.[0-4].*", "features.[5-9].*,features.10.*"]


def train(workspace: Path, *argv: str) -> Path:
    """Train with one partition dense, to the end of which it is pruned."""
    out = io.StringIO()
    gap = "--sparse-method gap --sparsity 0.8 --phase-epochs 1 --num-phases 1".split()
    state = torch.get_rng_state()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main.main([*SMALL, "--workspace", str(workspace), *gap, *argv])
    torch.set_rng_state(state)
    assert status == 0, out.getvalue()
    return workspace / "checkpoint.pth.tar"


def write(target: Path, *runs: Path) -> str:
    out, err = io.StringIO(), io.StringIO()
    words = [str(target), "--runs", *map(str, runs), "--partitions", *PARTS]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = combine.main(words)
    return out.getvalue() if status == 0 else f"{status}: {err.getvalue()}"


def test_two_rounds(tmp_path: Path) -> None:
    turns = [PARTS, PARTS[::-1]]
    start: list[str] = []
    before: dict[str, torch.Tensor] = {}
    for number in range(2):
        runs = [
            train(tmp_path / f"{number}.{index}", "--partitions", *parts, *start)
            for index, parts in enumerate(turns)
        ]
        target = tmp_path / f"combined{number}.pth.tar"
        assert "small_cnn of 2 runs, 80." in write(target, *runs)
        states = [checkpoint.load(path) for path in runs]
        found = checkpoint.load(target)
        masks = read_masks(found["sparse"])
        for name, value in found["state_dict"].items():
            first = name.startswith("fc") or int(name.split(".")[1]) < 5
            assert torch.equal(value, states[0 if first else 1]["state_dict"][name]), name
            if name in masks:
                assert not value[~masks[name]].any()
                assert torch.equal(masks[name], value != 0)
                if before:  # the other partition kept its mask all the time
                    kept = read_masks(states[1 if first else 0]["sparse"])[name]
                    assert torch.equal(kept, before[name])
        before = masks
        start = ["--pretrained-from-file", str(target), "--drop-masks", "--mask-init", "magnitude"]


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--partitions", *PARTS)
    assert write(tmp_path / "new.pth.tar", run).startswith("2: combine: error: --runs names 1, ")
    missing = write(tmp_path / "new.pth.tar", run, tmp_path / "other.pth.tar")
    assert missing.startswith("2: combine: error: ")
    assert missing.count("\n") == 1
    with pytest.raises(ValueError, match="matches nothing"):
        combine.owners(["a.weight"], [["b"]])
    with pytest.raises(ValueError, match=r"a\.weight is in more than one"):
        combine.owners(["a.weight"], [["a"], ["*"]])
