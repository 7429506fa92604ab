"""The fixture `device` is the one way to a GPU."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


FILE = """
import pytest

def test_taken(device):
    pass

@pytest.mark.gpu
def test_plain():
    pass

@pytest.mark.gpu
def test_both(device):
    pass

@pytest.mark.gpu
@pytest.mark.parametrize("width", [1])
def test_wide(width):
    pass
"""


def test_bodies_for_gpus_alone_are_refused(tmp_path: Path) -> None:
    shutil.copy(TESTS / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(FILE)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--strict-markers", "-o", "markers=gpu", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    named = result.stderr.strip().partition("not the mark gpu, but the fixture `device`: ")[2]
    assert named.split(", ") == [
        "test_it.py::test_plain",
        "test_it.py::test_both[cpu]",
        "test_it.py::test_wide[1]",
    ]


def test_no_test_is_skipped_by_another_condition_on_cuda() -> None:
    condition = re.compile(r"skipif\([^)]*cuda")
    assert not [path for path in TESTS.rglob("*.py") if condition.search(path.read_text())]
