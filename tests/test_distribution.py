"""The distribution `sparsetrain`: it is built, installed into clean environments and used there."""

import ast
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import sparse
from sparse.native import library
from tests.documents import blocks
from tests.test_requirements import requirements

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("cli", "entry_points", "image_classification", "results", "sparse")
HERE = {*FOLDERS, *(path.stem for path in ROOT.glob("*.py"))}
"""Packages and modules of the checkout."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROGRAMS = list(PROJECT["project"]["scripts"])


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command outside the checkout and without its modules on the path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", "PIP_NO_INPUT": "1", **variables}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def ran(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Return what a command printed that has to succeed."""
    done = run(*command, cwd=cwd, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def contents(wheel: Path) -> dict[str, bytes]:
    """Return the files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what the distribution is made of: a build writes beside it."""
    copy = tmp_path_factory.mktemp("build") / "checkout"
    copy.mkdir()
    files = "*.py", "requirements*.txt", "*.md", "*.toml", "*.in", "*.cff", "LICENSE"
    for path in (path for pattern in files for path in ROOT.glob(pattern)):
        shutil.copy(path, copy)
    shutil.copytree(ROOT / "examples", copy / "examples")
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "prebuilt", "runs")
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    (copy / "tests").mkdir()  # does not belong to the distribution
    shutil.copy(__file__, copy / "tests")
    return copy


@pytest.fixture(scope="module")
def built(checkout: Path) -> Path:
    """Return a folder with the sdist and the wheel that is built from it."""
    folder = checkout.parent / "built"
    ran(sys.executable, "-m", "build", "--no-isolation", "-o", folder, checkout, cwd=folder.parent)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> dict[str, bytes]:
    """Return the files of the wheel."""
    (path,) = built.glob("*.whl")
    return contents(path)


def create(environment: Path, *options: str | Path) -> Path:
    """Make a virtual environment, install into it with pip, return its folder of programs."""
    programs = environment / "bin"
    command = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "--no-deps"]
    ran(*command, "--quiet", *options, cwd=environment)
    return programs


