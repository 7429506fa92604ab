"""What all programs have in common: the help, and one line for a mistake."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import classify
import costs
import export
import main
from cli import convert, report

PROGRAMS = {
    "main.py": main.main,
    "costs.py": costs.main,
    "export.py": export.main,
    "classify.py": classify.main,
    "convert": convert.main,
    "report": report.main,
}
Main = Callable[[Sequence[str]], int]


@pytest.mark.parametrize(("name", "main"), PROGRAMS.items(), ids=PROGRAMS)
def test_a_mistake_is_one_line_and_status_2(
    name: str, main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in (["a", "b", "--no-such-flag"], ["a", "b", "--flagless", "c"]):
        assert main(argv) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(f"{name}: error: ")
        assert argv[2] in printed.err
        assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("costs.py", "--arch", "argument --arch: expected one argument"),
        ("costs.py", "--delta-t many", "--delta-t"),
        ("costs.py", "--distribution best", "--distribution"),
        ("costs.py", "--sparsty 0.9", "did you mean --sparsity?"),
        ("export.py", "a b --dtype int4", "--dtype"),
        ("export.py", "a", "required: output"),
        ("convert", "", "required: source, target"),
        ("report", "", "required: raports"),
        ("classify.py", "a.jpg", "name one with --resume or --model"),
        ("classify.py", "a.jpg --resume b --model c", "--resume and --model exclude each other"),
    ],
)
def test_the_line_names_the_flag(
    name: str, argv: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert PROGRAMS[name](argv.split()) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "argv"),
    [("report", "{run} --plot {file}/new/x.png"), ("costs.py", "--plot {file}/new/x.png")],
)
def test_a_file_that_cannot_be_written_is_told_in_one_line(
    name: str, argv: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"type": "LOG", "step": [0], "data": {"val.top1": 1.0}}
    run = tmp_path / "raport.json"
    run.write_text(f"DLLL {json.dumps(record)}\n")
    assert PROGRAMS[name](argv.format(run=run, file=run).split()) == 2
    printed = capsys.readouterr().err
    assert f"{run}/new/x.png: Not a directory" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("flag", ["--config", "--sparsity-map"])
def test_a_file_of_flags_that_is_no_text_is_told(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "flags.yaml"
    path.write_bytes(b"fc: \xff\n")
    argv = f"--dry-run --sparse-method static --sparsity 0.5 {flag} {path}"
    assert main.main(argv.split()) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"main.py: error: {flag}")
    assert printed.count("\n") == 1


@pytest.mark.parametrize(("name", "main"), PROGRAMS.items(), ids=PROGRAMS)
def test_the_help_is_told_in_words(
    name: str, main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    usage = text.split()[1:4]
    assert name in usage or f"cli.{name}" in usage
    for jargon in ("type:", "<class", "null", "None", "SUPPRESS", "%("):
        assert jargon not in text, jargon


def test_the_help_shows_defaults_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        costs.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "rigl: steps between updates (default: 100)" in text
    assert "--distribution {uniform,er,erk} how sparsity is spread (default: erk)" in text


def test_an_error_is_written_at_once() -> None:
    """Processes share standard error: a line written in two parts lets others in between."""
    code = "from cli.program import fail; fail('x.py', 'no such thing')"
    reads, writes = os.pipe2(os.O_DIRECT)  # a read returns what one write wrote
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], stderr=writes, cwd=root, check=True)
    os.close(writes)
    assert os.read(reads, 1000) == b"x.py: error: no such thing\n"
    os.close(reads)
