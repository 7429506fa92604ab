"""The demo, as a newcomer runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_demo_ends_with_a_table_and_a_picture(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "scripts/demo.sh", "--epochs", "1", "--output", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    table = {line.split()[0]: line.split() for line in done.stdout.splitlines()[-5:-2]}
    assert [row[1] for row in table.values()] == ["0.0%", "90.0%", "90.0%"]
    assert table.keys() == {"dense", "static", "rigl"}
    with Image.open(tmp_path / "report.png") as picture:
        assert min(picture.size) > 500
