"""What main.py shows on a terminal, and what a pipe gets."""

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from tests.terminal import Terminal

MAIN = Path(__file__).resolve().parents[1] / "main.py"
RUN = (
    "--data-backend synthetic --synthetic-batches 30 --arch small_cnn --image-size 16 --cpu -b 2 "
    "--num-classes 4 --lr 0.01 --seed 3 --epochs 3 -p 30"
).split()
RIGL = "--sparse-method rigl --sparsity 0.9 --delta-t 2 --use-ema 0.9".split()
NUMBER = r"[\d.e+]+"


def run(workspace: Path, *argv: str) -> None:
    """Run main.py in this process."""
    state = torch.get_rng_state()
    assert main.main([*RUN, "--workspace", str(workspace), *argv]) == 0
    torch.set_rng_state(state)


def on_terminal(workspace: Path, *argv: str) -> Terminal:
    """Run main.py in this process with a terminal as its output."""
    terminal = Terminal()
    with terminal.opened() as file, contextlib.redirect_stdout(file):
        run(workspace, *argv)
    return terminal


def piped(workspace: Path, *argv: str) -> list[str]:
    """Run main.py in this process; return the lines of its output."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        run(workspace, *argv)
    return output.getvalue().splitlines()


def records(workspace: Path) -> list[dict[str, Any]]:
    lines = (workspace / "experiment_raport.json").read_text().splitlines()
    return [r for line in lines if (r := json.loads(line.removeprefix("DLLL ")))["type"] == "LOG"]


def kinds(lines: list[str]) -> list[str]:
    """Return the beginnings of lines, up to the first thing that differs between runs."""
    return [re.sub(r"^DLL \S+ \S+ - ", "DLL ", line).split(" : ")[0][:22] for line in lines]


def test_a_terminal_gets_a_bar_and_one_line_per_epoch(tmp_path: Path) -> None:
    terminal = Terminal()
    status = terminal.run(
        [sys.executable, str(MAIN), *RUN, *RIGL, "-p", "1", "--workspace", "results"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert status == 0, terminal.text
    shown = rf"loss {NUMBER}  top-1 {NUMBER}%  ema top-1 {NUMBER}%"
    expected = [
        r"full log: results/experiment_raport\.json",
        "RUNNING EPOCHS FROM 0 TO 3",
        *(rf"epoch {epoch}  {shown}  sparsity 0\.90\d\d" for epoch in range(3)),
        rf"summary  {shown}",
        "Experiment ended",
        r"checkpoint: results/checkpoint\.pth\.tar",
    ]
    text = "\n".join(terminal.lines())
    assert re.fullmatch("\n".join([*expected, ""]), text), text
    assert "DLL" not in terminal.text
    assert re.search(r"\repoch 1: +\d+%\|.*\d\d:\d\d, loss=.*, sparsity=0\.9\r", terminal.text)
    raport = records(tmp_path / "results")
    epochs = [r["data"] for r in raport if len(r["step"]) == 1 and "val.top1" in r["data"]]
    for epoch, data in enumerate(epochs):
        line = f"epoch {epoch}  loss {data['train.loss']:.5f}  top-1 {data['val.top1']:.2f}%"
        assert line in text
    iterations = [r for r in raport if len(r["step"]) == 2 and "train.loss" in r["data"]]
    assert len(iterations) == 90


def test_nvidias_lines_are_had_on_a_terminal_and_are_what_a_pipe_gets(tmp_path: Path) -> None:
    expected = ["DLL PARAMETER project", "DLL PARAMETER seed", "RUNNING EPOCHS FROM 0 "]
    for epoch in range(3):
        records = ("Iteration", "sparse.sp", "train.dat")
        expected += [*(f"DLL Epoch: {epoch} {record}" for record in records), "SAVING"]
    expected += ["DLL Summary: train.los", "Experiment ended"]
    lines = piped(tmp_path, *RIGL)
    assert [k[: len(e)] for k, e in zip(kinds(lines), expected, strict=True)] == expected
    terminal = on_terminal(tmp_path, *RIGL, "--console", "dllogger")
    for kind in expected:  # long lines go on in further ones
        assert sum(k.startswith(kind) for k in kinds(terminal.lines())) == sum(
            k.startswith(kind) for k in kinds(lines)
        )


def test_a_pipe_gets_the_lines_in_short_when_told_so(tmp_path: Path) -> None:
    lines = piped(tmp_path, "--console", "summary", "--training-only", "--no-checkpoints")
    assert lines[0] == f"full log: {tmp_path}/experiment_raport.json"
    heads = ["RUNNING EPOCHS FROM 0 TO 3", "epoch 0", "epoch 1", "epoch 2", "summary"]
    assert [line.split("  ")[0] for line in lines[1:]] == [*heads, "Experiment ended"]


def test_a_terminal_shows_what_an_evaluation_found(tmp_path: Path) -> None:
    run(tmp_path, *RIGL, "--epochs", "1")
    checkpoint = tmp_path / "checkpoint.pth.tar"
    terminal = on_terminal(tmp_path, "--evaluate", "--resume", str(checkpoint))
    text = " ".join(" ".join(terminal.lines()).split())
    assert re.search(
        rf"summary top-1 {NUMBER}% top-5 {NUMBER}% loss {NUMBER} sparsity 0\.90\d\d "
        rf"inference flops {NUMBER} inference ratio {NUMBER} size mb {NUMBER}$",
        text,
    ), text
    assert "DLL" not in terminal.text


def test_messages_and_warnings_are_seen_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "--run-epochs", "1", "--use-ema", "0.9")
    capsys.readouterr()
    checkpoint = tmp_path / "checkpoint.pth.tar"
    terminal = on_terminal(tmp_path, "--resume", str(checkpoint), "--mixup", "0.1")
    assert f"flags changed since {checkpoint}" in "".join(terminal.lines())
    assert capsys.readouterr().err.startswith("WARNING: the averaged weights of ")
