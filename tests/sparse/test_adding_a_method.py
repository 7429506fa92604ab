"""The walk-through of docs/adding_a_method.md, run as it stands."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import main
import sparse
from tests.documents import blocks, commands

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding_a_method.md"


def run_page(count: int = 2) -> dict[str, Any]:
    code = blocks(PAGE.read_text(), "python")
    assert len(code) == 2
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "page"}
    exec("\n".join(code[:count]), namespace)
    return namespace


def test_the_page_trains_a_sparse_network(capsys: pytest.CaptureFixture[str]) -> None:
    page = run_page()
    sparsifier = page["sparsifier"]
    assert page["loss"].item() < 0.1
    assert capsys.readouterr().out.endswith("at sparsity 0.80\n")
    assert (sparsifier.step, sparsifier.num_updates) == (100, 8)
    for name, mask in sparsifier.masks.items():
        assert int(mask.sum()) == sparsifier.method.num_active[name]
        assert not sparse.prunable(page["model"])[name][~mask].any()


def test_its_state_is_saved_and_belongs_to_it() -> None:
    page = run_page()
    state = page["sparsifier"].state_dict()
    page["sparsifier"].load_state_dict(state)
    page["sparsifier"].remove()
    with pytest.raises(ValueError, match="written by method 'sensitivity', this run uses 'rigl'"):
        sparse.rigl(page["model"], page["optimizer"], sparsity=0.8, t_end=9).load_state_dict(state)


def test_it_traces_on_a_fake_device() -> None:
    method = run_page(1)["Sensitivity"](sparsity=0.8, t_end=10)
    with FakeTensorMode():
        model = torch.nn.Linear(20, 10, device="meta")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier = sparse.Sparsifier(model, optimizer, method)
        model.weight.grad = torch.randn_like(model.weight)
        optimizer.step()
        assert sparsifier.num_updates == 1


def test_its_settings_are_checked() -> None:
    method = run_page(1)["Sensitivity"]
    assert "power" in {field.name for field in dataclasses.fields(method)}
    for settings, words in (
        ({"power": -1.0}, "power must be above 0"),
        ({"power": "much"}, "power must be a finite number, got 'much'"),
        ({"delta_t": 0}, "delta_t must be at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            method(sparsity=0.8, t_end=10, **settings)


def test_main_runs_it_with_its_settings_as_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sensitivity.py").write_text(blocks(PAGE.read_text(), "python")[0])
    (command,) = (c for c in commands(PAGE) if "main.py" in c.words)
    flags = command.words[2:]
    printed = subprocess.check_output(
        [sys.executable, str(ROOT / "main.py"), *flags],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    plan = json.loads(printed)
    assert plan["sparse"]["method"] == "sensitivity:Sensitivity"
    assert (plan["sparse"]["delta_t"], plan["sparse"]["num_updates"]) == (20, 8)
    assert plan["cost"]["training_ratio"] == pytest.approx(plan["cost"]["inference_ratio"])

    # The others in this process: importing torch anew for every run takes too long.
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sensitivity", raising=False)
    flags = tuple(f for f in flags if f != "--dry-run")
    short = "--synthetic-batches 6 --batch-size 8 --seed 1 --delta-t 2 --console dllogger".split()
    assert main.main([*flags, *short, "--run-epochs", "1"]) == 0
    state = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)
    assert state["config"]["sparse_method"] == "sensitivity:Sensitivity"
    assert (state["config"]["power"], state["sparse"]["method"]) == (0.5, "sensitivity")
    assert state["sparse"]["num_updates"] == 3

    assert main.main([*flags, *short, "--resume", "auto"]) == 0
    dense = [f for f in short if f not in ("--delta-t", "2")]
    plain = "--data-backend synthetic --arch small_cnn --num-classes 10 --epochs 2 --cpu".split()
    capsys.readouterr()
    assert main.main([*plain, *dense, "--resume", "auto"]) == 2
    error = capsys.readouterr().err
    assert "with --sparse-method sensitivity:Sensitivity --sparsity 0.8" in error
    assert "--power 0.5" in error
    del sys.modules["sensitivity"]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("sensitivity:Sensitivity", "No module named 'sensitivity'; is it on PYTHONPATH?"),
        ("torch:nn", "must be a class derived from sparse.Allocated"),
        ("sparse:Nothing", "has no attribute 'Nothing'"),
        ("sparse:DropAndGrow", "the class lacks name, due or update"),
        ("lottery", "known are dense, acdc, gap,"),
    ],
)
def test_what_is_no_method_is_refused(
    method: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic = ("--data-backend", "synthetic", "--arch", "small_cnn", "--dry-run")
    assert main.main([*synthetic, "--sparse-method", method, "--sparsity", "0.5"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("main.py: error: ")
    assert error.count("\n") == 1
    assert words in error
