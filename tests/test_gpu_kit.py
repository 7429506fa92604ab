"""The kit for GPUs: its figures come on any device, and without a GPU it says so in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from image_classification.data import has_dali

pytestmark = pytest.mark.filterwarnings(  # workers are forked, from Python 3.12 on with a warning
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)

ROOT = Path(__file__).parents[1]
SMALL = gpu.Size(
    arch="shufflenet_v2_x0_5", image_size=32, batch_size=4, rounds=1, batches=2, workers=1
)


@pytest.mark.parametrize(
    "command", [["bash", "scripts/gpu_check.sh"], [sys.executable, "benchmarks/gpu.py", "--json"]]
)
def test_without_a_gpu_there_is_one_line(command: list[str]) -> None:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("error: torch finds no GPU on this machine\n")
    assert done.stderr.count("\n") == 1


def test_every_figure_comes_on_any_device(device: torch.device) -> None:
    report = gpu.measure(device, SMALL, photos=False)
    assert json.loads(json.dumps(report)) == report
    for precision in gpu.PRECISIONS:
        assert report["steps"][precision]["dense_images_per_second"] > 0
        # The host waits in no ordinary step.
        found = report["host_syncs"][precision]
        assert not any(count for name, count in found.items() if name.endswith("_step"))
    for method in gpu.METHODS:
        assert report["updates"][method]["update_ms"] > 0
        assert report["operations"][method]["step"] > 0
    assert set(report["images_per_second"]) == {"synthetic_dense", "synthetic_rigl"}
    table = gpu.markdown(report)
    installed, update = (report["operations"]["rigl"][name] for name in ("install", "update"))
    assert f"| rigl | {installed} | {update} |" in table


def test_loaders_are_measured_on_photos(device: torch.device, tmp_path: Path) -> None:
    gpu.write_photos(tmp_path, SMALL.batches * SMALL.batch_size)
    assert gpu.loader_speed(device, SMALL, tmp_path, "pytorch") > 0
    if has_dali():
        assert all(gpu.decoder_speed(device, SMALL, tmp_path, whole=w) > 0 for w in (False, True))
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.jpg")]
    assert len(sizes) == SMALL.batches * SMALL.batch_size
    assert all(50_000 < size < 200_000 for size in sizes)
