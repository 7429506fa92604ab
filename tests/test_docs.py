"""What the documents show is what works."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def execute(*argv: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *argv],
        capture_output=True, text=True, timeout=120, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_library_snippet_of_the_readme_runs(tmp_path: Path) -> None:
    (snippet,) = blocks(README, "python")
    path = tmp_path / "snippet.py"
    path.write_text(snippet)
    assert execute(str(path)).strip() == "90.0% of the weights are zero"


def main_commands(text: str) -> list[str]:
    """Return the flags of every whole `python main.py DATA` command in the shell blocks."""
    joined = "\n".join(blocks(text, "sh")).replace("\\\n", " ")
    found = re.findall(r"^python main\.py (DATA [^#\n]*)", joined, flags=re.M)
    return [flags for flags in found if "..." not in flags]


@pytest.mark.parametrize("flags", main_commands(README))
def test_commands_of_the_readme_are_valid(flags: str) -> None:
    plan = json.loads(execute(str(ROOT / "main.py"), *shlex.split(flags), "--dry-run"))
    assert plan["total_steps"] > 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
