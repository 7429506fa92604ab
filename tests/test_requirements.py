"""The promised versions: what is refused, what is installed, what was tested last."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from image_classification.versions import OLDEST, OTHERS

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = sorted(
    path.relative_to(ROOT)
    for folder in (ROOT, ROOT / "cli", ROOT / "image_classification")
    for path in folder.glob("*.py")
    if '\nif __name__ == "__main__":\n' in path.read_text()
)


def requirements(name: str) -> dict[str, Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    found = [Requirement(line) for line in lines if line and not line.startswith("-r")]
    return {re.sub(r"[-_.]+", "-", requirement.name).lower(): requirement for requirement in found}


def start(program: Path, *flags: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Run a program where the directory `path` says which versions are installed."""
    module = ".".join(program.with_suffix("").parts)
    return subprocess.run(
        [sys.executable, "-m", module, *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def pretend(folder: Path, package: str, version: str) -> None:
    """Write the metadata of a package, which is found before that of the one installed."""
    metadata = folder / f"{package}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_every_program_refuses_an_older_torch_in_one_line(program: Path, tmp_path: Path) -> None:
    assert len(PROGRAMS) == 9
    pretend(tmp_path, "torch", "2.9.0a0+145a3a7bda.nv25.10")
    result = start(program, path=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(
        f"{program.name}: error: torch 2.9.0a0+145a3a7bda.nv25.10 is too old, "
        f"{OLDEST['torch']} is the oldest supported: pip install "
    )
    assert result.stderr.count("\n") == 1


def test_an_older_torchvision_is_refused(tmp_path: Path) -> None:
    pretend(tmp_path, "torchvision", "0.23.0+cu128")
    result = start(Path("costs.py"), path=tmp_path)
    assert result.returncode == 2
    assert "torchvision 0.23.0+cu128 is too old" in result.stderr


@pytest.mark.parametrize("version", ["2.10.0a0+b558c986e8.nv25.11", "2.12.0.dev20260101+cu130"])
def test_development_builds_of_newer_releases_are_taken(version: str, tmp_path: Path) -> None:
    pretend(tmp_path, "torch", version)
    assert start(Path("multiproc.py"), "--help", path=tmp_path).returncode == 0
    # as the Dockerfile installs beside the torch of the base image
    kept = (
        requirements("requirements.txt")["torch"].specifier
        & Requirement(f"torch=={version}").specifier
    )
    assert version in kept


def test_an_environment_without_torch_is_told_how_to_get_it(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    python = tmp_path / "bin" / "python"
    result = subprocess.run([python, ROOT / "main.py"], capture_output=True, text=True)
    assert result.returncode == 2
    assert re.fullmatch(rf"main.py: error: {python} has no torch: pip install .*\n", result.stderr)


def test_a_missing_package_is_told_like_an_old_one(tmp_path: Path) -> None:
    """As where only the requirements of the library are installed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    (packages,) = tmp_path.glob("lib/python*/site-packages")
    for missing in (*OLDEST, *OTHERS):
        result = subprocess.run(
            [tmp_path / "bin" / "python", ROOT / "costs.py"], capture_output=True, text=True
        )
        assert result.returncode == 2
        assert f" has no {missing}: pip install " in result.stderr
        assert result.stderr.count("\n") == 1
        pretend(packages, missing, "99.0")
    assert {*OTHERS} < {*requirements("requirements.txt")}


def test_the_check_agrees_with_the_requirements() -> None:
    bounds = {
        name: str(requirement.specifier)
        for name, requirement in requirements("requirements.txt").items()
        if str(requirement.specifier)
    }
    assert bounds == {name: f">={version}" for name, version in OLDEST.items()}


def test_constraints_are_exact_complete_and_allowed() -> None:
    exact = requirements("constraints.txt")
    direct = requirements("requirements.txt") | requirements("requirements-dev.txt")
    assert direct.keys() <= exact.keys(), "bash scripts/constraints.sh writes the file"
    for name, constraint in exact.items():
        (clause,) = constraint.specifier
        assert clause.operator == "==", constraint
        assert "*" not in clause.version
        assert "+" not in clause.version, "of an index of its own"
        if name in direct:
            assert clause.version in direct[name].specifier, constraint


def wheel(folder: Path, package: str, version: str, code: str) -> None:
    info = f"{package}-{version}.dist-info"
    files = {
        f"{package}.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"{package}-{version}-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in files))


def test_oldest_makes_and_keeps_an_environment_of_the_lowest_versions(tmp_path: Path) -> None:
    """The scripts as they are, with packages of our own that stand for torch and pytest."""
    for number in ("1.5", "1.6", "2.0"):
        wheel(tmp_path, "engine", number, f"version = {number!r}")
    wheel(tmp_path, "pytest", "1.0", "import engine, sys; print(engine.version, sys.argv[1:])")
    (tmp_path / "scripts").mkdir()
    for name in ("venv.sh", "test.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    (tmp_path / "requirements.txt").write_text("engine>=1.5\n")
    (tmp_path / "requirements-dev.txt").write_text("-r requirements.txt\npytest\n")
    environment = {
        **os.environ,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "BASE_PYTHON": sys.executable,
        "PYTHON": "/bin/false",  # is for runs in one environment
    }

    def test(*arguments: str) -> list[str]:
        command = ["bash", str(tmp_path / "scripts" / "test.sh"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    note = "installing the requirements into .venv-oldest (a few minutes, once)"
    shared = "'-q', '-n', 'auto', '--maxprocesses', '4', '--dist', 'loadfile'"
    assert test("--oldest", "-m", "slow") == [note, f"1.5 [{shared}, '-m', 'slow']"]
    assert test("--oldest") == [f"1.5 [{shared}]"]
    for alone in ("tests/x.py::y", "--pdb", "-n3", "-s"):
        assert test("--oldest", "-m", "slow", alone) == [f"1.5 ['-q', '-m', 'slow', '{alone}']"]
    (tmp_path / "requirements.txt").write_text("engine>=1.6\n")
    assert test("--oldest") == [note, f"1.6 [{shared}]"]
