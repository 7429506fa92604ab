"""Resuming with other flags than the checkpoint's: said in the log, or refused in one line."""

import contextlib
import io
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from image_classification import checkpoint

SMALL = (
    "--data-backend synthetic --synthetic-batches 3 --arch small_cnn --image-size 16 --cpu -b 2 "
    "--num-classes 4 --lr 0.01 --seed 3 --training-only -p 1"
).split()
RIGL = "--sparse-method rigl --sparsity 0.9 --delta-t 2".split()


def run(workspace: Path, *argv: str) -> tuple[int, str, str]:
    """Run main.py in this process; return its status, its console and its errors."""
    out, err = io.StringIO(), io.StringIO()
    state = torch.get_rng_state()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main.main([*SMALL, "--workspace", str(workspace), *argv])
    torch.set_rng_state(state)
    return status, out.getvalue(), err.getvalue().strip()


def train(workspace: Path, *argv: str, epochs: str = "2") -> str:
    """Train the first epoch, or what is left; return console and warnings."""
    status, out, err = run(workspace, "--epochs", epochs, *argv)
    assert status == 0, err
    return out + err


def first_epoch(workspace: Path, *argv: str) -> Path:
    train(workspace, "--run-epochs", "1", *argv)
    return workspace / "checkpoint.pth.tar"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refusal(workspace: Path, *argv: str) -> str:
    """Return the one line of a run that is refused before anything is written."""
    before = content(workspace)
    status, _, err = run(workspace, "--epochs", "2", *argv)
    assert status == 2, err
    assert content(workspace) == before
    (line,) = err.splitlines()
    return line


ACDC = (
    "--sparse-method acdc --sparsity 0.8 --dense-warmup-epochs 0.34 --sparse-phase-epochs 1 "
    "--dense-phase-epochs 0.67 --last-dense-epochs 0.67 --last-sparse-epochs 0.67"
).split()


GAP = (
    "--sparse-method gap --sparsity 0.8 --partitions features.[0-3].* features.[5-9].* "
    "--phase-epochs 1 --num-phases 3 --lr-schedule cosine --lr-restarts 1 2 3"
).split()


@pytest.mark.parametrize(
    "phases",
    [GAP, "granet --delta-t 2".split(), "srigl --delta-t 2".split(), [*RIGL, "--block", "1", "4"]],
)
def test_a_run_that_stops_between_phases_ends_as_one_that_does_not(
    tmp_path: Path, phases: list[str]
) -> None:
    argv = phases if "--sparsity" in phases else ["--sparse-method", *phases, "--sparsity", "0.8"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, *argv, epochs="4")
    for _ in range(2):
        train(parts, *argv, "--resume", "auto", "--run-epochs", "1", epochs="4")
    train(parts, *argv, "--resume", "auto", epochs="4")
    one, two = load(whole), load(parts)
    torch.testing.assert_close(one["sparse"]["masks"], two["sparse"]["masks"], rtol=0, atol=0)
    torch.testing.assert_close(one["state_dict"], two["state_dict"], rtol=0, atol=0)
    assert one["sparse"]["num_updates"] == two["sparse"]["num_updates"] >= 3


