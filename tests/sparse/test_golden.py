"""The recorded outputs of the original implementations, and the program that checks them."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.golden import check_directory

GOLDEN = Path(__file__).parents[1] / "golden"
ROOT = GOLDEN.parents[1]


def test_every_recorded_output() -> None:
    results = list(check_directory(GOLDEN))
    assert [(case, reason) for case, reason in results if reason is not None] == []
    assert len(results) >= 390


def test_a_wrong_output_fails_and_is_named(tmp_path: Path) -> None:
    good = GOLDEN / "tf1_rigl_fc_s0.8_d0.3.npz"
    shutil.copy(good, tmp_path)
    data = dict(np.load(good))
    data["expected_mask"] = 1 - data["expected_mask"]
    np.savez(tmp_path / "tf1_rigl_wrong.npz", **data)
    (tmp_path / "other.json").write_text("{}")
    result = subprocess.run(
        [sys.executable, "-m", "tests.golden", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = result.stdout.splitlines()
    assert result.returncode == 1
    assert lines[0].startswith("FAILED other.json")
    assert lines[1].startswith(
        "FAILED tf1_rigl_wrong.npz: update: MismatchError: mask: 384 entries"
    )
    assert lines[2:] == ["1 passed, 2 failed"]
