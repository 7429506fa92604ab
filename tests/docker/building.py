"""Builds the image under test from a copy of this checkout by docker/build.sh."""

import os
import re
import shutil
import subprocess
import sys
import uuid
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAME = "nvidia_rn50_test"
BASE_IMAGE = os.environ.get("TEST_BASE_IMAGE", "python:3.11-slim-bookworm")
SITE = "/mnt/site-packages"  # where a container sees the packages of this interpreter
# What a GPU base image brings along, gigabytes of it; all else is installed while building.
FROM_BASE = re.compile(r"torch|torchvision|triton|nvidia-(?!ml-py).*|cuda-.*")
# Must not get into the image; every planted file holds the word.
CANARY = f"canary-{uuid.uuid4()}"
PLANTED = (
    ".env",
    "id_rsa",
    "data/train/n0/a.jpg",
    "results/runs/row/checkpoint.pth.tar",
    "scripts/.netrc",
    "sparse/checkpoint.pth.tar",
    "tests/data/server.key",
    ".git/credentials",
)


@dataclass(frozen=True)
class Image:
    """The built image, and how to run it."""

    commit: str
    flags: tuple[str, ...]

    def script(self, name: str, *arguments: str | Path) -> str:
        """Run docker/NAME with the arguments; return what it prints, or fail with it."""
        command = ["bash", str(ROOT / "docker" / name), *map(str, arguments)]
        return execute(command, {"IMAGE": NAME})

    def run(self, *command: str, flags: tuple[str, ...] = (), data: str = "none") -> str:
        """Run a command in the image through docker/run.sh, without a network."""
        return self.script("run.sh", *self.flags, *flags, data, *command)


def execute(command: list[str], environment: dict[str, str] | None = None) -> str:
    """Return what a command prints; a failure shows it."""
    result = subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-6000:]}"
    return result.stdout


def require_engine() -> None:
    if shutil.which("docker") is None:
        pytest.skip("there is no docker command")
    reply = subprocess.run(["docker", "info"], capture_output=True, text=True)
    if reply.returncode != 0:
        reason = (reply.stderr or reply.stdout).strip().splitlines()[-1]
        pytest.skip(f"no Docker engine answers (tests/docker/engine.sh starts one): {reason}")
    known = subprocess.run(["docker", "image", "inspect", BASE_IMAGE], capture_output=True)
    if known.returncode != 0:
        pull = subprocess.run(["docker", "pull", BASE_IMAGE], capture_output=True, text=True)
        if pull.returncode != 0:
            pytest.skip(f"the base image {BASE_IMAGE} is not to be had: {pull.stderr.strip()}")


def site_packages() -> Path:
    return Path(str(metadata.distribution("torch").locate_file(""))).resolve()


def base_with_torch(context: Path) -> str:
    """Derive a base image that brings torch, as NVIDIA's do; return its name.

    It holds the metadata of the packages and links to their files, which containers get by a
    read-only mount: copying several gigabytes proves nothing more.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    ask = "from sysconfig import *; print(get_python_version(), get_path('purelib'))"
    command = ["docker", "run", "--rm", "--network=none", BASE_IMAGE, "python3", "-c", ask]
    found, packages = execute(command).split()
    if found != version:
        pytest.skip(f"{BASE_IMAGE} has Python {found}, and the packages here are for {version}")
    for distribution in metadata.distributions(path=[str(site_packages())]):
        if not FROM_BASE.fullmatch(distribution.name):
            continue
        for top in {Path(str(file)).parts[0] for file in distribution.files or ()} - {".."}:
            source, link = site_packages() / top, context / "base" / top
            link.parent.mkdir(exist_ok=True)
            if top.endswith(".dist-info"):
                shutil.copytree(source, link)
            elif source.name != "__pycache__" and not link.is_symlink():
                link.symlink_to(f"{SITE}/{top}")
    (context / "base.pth").write_text("/opt/base\n")
    (context / "Dockerfile").write_text(
        f"FROM {BASE_IMAGE}\nCOPY base /opt/base\nCOPY base.pth {packages}/\n"
    )
    name = f"{NAME}_base"
    execute(["docker", "build", "--tag", name, str(context)], {"DOCKER_BUILDKIT": "1"})
    return name


def copy_checkout(target: Path) -> str:
    """Copy what git would commit into a repository of its own, private to its owner."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, execute(git).split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
            (target / name).chmod(0o600)
    here = ["git", "-C", str(target), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    execute([*here, "init", "--quiet"])
    execute([*here, "add", "--all", "."])
    execute([*here, "commit", "--quiet", "--message", "copy"])
    return execute([*here, "rev-parse", "HEAD"]).strip()


def plant(checkout: Path) -> None:
    for name in PLANTED:
        path = checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(CANARY)
