"""Runs of main.py on a GPU, and what the other programs make of them; the same on the CPU."""

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import classify
import export
import main
from cli.report import read_raport

ROOT = Path(__file__).parents[1]
RUN = (
    "--data-backend synthetic --synthetic-batches 6 --arch small_cnn --num-classes 10 -b 8 "
    "--epochs 3 --seed 1 --training-only --sparse-method rigl --sparsity 0.8 --delta-t 2"
).split()


def on(device: torch.device) -> list[str]:
    """Return the flags of a device: mixed precision on a GPU."""
    return ["--cpu"] if device.type == "cpu" else ["--amp", "--dynamic-loss-scale"]


def test_a_run_goes_on_in_another_layout(device: torch.device, tmp_path: Path) -> None:
    flags = [*RUN, *on(device), "--workspace", str(tmp_path)]
    assert main.main([*flags, "--memory-format", "nchw", "--run-epochs", "1"]) == 0
    assert main.main([*flags, "--memory-format", "nhwc", "--resume", "auto"]) == 0
    raport = tmp_path / "experiment_raport.json"
    run = read_raport(raport)
    assert len(run.values("sparse.sparsity")) == 3
    assert all(map(math.isfinite, run.values("train.loss")))
    assert ("gpu.memory" in raport.read_text()) == (device.type == "cuda")


def test_other_programs_read_its_checkpoint(
    device: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([*RUN, *on(device), "--workspace", str(tmp_path), "--run-epochs", "1"]) == 0
    image, compact = tmp_path / "image.png", tmp_path / "network.safetensors"
    Image.new("RGB", (40, 40), (200, 30, 90)).save(image)
    checkpoint = tmp_path / "checkpoint.pth.tar"
    capsys.readouterr()
    assert classify.main(["--resume", str(checkpoint), "--image", str(image), "--cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert classify.main(["--resume", str(checkpoint), "--image", str(image)]) == 0
    assert [line.split()[::2] for line in capsys.readouterr().out.splitlines()] == [
        line.split()[::2] for line in said
    ]
    assert export.main([str(checkpoint), str(compact)]) == 0
    capsys.readouterr()
    assert classify.main(["--model", str(compact), "--image", str(image)]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[::2] == said[0].split()[::2]


def test_a_killed_run_ends_with_the_weights_of_another(
    device: torch.device, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = [*RUN, *on(device), "--deterministic", "--checkpoint-every-steps", "2"]
    # All in processes of their own: what other tests switched in this one may change the sums.
    command = [sys.executable, str(ROOT / "main.py"), *flags, "--workspace"]
    subprocess.run([*command, str(whole)], check=True)
    command += [str(killed), "--resume", "auto"]
    with subprocess.Popen(command) as process:
        while not (killed / "checkpoint.pth.tar").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    subprocess.run(command, check=True)
    states = [
        torch.load(workspace / "checkpoint.pth.tar", weights_only=True)["state_dict"]
        for workspace in (whole, killed)
    ]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
