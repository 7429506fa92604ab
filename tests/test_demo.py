"""The demo, as a newcomer runs it."""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from tests.terminal import ROWS, Terminal

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable}
METHODS = ("dense", "static", "rigl")
RUN = r"(\w+) +epoch  1/1  loss \d+\.\d{4}  top-1 [ \d]+\.\d\d%  sparsity +([\d.]+)%"


def demo(output: Path) -> list[str]:
    return ["bash", "scripts/demo.sh", "--epochs", "1", "--output", str(output)]


def check(lines: list[str], output: Path) -> None:
    """Check what stands there when the demo has ended."""
    assert lines[0].startswith("1,797 handwritten digits, three runs (epochs: 1); log: ")
    text = "\n".join(lines)
    assert str(output / "demo.log") in text.replace("\n", "")
    runs = [match for line in lines if (match := re.fullmatch(RUN, line))]
    sparsity = ["0.0", "90.0", "90.0"]
    assert [run[1] for run in runs] == list(METHODS)
    assert [run[2] for run in runs] == sparsity
    first = next(n for n, line in enumerate(lines) if line.startswith("method "))
    table = [line.split() for line in lines[first + 1 : first + 4]]
    assert [row[0] for row in table] == list(METHODS)
    assert [row[1] for row in table] == [f"{share}%" for share in sparsity]
    assert str(output / "report.png") in text.replace("\n", "")
    with Image.open(output / "report.png") as picture:
        assert min(picture.size) > 500
    log = (output / "demo.log").read_text()
    assert log.count("RUNNING EPOCHS FROM 0 TO 1") == 3
    assert log.count(" - Epoch: 0 Iteration: 20 train.loss : ") == 3


@pytest.mark.slow
def test_a_pipe_gets_plain_lines_and_the_commands_to_try_next_work(tmp_path: Path) -> None:
    done = subprocess.run(
        demo(tmp_path), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert not {"\r", "\033"} & set(done.stdout)
    assert "DLL" not in done.stdout
    assert "starting" not in done.stdout
    check(done.stdout.splitlines(), tmp_path)
    suggested = done.stdout.partition("Try next:\n")[2].replace("\\\n", " ").splitlines()
    commands = [line for line in suggested if not line.strip().startswith("#")]
    assert len(commands) == 3
    for command in commands:
        subprocess.run(shlex.split(command), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_terminal_shows_one_live_line_per_run() -> None:
    terminal = Terminal()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a short name, as that of the default
        assert terminal.run(demo(Path(folder)), ROOT, ENVIRONMENT) == 0, terminal.text
        check(terminal.lines(), Path(folder))
    assert "DLL" not in terminal.text
    assert len(terminal.lines()) < ROWS  # the last is that of the prompt, one is the command's
    for method in METHODS:  # each line was written over and over
        assert re.search(rf"\r\x1b\[K{method} +starting\r", terminal.text)
        assert re.search(rf"\r\x1b\[K{method} +epoch  1/1 .* sparsity .*%\r", terminal.text)


def test_flags_that_main_py_refuses_end_the_demo_with_its_words(tmp_path: Path) -> None:
    terminal = Terminal()
    assert terminal.run([*demo(tmp_path), "--epochs", "0"], ROOT, ENVIRONMENT) == 2
    text = "".join(terminal.lines())
    assert "main.py: error: --epochs must be at least 1, got 0" in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_a_run_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "dense").touch()  # where its workspace should be
    terminal = Terminal()
    assert terminal.run(demo(tmp_path), ROOT, ENVIRONMENT) == 2
    text = "".join(terminal.lines())
    assert f"main.py: error: cannot write the raport {tmp_path}/dense/" in text
    assert text.endswith(f"main.py ended with status 2; the whole log: {tmp_path}/demo.log")
    assert len(terminal.lines()) < ROWS
