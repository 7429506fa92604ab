"""--from-sparse: runs of main.py that begin with the weights and masks of a file."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import export
from sparse.training.checkpoints import read_masks
from tests import forks
from tests.test_resume_flags import ACDC, SMALL, first_epoch, load, refusal, run, train

STATIC = "--sparse-method static".split()
RIGL = "--sparse-method rigl --delta-t 2 --drop-fraction 0.5".split()
UNIFORM = "--distribution uniform".split()
GMP = ["--sparse-method", "gmp", "--prune-every", "1", *UNIFORM]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of small_cnn whose layers are at 70%, but for the first one."""
    workspace = tmp_path_factory.mktemp("source")
    flags = [*RIGL, *UNIFORM, "--sparsity", "0.7"]
    return first_epoch(workspace, *flags)


def masks(workspace: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = read_masks(load(workspace)["sparse"])
    return found


def counts(found: dict[str, Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in found.items() if not mask.all()}


def with_zeros(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: mask for name, mask in found.items() if not mask.all()}


def assert_equal(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_static_keeps_weights_and_masks(source: Path, tmp_path: Path) -> None:
    out = train(tmp_path, *STATIC, "--from-sparse", str(source), "--lr", "0", "--wd", "0")
    assert f"starting from {source}" in out
    assert "layers have masks" in out
    before = load(source.parent)
    assert_equal(with_zeros(masks(tmp_path)), with_zeros(masks(source.parent)))
    weights = load(tmp_path)["state_dict"]
    for name in masks(tmp_path):
        assert torch.equal(weights[name], before["state_dict"][name])
    train(tmp_path / "trained", *STATIC, "--from-sparse", str(source))
    assert_equal(with_zeros(masks(tmp_path / "trained")), with_zeros(masks(source.parent)))
    weights = load(tmp_path / "trained")["state_dict"]
    for name, mask in masks(tmp_path).items():
        assert not weights[name][~mask].any()


@pytest.mark.parametrize("method", ["rigl", "set", "snfs"])
def test_methods_that_move_connections_keep_their_number(
    source: Path, tmp_path: Path, method: str
) -> None:
    flags = ["--sparse-method", method, *RIGL[2:]]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, *flags, "--from-sparse", str(source))
    before, after = masks(source.parent), masks(whole)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    total = sum(counts(before).values())
    if method == "snfs":
        assert sum(counts(after).values()) == pytest.approx(total, rel=0.02)
    else:
        assert counts(after) == counts(before)
    # Going on needs neither the flag nor the file.
    shutil.copy(source, tmp_path / "copy.pth.tar")
    train(parts, *flags, "--from-sparse", str(tmp_path / "copy.pth.tar"), "--run-epochs", "1")
    (tmp_path / "copy.pth.tar").unlink()
    out = train(parts, *flags, "--resume", "auto")
    assert "->" not in out
    assert load(parts)["config"]["from_sparse"] == str(tmp_path / "copy.pth.tar")
    assert_equal(load(parts)["state_dict"], load(whole)["state_dict"])
    assert_equal(masks(parts), masks(whole))


def test_gmp_prunes_further_and_revives_nothing(source: Path, tmp_path: Path) -> None:
    flags = [*GMP, "--sparsity", "0.9"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, *flags, "--from-sparse", str(source), epochs="4")
    before, after = masks(source.parent), masks(whole)
    assert not any((after[name] & ~before[name]).any() for name in before)
    for name, count in counts(before).items():
        assert count == pytest.approx(0.3 * before[name].numel(), abs=1)
        assert int(after[name].sum()) == round(0.1 * after[name].numel())
    for argv in (["--from-sparse", str(source)], [], ["--from-sparse", str(source)]):
        # A job that is put into the queue again repeats the whole command.
        train(parts, *flags, *argv, "--resume", "auto", "--run-epochs", "1", epochs="4")
    train(parts, *flags, "--resume", "auto", epochs="4")
    assert_equal(load(parts)["state_dict"], load(whole)["state_dict"])
    line = refusal(tmp_path / "new", *GMP, "--from-sparse", str(source))
    assert line.endswith("--sparse-method gmp needs --sparsity: the final one")
    line = refusal(tmp_path / "new", *GMP, "--sparsity", "0.5", "--from-sparse", str(source))
    assert "weights left, this run would keep" in line


GRANET = "--sparse-method granet --delta-t 1 --sparsity 0.9".split()
GAP = (
    "--sparse-method gap --partitions features.[0-3].* features.[5-9].* --phase-epochs 0.34 "
    "--num-phases 3"
).split()
SRIGL = "--sparse-method srigl --delta-t 2".split()


@pytest.mark.parametrize("flags", [GRANET, GAP, SRIGL], ids=lambda flags: flags[1])
def test_other_methods_go_on_from_masks(source: Path, tmp_path: Path, flags: list[str]) -> None:
    if flags is SRIGL:
        source = first_epoch(tmp_path / "source", *SRIGL, "--sparsity", "0.7")
    begin = ["--from-sparse", str(source)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    status, out, err = run(tmp_path, "--dry-run", "--epochs", "2", *flags, *begin)
    assert status == 0, err
    plan = json.loads(out)["sparse"]
    train(whole, *flags, *begin)
    before, after = masks(source.parent), masks(whole)
    assert any(not torch.equal(after[name], before[name]) for name in with_zeros(before))
    total = sum(int(mask.sum()) for mask in after.values())
    size = sum(torch.Size(layer["shape"]).numel() for layer in plan["layers"])
    if flags is GRANET:
        assert plan["overall_sparsity"] == pytest.approx(0.9, abs=1e-4)
        assert total == round((1 - plan["overall_sparsity"]) * size)
    elif flags is GAP:
        active = {layer["name"]: layer["num_active"] for layer in plan["layers"]}
        assert counts(after) == counts(before) == {name: active[name] for name in counts(after)}
    else:
        assert sum(counts(after).values()) <= sum(counts(before).values())
    train(parts, *flags, *begin, "--run-epochs", "1")
    train(parts, *flags, "--resume", "auto")
    assert_equal(load(parts)["state_dict"], load(whole)["state_dict"])
    assert_equal(masks(parts), masks(whole))


def test_a_compact_file_begins_a_run(source: Path, tmp_path: Path) -> None:
    compact = tmp_path / "network.safetensors"
    assert export.main([str(source), str(compact)]) == 0
    train(tmp_path / "run", *STATIC, "--from-sparse", str(compact))
    assert_equal(with_zeros(masks(tmp_path / "run")), with_zeros(masks(source.parent)))


def test_other_classes_start_a_new_head(source: Path, tmp_path: Path) -> None:
    flags = [*RIGL, "--from-sparse", str(source), "--num-classes", "7"]
    line = refusal(tmp_path / "new", *flags)
    assert "has 4 classes, the network 7: --new-head" in line
    train(tmp_path, *flags, "--new-head")
    before = counts(masks(source.parent))
    del before["fc.weight"]
    assert counts(masks(tmp_path)) == before
    head = load(tmp_path)["state_dict"]["fc.weight"]
    assert len(head) == 7
    assert head.all()
    train(tmp_path / "again", *RIGL, "--from-sparse", str(source), "--new-head")
    assert load(tmp_path / "again")["state_dict"]["fc.weight"].all()


def test_what_contradicts_the_masks_is_refused(source: Path, tmp_path: Path) -> None:
    begin = ["--from-sparse", str(source)]
    dense = first_epoch(tmp_path / "dense")
    for argv, reason in (
        ([*RIGL, "--sparsity", "0.8"], "leave the sparsity out, and the masks decide"),
        ([*RIGL, "--dense-layers", "fc"], "dense_layers has no effect without sparsity"),
        ([*STATIC, "--distribution", "uniform"], "distribution has no effect without sparsity"),
        ("--sparse-method magnitude --sparsity 0.9".split(), "magnitude chooses its own masks"),
        ([*ACDC], "acdc begins dense, where no mask has an effect; --pretrained-from-file with"),
        ("--sparse-method srigl --delta-t 2".split(), "srigl needs masks with as many weights in"),
        ([], "--from-sparse needs a --sparse-method"),
        ([*STATIC, "--pretrained-from-file", str(source)], "leave it or --pretrained-from-file"),
        ([*STATIC, "--drop-masks"], "leave it or --drop-masks out"),
        ([*STATIC, "--evaluate"], "leave it or --evaluate out"),
        ([*STATIC, "--arch", "resnet18"], "does not fit --arch resnet18"),
        ([*STATIC, "--from-sparse", str(dense)], "has no masks with zeros"),
        ([*STATIC, "--from-sparse", "missing"], "missing does not exist"),
    ):
        line = refusal(tmp_path / "run", *begin, *argv)
        assert reason in line, line
        assert line.startswith("main.py: error: ")
    train(
        tmp_path / "same", *RIGL, *begin, *UNIFORM, "--sparsity", "0.7"
    )  # which is what the masks have
    path = first_epoch(tmp_path / "other", *RIGL, "--sparsity", "0.9")
    line = refusal(tmp_path / "other", *RIGL, *begin, "--resume", "auto")
    assert f"{path} was not begun with --from-sparse" in line
    line = refusal(tmp_path / "other", *RIGL, "--resume", "auto")
    assert line.endswith("--sparse-method rigl needs --sparsity")


def test_a_plan_has_the_counts_of_the_masks(source: Path, tmp_path: Path) -> None:
    begin = ["--dry-run", "--epochs", "2", "--from-sparse", str(source)]
    for argv in (RIGL, [*GMP, "--sparsity", "0.9"]):
        status, out, err = run(tmp_path, *begin, *argv)
        assert status == 0, err
        plan = json.loads(out)
        active = {layer["name"]: layer["num_active"] for layer in plan["sparse"]["layers"]}
        before = {name: int(mask.sum()) for name, mask in masks(source.parent).items()}
        if "rigl" in argv:
            assert {name: active[name] for name in before} == before
            assert plan["sparse"]["distribution"] is None
        else:
            assert sum(active.values()) < sum(before.values())
            assert plan["cost"]["inference_ratio"] < plan["cost"]["training_ratio"] < 1


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_begin_with_the_same_masks(source: Path, tmp_path: Path) -> None:
    argv = [*SMALL, "--epochs", "1", "--workspace", str(tmp_path), *RIGL]
    argv += ["--from-sparse", str(source)]
    status = forks.finish_together([*argv, "--fsdp"], tmp_path / "log")
    assert status == [0, 0], (tmp_path / "log").read_text()[-2000:]
    assert counts(masks(tmp_path)) == counts(masks(source.parent))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_dense_network_is_pruned_at_once(tmp_path: Path, scope: str) -> None:
    dense = first_epoch(tmp_path / "dense")
    weights = load(tmp_path / "dense")["state_dict"]
    flags = ["--sparse-method", "magnitude", "--sparsity", "0.8", "--scope", scope]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    begin = ["--pretrained-from-file", str(dense)]
    train(whole, *flags, *begin)
    found = masks(whole)
    flat = torch.cat([weights[name].abs().flatten() for name in found])
    for name, mask in found.items():
        kept, pruned = weights[name][mask].abs(), weights[name][~mask].abs()
        if scope == "global":
            assert kept.min() >= flat.sort().values[-sum(int(m.sum()) for m in found.values())]
        assert not len(pruned) or kept.min() >= pruned.max()
        assert not load(whole)["state_dict"][name][~mask].any()
    status, out, err = run(tmp_path / "plan", *flags, "--dry-run", "--epochs", "2")
    assert status == 0, err
    plan = json.loads(out)["sparse"]
    active = {layer["name"]: layer["num_active"] for layer in plan["layers"]}
    if scope == "layer":
        assert counts(found) == {name: active[name] for name in counts(found)}
    zeros = sum(int((~mask).sum()) for mask in found.values())
    size = sum(w.numel() for name, w in weights.items() if name in active)
    assert plan["overall_sparsity"] == pytest.approx(zeros / size)
    train(parts, *flags, *begin, "--run-epochs", "1")
    train(parts, *flags, "--resume", "auto")
    assert_equal(load(parts)["state_dict"], load(whole)["state_dict"])
    # Pruning in rounds: what one round pruned, the next one does not bring back.
    begin = ["--pretrained-from-file", str(whole / "checkpoint.pth.tar"), "--drop-masks"]
    train(tmp_path / "next", *flags, "--sparsity", "0.9", *begin)
    after = masks(tmp_path / "next")
    assert not any((after[name] & ~mask).any() for name, mask in found.items() if name in after)