def test_phases_in_epochs_are_kept_in_epochs(tmp_path: Path) -> None:
    """Stopped in a sparse phase and gone on with, a run ends as without the stop."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, *ACDC, epochs="4")
    train(parts, *ACDC, "--run-epochs", "1", epochs="4")
    assert load(parts)["config"]["sparse_phase_epochs"] == 1
    out = train(parts, *ACDC, "--resume", "auto", "--sparse-phase-epochs", "1", epochs="4")
    assert "->" not in out
    one, two = load(whole), load(parts)
    torch.testing.assert_close(one["sparse"]["masks"], two["sparse"]["masks"], rtol=0, atol=0)
    torch.testing.assert_close(one["state_dict"], two["state_dict"], rtol=0, atol=0)
    assert one["sparse"]["num_updates"] == two["sparse"]["num_updates"] >= 3
    line = refusal(parts, *ACDC, "--sparse-phase-epochs", "0", "--resume", "auto")
    assert "sparse_phase must be at least 1, got 0" in line


def load(workspace: Path) -> dict[str, Any]:
    return checkpoint.load(workspace / "checkpoint.pth.tar")


def edit(workspace: Path, **entries: Any) -> None:
    """Write the checkpoint again with other entries, as another version would have."""
    state = load(workspace) | entries
    shutil.rmtree(workspace)
    checkpoint.save(workspace, state, epoch=state["epoch"], is_best=False)


def without_sparse_flags(state: dict[str, Any]) -> dict[str, Any]:
    """Return the `config` entry as earlier versions wrote it."""
    return {n: v for n, v in state["config"].items() if n in vars(main.Config())}


def sparsity(state: dict[str, Any]) -> float:
    weights = [w for w in state["state_dict"].values() if w.dim() > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize("how", ["auto", "path"])
def test_a_sparse_run_resumed_without_its_flags_is_refused(tmp_path: Path, how: str) -> None:
    path = first_epoch(tmp_path, *RIGL, "--dense-layers", "fc*", "--drop-fraction", "0.2")
    line = refusal(tmp_path, "--resume", "auto" if how == "auto" else str(path))
    assert f"{path} was trained with --sparse-method rigl --sparsity 0.9" in line
    assert "--dense-layers fc* --delta-t 2 --t-end 4 --drop-fraction 0.2" in line
    assert "repeat these flags" in line
    assert "--drop-masks" in line


def test_the_flags_that_a_refusal_names_are_those_to_repeat(tmp_path: Path) -> None:
    layers = tmp_path / "map.yaml"
    layers.write_text("fc: 0.5\n")
    for index, flags in enumerate(
        (
            " ".join(RIGL),
            " ".join([*RIGL, "--block 1 4"]),
            "--sparse-method gmp --sparsity 0.9 --prune-every 2 --scope global",
            "--sparse-method snfs --sparsity 0.8 --redistribution none --t-end-fraction 0.5",
            "--sparse-method snip --sparsity 0.5 --distribution uniform --dense-layers fc feat*0",
            f"--sparse-method static --sparsity 0.7 --sparsity-map {layers}",
        )
    ):
        workspace = tmp_path / str(index)
        first_epoch(workspace, *flags.split())
        line = refusal(workspace, "--resume", "auto")
        named = line.partition("was trained with ")[2].rpartition(": repeat")[0]
        named = named.replace("FILE with {'fc': 0.5}", str(layers))
        assert "flags changed" not in train(workspace, "--resume", "auto", *named.split())


def test_going_on_dense_is_said_and_done(tmp_path: Path) -> None:
    first_epoch(tmp_path, *RIGL)
    assert sparsity(load(tmp_path)) > 0.85
    log = train(tmp_path, "--resume", "auto", "--drop-masks")
    assert "--drop-masks: training goes on dense" in log
    assert "--sparse-method rigl -> dense" in log
    state = load(tmp_path)
    assert state["epoch"] == 2
    assert "sparse" not in state
    assert sparsity(state) < 0.5
    # the same command once more, as a job that is put back into the queue gives it
    train(tmp_path, "--resume", "auto", "--drop-masks", epochs="3")


def test_drop_masks_without_masks_to_drop_is_refused(tmp_path: Path) -> None:
    assert "--drop-masks has no effect" in refusal(tmp_path, "--drop-masks")
    assert "go on with the masks" in refusal(tmp_path, "--drop-masks", "--resume", "auto", *RIGL)


def test_checkpoints_that_do_not_know_their_sparse_flags(tmp_path: Path) -> None:
    first_epoch(tmp_path, *RIGL)
    edit(tmp_path, config=without_sparse_flags(load(tmp_path)))
    line = refusal(tmp_path, "--resume", "auto")
    assert "was trained with --sparse-method rigl (0.9" in line
    assert "--drop-masks" in line
    assert "active weights, this run" in refusal(tmp_path, "--resume", "auto", *RIGL, *LESS)
    train(tmp_path, "--resume", "auto", *RIGL)
    assert sparsity(load(tmp_path)) > 0.85
    assert load(tmp_path)["config"]["delta_t"] == 2


LESS = ["--sparsity", "0.8"]


def test_snfs_without_redistribution_resumes_also_from_older_checkpoints(tmp_path: Path) -> None:
    flags = "--sparse-method snfs --redistribution none --sparsity 0.9 --delta-t 2".split()
    first_epoch(tmp_path / "new", *flags)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    state = load(tmp_path / "old")
    state["sparse"]["method"] = "snfs-fixed"
    edit(tmp_path / "old", sparse=state["sparse"], config=without_sparse_flags(state))
    line = refusal(tmp_path / "old", "--resume", "auto")
    assert "--sparse-method snfs --redistribution none" in line
    for name in ("new", "old"):
        train(tmp_path / name, "--resume", "auto", *flags)
    a, b = (load(tmp_path / name)["state_dict"] for name in ("new", "old"))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert "redistribution" in refusal(tmp_path / "new", "--resume", "auto", *flags[:2], *flags[4:])


@pytest.mark.parametrize("also", [[], RIGL, ["--sparse-method", "gmp", "--sparsity", "0.9"]])
def test_weights_taken_from_a_sparse_checkpoint_lose_their_masks_on_purpose_only(
    tmp_path: Path, also: list[str]
) -> None:
    path = first_epoch(tmp_path / "a", *RIGL)
    (tmp_path / "b").mkdir()
    flags = ["--pretrained-from-file", str(path), *also]
    line = refusal(tmp_path / "b", *flags)
    assert f"{path} was trained with --sparse-method rigl" in line
    assert "--pretrained-from-file takes weights without masks" in line
    log = train(tmp_path / "b", *flags, "--drop-masks")
    assert "--drop-masks: training starts from the weights alone" in log
    # the run's own checkpoint counts from then on
    train(tmp_path / "b", *flags, "--drop-masks", "--resume", "auto", epochs="3")
    first_epoch(tmp_path / "c")
    dense = str(tmp_path / "c" / "checkpoint.pth.tar")
    train(tmp_path / "d", "--pretrained-from-file", dense, *also)


@pytest.mark.parametrize(
    ("trained", "resumed", "told"),
    [
        ("--delta-t 2", "--delta-t 3", "--delta-t 2 -> 3"),
        ("--t-end 5", "--t-end 3", "--t-end 5 -> 3"),
        ("--drop-fraction 0.3", "--drop-fraction 0.1", "--drop-fraction 0.3 -> 0.1"),
        ("", "--grad-compress active", "--grad-compress none -> active"),
        ("", "--weight-decay 0.5", "--weight-decay 0.0001 -> 0.5"),
        ("", "--amp", "--amp False -> True"),
        ("--amp", "", "--amp True -> False"),
        ("--amp", "--amp --amp-dtype bfloat16", "--amp-dtype float16 -> bfloat16"),
        ("--use-ema 0.9", "--use-ema 0.8", "--use-ema 0.9 -> 0.8"),
        ("", "--memory-format nhwc", "--memory-format nchw -> nhwc"),
        ("--momentum 0", "--momentum 0.9", "--momentum 0.0 -> 0.9"),
        ("", "--epochs 4", "--epochs 2 -> 4, --t-end 4 -> 9"),
    ],
)
def test_other_flags_are_said(tmp_path: Path, trained: str, resumed: str, told: str) -> None:
    first_epoch(tmp_path, *RIGL, *trained.split())
    log = train(tmp_path, "--resume", "auto", *RIGL, *resumed.split())
    assert told in log
    state = load(tmp_path)
    assert state["epoch"] == (4 if "epochs" in resumed else 2)
    assert sparsity(state) > 0.85


def test_the_same_flags_are_not_worth_a_word(tmp_path: Path) -> None:
    first_epoch(tmp_path, *RIGL, "--use-ema", "0.9")
    log = train(tmp_path, "--resume", "auto", *RIGL, "--use-ema", "0.9", "-p", "3")
    assert "flags changed" not in log
    assert "WARNING" not in log


def test_settings_of_the_optimizer_are_those_of_the_flags(tmp_path: Path) -> None:
    first_epoch(tmp_path)
    train(tmp_path, "--resume", "auto", "--weight-decay", "0.5", "--momentum", "0.5")
    groups = load(tmp_path)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert {group["momentum"] for group in groups} == {0.5}


@pytest.mark.parametrize(
    "flags", [LESS, "--distribution uniform".split(), "--dense-layers fc".split()]
)
@pytest.mark.parametrize("method", ["static", "magnitude", "set", "rigl", "rigl_reset", "snip"])
def test_counts_that_are_fixed_refuse_another_sparsity(
    tmp_path: Path, method: str, flags: list[str]
) -> None:
    sparse = ["--sparse-method", method, "--sparsity", "0.9"]
    path = first_epoch(tmp_path, *sparse)
    line = refusal(tmp_path, "--resume", "auto", *sparse, *flags)
    assert f"{path} cannot go on with {flags[0]} " in line
    assert " -> " in line


def test_gmp_is_extended_and_made_sparser_but_not_denser(tmp_path: Path) -> None:
    gmp = "--sparse-method gmp --sparsity 0.8 --prune-every 2".split()
    first_epoch(tmp_path, *gmp)
    half = load(tmp_path)
    log = train(tmp_path, "--resume", "auto", *gmp, "--sparsity", "0.9", epochs="6")
    assert "--sparsity 0.8 -> 0.9" in log
    assert "--prune-end 4 -> 13" in log
    for name, mask in half["sparse"]["masks"].items():  # what was pruned stayed so
        assert not (load(tmp_path)["sparse"]["masks"][name]["bits"] & ~mask["bits"]).any()
    assert sparsity(load(tmp_path)) == pytest.approx(0.9, abs=0.01)
    line = refusal(tmp_path, "--resume", "auto", *gmp, *LESS)
    assert "--sparsity 0.9 -> 0.8" in line
    assert "what is pruned does not come back" in line


@pytest.mark.parametrize("method", ["snip", "snfs", "gmp"])
def test_another_method_is_refused(tmp_path: Path, method: str) -> None:
    path = first_epoch(tmp_path, *RIGL)
    line = refusal(tmp_path, "--resume", "auto", "--sparse-method", method, "--sparsity", "0.9")
    assert line.endswith(f"{path} was trained with --sparse-method rigl, not {method}")


def test_a_dense_checkpoint_does_not_go_on_sparse(tmp_path: Path) -> None:
    path = first_epoch(tmp_path)
    line = refusal(tmp_path, "--resume", "auto", *RIGL)
    assert f"{path} was trained dense" in line
    assert "--pretrained-from-file" in line


@pytest.mark.parametrize("pair", [*itertools.permutations(["sgd", "adamw", "rmsprop"], 2)])
def test_another_optimizer_is_refused(tmp_path: Path, pair: tuple[str, str]) -> None:
    trained, other = pair
    path = first_epoch(tmp_path, "--optimizer", trained)
    line = refusal(tmp_path, "--resume", "auto", "--optimizer", other)
    assert f"{path} was trained with --optimizer {trained}, not {other}" in line
    edit(tmp_path, config={})  # a file that does not say so is found out by its content
    assert "it is the state of another optimizer" in refusal(
        tmp_path, "--resume", "auto", "--optimizer", other
    )


def test_averaged_weights_are_not_lost_or_made_up_without_a_word(tmp_path: Path) -> None:
    path = first_epoch(tmp_path, *RIGL)
    line = refusal(tmp_path, "--resume", "auto", *RIGL, "--use-ema", "0.9")
    assert f"{path} has no averaged weights to go on with: leave --use-ema out" in line
    first_epoch(tmp_path, *RIGL, "--use-ema", "0.9")
    log = train(tmp_path, "--resume", "auto", *RIGL)
    assert f"the averaged weights of {path} are not continued: --use-ema is missing" in log


def test_weights_alone_cannot_be_resumed(tmp_path: Path) -> None:
    path = first_epoch(tmp_path, *RIGL)
    state = load(tmp_path)
    masks = {"version": 1, "masks": state["sparse"]["masks"]}
    for sparse in ({"sparse": masks}, {}):  # as converted and exported networks are
        shutil.rmtree(tmp_path)
        kept = {name: state[name] for name in ("epoch", "arch", "state_dict")}
        checkpoint.save(tmp_path, kept | sparse, epoch=0, is_best=False)
        for flags in (RIGL, []):
            line = refusal(tmp_path, "--resume", "auto", *flags)
            assert f"{path} holds weights alone" in line
            assert f"--pretrained-from-file {path}" in line


def validate(workspace: Path, *argv: str) -> tuple[dict[str, Any], str]:
    shown = [word for word in SMALL if word != "--training-only"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main.main([*shown, "--workspace", str(workspace), "--evaluate", *argv]) == 0
    lines = (workspace / "experiment_raport.json").read_text().splitlines()
    logs = [json.loads(line.removeprefix("DLLL ")) for line in lines]
    found = [r["data"] for r in logs if r["type"] == "LOG" and "sparse.sparsity" in r["data"]]
    return found[-1], out.getvalue() + err.getvalue()


def test_an_evaluation_reports_the_sparsity_that_the_weights_have(tmp_path: Path) -> None:
    path = first_epoch(tmp_path, *RIGL, "--use-ema", "0.9")
    for how in ("--resume", "--pretrained-from-file"):
        numbers, log = validate(tmp_path / "eval", how, str(path))
        assert numbers["sparse.sparsity"] == pytest.approx(0.9, abs=0.01)
        assert "WARNING" not in log
    state = load(tmp_path)
    for entry, prefix in (("state_dict", ""), ("ema", "module.")):
        state[entry][f"{prefix}features.3.weight"].fill_(1.0)
    edit(tmp_path, state_dict=state["state_dict"], ema=state["ema"])
    numbers, log = validate(tmp_path / "eval", "--resume", str(path), "--use-ema", "0.9")
    assert numbers["sparse.sparsity"] < 0.85
    assert "weights are not 0 where the masks say so" in log
    assert "averaged weights are not 0 where the masks say so" in log
    assert "of them in features.3.weight" in log
    log = train(tmp_path, "--resume", "auto", *RIGL, "--use-ema", "0.9")
    assert "weights are not 0 where the masks say so" in log


def test_averaged_weights_are_named_where_they_are_not_evaluated(tmp_path: Path) -> None:
    path = first_epoch(tmp_path, "--use-ema", "0.9")
    _, log = validate(tmp_path / "eval", "--resume", str(path))
    assert f"{path} has averaged weights, too: --use-ema evaluates them" in log


def test_a_plan_refuses_what_the_run_would(tmp_path: Path) -> None:
    assert "drop_fraction" in refusal(tmp_path, "--dry-run", *RIGL, "--drop-fraction", "2")


def test_another_memory_format_gives_the_same_network(tmp_path: Path) -> None:
    # SGD and fixed masks: rounding, which depends on the layout, stays small
    flags = "--use-ema 0.9 --sparse-method static --sparsity 0.5".split()
    for before, after in itertools.product(["nchw", "nhwc"], repeat=2):
        workspace = tmp_path / (before + after)
        first_epoch(workspace, *flags, "--memory-format", before)
        train(workspace, "--resume", "auto", *flags, "--memory-format", after)
    one, *others = (load(path) for path in sorted(tmp_path.iterdir()))
    for other in others:
        for entry in ("state_dict", "ema"):
            for name, value in one[entry].items():
                assert torch.allclose(value, other[entry][name], atol=1e-4), name


def test_a_run_that_begins_beside_the_checkpoints_of_another_says_so(tmp_path: Path) -> None:
    """Killed before its first checkpoint, it would be resumed from those."""
    first_epoch(tmp_path)
    said = train(tmp_path)
    assert f"WARNING: {tmp_path / 'checkpoint.pth.tar'} is of an earlier run" in said
    for argv in (["--resume", "auto"], ["--no-checkpoints"]):
        assert "earlier run" not in train(tmp_path, *argv, epochs="3")
    assert "earlier run" not in train(tmp_path / "new")