@pytest.fixture(scope="module")
def programs(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the programs of an environment into which pip installed the repository.

    The environment sees the packages of this one, such as torch, but not the checkout.
    """
    if not shutil.which("git"):
        pytest.skip("needs git")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@localhost", "-C", checkout]
    for arguments in ("init --quiet", "add .", "commit --quiet --message x"):
        ran(*git, *arguments.split(), cwd=checkout)
    environment = tmp_path_factory.mktemp("installed")
    venv.create(environment)
    (own,) = environment.glob("lib/python*/site-packages")
    (own / "others.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n"
        for path in site.getsitepackages()))  # fmt: skip
    return create(environment, "--no-build-isolation", f"git+file://{checkout}")


def test_the_sdist_builds_the_wheel_of_the_checkout(
    checkout: Path, wheel: dict[str, bytes]
) -> None:
    for name in ("cli/removed.py", "sparse/runtime/cpp/removed.h"):  # what an earlier build left
        (checkout / "build" / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / "build" / "lib" / name).touch()
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel"]
    ran(*command, "-o", checkout.parent / "direct", checkout, cwd=checkout.parent)
    (path,) = (checkout.parent / "direct").iterdir()
    assert contents(path) == wheel


def test_the_wheel_has_every_file_of_the_packages_and_no_other_name(
    wheel: dict[str, bytes],
) -> None:
    packages = {"sparse": "sparsetrain", "entry_points": "sparsetrain_programs"}
    expected = {f"sparsetrain_programs/{name}.py" for name in ("main", "costs", "export")}
    expected |= {"sparsetrain_programs/classify.py", "sparsetrain_programs/results/table.csv"}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".pyi", ".typed", ".cpp", ".h") or path.name in (
                "py.typed",
                "CMakeLists.txt",
            ):
                package = packages.get(folder, f"sparsetrain_programs/{folder}")
                expected.add(f"{package}/{path.relative_to(ROOT / folder)}")
    found = {name for name in wheel if ".dist-info/" not in name}
    assert found == expected
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_no_installed_file_speaks_of_the_checkout(wheel: dict[str, bytes]) -> None:
    """Neither in an import nor in a text, such as the remedy of an error."""
    commands = (
        r"python -m (cli|image_classification|sparse)\b|\b(main|export|classify|multiproc)\.py"
    )
    for name, content in wheel.items():
        if not name.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(content)):
            if isinstance(node, ast.Import):
                assert not HERE & {alias.name.partition(".")[0] for alias in node.names}, name
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").partition(".")[0] not in HERE, f"{name}:{node.lineno}"
        assert not re.search(commands, content.decode()), name


@pytest.fixture(scope="module")
def described(wheel: dict[str, bytes]) -> Message:
    """Return the metadata of the wheel."""
    (name,) = (name for name in wheel if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel[name].decode())


def test_the_requirements_are_those_of_the_checkout_and_of_the_page(described: Message) -> None:
    found = [Requirement(line) for line in described.get_all("Requires-Dist", [])]
    extras = {extra: {""} for extra in described.get_all("Provides-Extra", [])}
    for needed in found:
        for extra, names in extras.items():
            here = {"platform_system": "Linux", "platform_machine": "x86_64", "extra": extra}
            if "extra" in str(needed.marker) and needed.marker and needed.marker.evaluate(here):
                names.add(needed.name)
    base = {str(needed) for needed in found if not needed.marker}
    assert base == {"torch>=2.9.1", "numpy", "safetensors"}
    assert {extra: names - {""} for extra, names in extras.items()}.items() >= {
        "train": {*requirements("requirements.txt")}
        - {"torch", "numpy", "safetensors", "nvidia-dali-cuda130"},
        "dali": {"nvidia-dali-cuda130"},
        "onnx": {"onnx", "onnxscript"},
        "accelerate": {"accelerate"},
        "lightning": {"lightning"},
        "timm": {"timm"},
        "transformers": {"transformers"},
    }.items()  # fmt: skip
    assert {"pytest", "ruff"}.isdisjoint(needed.name for needed in found)
    page = (ROOT / "docs" / "getting_started.md").read_text()
    assert all(f"`{name}`" in page for name in (*extras, *PROGRAMS))
    tools = (ROOT / "requirements-dev.txt").read_text().splitlines()
    assert {*PROJECT["build-system"]["requires"]} <= {*tools}, "builds need no download"


def test_the_version_is_that_of_the_changelog(described: Message, built: Path) -> None:
    newest = re.search(r"^## (\S+) \((.*)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    version = newest[1] + (".dev0" if newest[2] == "unreleased" else "")
    assert described["Version"] == sparse.__version__ == version
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CHANGELOG.md", "LICENSE", "README.md", "setup.py"} <= names
    embedding = "examples/embedding/classify.c", "sparse/runtime/cpp/include/sparse_runtime.h"
    assert {*embedding, "sparse/runtime/cpp/CMakeLists.txt"} <= names
    assert not any(name.startswith("tests") for name in names)


def test_an_editable_installation_is_refused(checkout: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    done = run(*command, "--target", tmp_path, "--editable", checkout, cwd=tmp_path)
    assert done.returncode != 0
    assert f"put {checkout} on PYTHONPATH instead" in done.stdout + done.stderr
    assert not [*tmp_path.iterdir()]


def test_without_its_requirements_a_program_says_how_to_get_them(
    built: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path)
    programs = create(tmp_path, *built.glob("*.whl"))
    for name in PROGRAMS:
        done = run(programs / name, "--help", cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr == (
            f"{name}: error: {programs / 'python'} has no torch: pip install 'sparsetrain[train]'\n"
        )


def test_pip_installs_the_repository(programs: Path, wheel: dict[str, bytes]) -> None:
    (own,) = programs.parent.glob("lib/python*/site-packages")
    installed = {name: (own / name).read_bytes() for name in wheel if ".dist-info/" not in name}
    assert installed == {name: wheel[name] for name in installed}


def test_a_network_is_trained_by_the_installed_programs(
    programs: Path, checkout: Path, tmp_path: Path
) -> None:
    """The start of every program is real for the launcher and the training."""
    backend = "--data-backend synthetic --synthetic-batches 3"
    train = f"{backend} --arch small_cnn --image-size 32 -b 2 --epochs 1 --cpu"
    flags = f"{train} --sparse-method rigl --sparsity 0.9 --delta-t 1".split()
    launched = "--nproc-per-node", "1", "--no-python", programs / "sparsetrain"
    ran(programs / "sparsetrain-launch", *launched, *flags, cwd=tmp_path)
    (raport,) = tmp_path.glob("*_raport.json")
    first = json.loads(raport.read_text().splitlines()[0].removeprefix("DLLL "))["data"]
    assert first["project"] == sparse.__version__
    assert first["git_commit"] == ran("git", "rev-parse", "HEAD", cwd=checkout).strip()

    (readme,) = blocks((ROOT / "README.md").read_text(), "python")
    assert readme.count("import sparse\n") == 1
    version = f" {sparse.__version__}\n"
    jobs: list[Job] = [
        Job("sparsetrain", "--version", f"project: {sparse.__version__}\n"),
        *(Job(name, "--help", f"usage: {name} ") for name in PROGRAMS[:-1]),
        Job("sparsetrain-launch", "--help", "--nproc-per-node"),
        *(Job(name, "--version", name + version) for name in PROGRAMS[1:-1]),
        Job("sparsetrain-costs", "--table rigl", "| rn50_erk_0.8_5x |"),
        Job("sparsetrain-costs", "--sparsty 0.9", "sparsetrain-costs: error: ", status=2),
        Job("sparsetrain-export", "checkpoint.pth.tar net.safetensors", "25793 of 257888"),
        Job("sparsetrain-convert", "checkpoint.pth.tar w.pth --to torchvision", "5 masks"),
        Job("sparsetrain-combine", "c.pth.tar --runs none.pth.tar", "none.pth.tar", status=2),
        Job("sparsetrain-report", raport.name, "| 0.9000 |"),
        Job(
            "sparsetrain",
            f"{backend} --cpu --arch small_cnn --pretrained-from-file net.safetensors",
            "sparsetrain-export FILE CHECKPOINT --to torch",
            status=2,
        ),
        # PyData's library or, where it is not installed, one of its name
        Job(
            readme.replace("import sparse\n", "import sparsetrain as sparse\n")
            + "import sparse as arrays; print(arrays.__name__, arrays.COO)",
            output="90.0% of the weights are zero\nsparse ",
        ),
        Job(
            "from sparsetrain.native import __main__ as native; raise SystemExit(native.main('x'))",
            output="sparsetrain.native: error: level must be one of ",
            status=2,
        ),
    ]
    if any(map(shutil.which, library.COMPILERS)):  # the same sources give the same library
        find = "library.GATES.find(library.cpu_level(), library.default_cache()).name"
        code = f"from sparsetrain.native import library; print({find})"
        jobs.append(Job(code, output=eval(find)))
    try:
        metadata.version("sparse")
    except metadata.PackageNotFoundError:
        (tmp_path / "pydata" / "sparse").mkdir(parents=True)
        (tmp_path / "pydata" / "sparse" / "__init__.py").write_text("COO = 'coordinates'\n")
    work = [(job.name, job.argv.split()) for job in jobs]
    driver = [programs / "python", "-c", DRIVER, json.dumps(work)]
    statuses = json.loads(ran(*driver, cwd=tmp_path, PYTHONPATH=str(tmp_path / "pydata")))
    for number, (job, status) in enumerate(zip(jobs, statuses, strict=True)):
        text = (tmp_path / f"{number}.txt").read_text()
        assert job.output in text, f"{job}: {text}"
        assert status == job.status, f"{job}: {text}"
        assert "Traceback" not in text


@dataclass(frozen=True)
class Job:
    """A command line of an installed program, or Python code."""

    name: str
    """Of the program; or the code."""
    argv: str = ""
    output: str = ""
    """Is printed."""
    status: int = 0


# Imports the slow packages once and runs each job in a fork, which ends without cleaning up.
DRIVER = """
import json, os, sys
from importlib import metadata

import torch, sparsetrain.runtime
from sparsetrain_programs import classify, costs, export, main
from sparsetrain_programs.cli import convert, report

entries = {entry.name: entry for entry in metadata.entry_points(group="console_scripts")}


def run(name, argv):
    if name not in entries:
        return exec(name, {})
    sys.argv = [name, *argv]
    return entries[name].load()()


def status_of(job):
    try:
        return run(*job) or 0
    except SystemExit as end:
        return end.code or 0


statuses = []
for number, job in enumerate(json.loads(sys.argv[1])):
    if not (child := os.fork()):
        output = os.open(f"{number}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = status_of(job)
        sys.stdout.flush()
        os._exit(status)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""
