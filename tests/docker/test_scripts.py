"""What docker/*.sh ask of an engine, and what they say where something is missing.

The engines are stand-ins that write down how they were called: GPUs and Podman are not to be had
everywhere. tests/docker/test_image.py runs the same scripts with a real engine.
"""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = "bash basename cat cut dirname env git grep id mkdir mv realpath rm sha256sum stat".split()


class Machine:
    """A directory of commands that is the whole PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        (folder / "bin").mkdir()
        for tool in TOOLS:
            found = subprocess.run(["which", tool], capture_output=True, text=True, check=True)
            (folder / "bin" / tool).symlink_to(found.stdout.strip())

    def add(self, name: str, body: str = "") -> None:
        """Add a command that writes down its arguments, then runs `body`."""
        command = self.folder / "bin" / name
        command.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"{self.calls}"\n{body}\n')
        command.chmod(0o755)

    def script(self, name: str, *arguments: str | Path) -> tuple[int, str]:
        """Run docker/NAME; return its status and the last line that it printed."""
        result = subprocess.run(
            ["bash", str(ROOT / "docker" / name), *map(str, arguments)],
            env={"PATH": str(self.folder / "bin"), "HOME": os.environ.get("HOME", "/")},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        return result.returncode, (result.stdout.strip().splitlines() or [""])[-1]

    def run(self, *arguments: str | Path) -> str:
        """Run docker/run.sh, which has to succeed; return how it called the engine."""
        status, line = self.script("run.sh", f"--results={self.folder}/results", *arguments)
        assert status == 0, line
        return self.calls.read_text().splitlines()[-1]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine without an engine."""
    return Machine(tmp_path)


@pytest.fixture
def gpus(machine: Machine) -> Machine:
    """A machine with Docker, a driver and NVIDIA's toolkit."""
    machine.add("docker")
    machine.add("nvidia-smi")
    machine.add("nvidia-ctk")
    return machine


def test_docker_gets_gpus_memory_locks_and_the_caller(gpus: Machine) -> None:
    call = gpus.run("none", "nvidia-smi", "-L")
    assert call.startswith("docker run ")
    assert call.endswith(" nvidia_rn50 nvidia-smi -L")
    flags = call.split()
    assert {"--gpus=all", "--ipc=host", "--rm", "--init"} <= set(flags)
    assert {"--ulimit=memlock=-1", "--ulimit=stack=67108864"} <= set(flags)
    assert f"--user={os.getuid()}:{os.getgid()}" in flags


def test_chosen_gpus_replace_all_of_them(gpus: Machine) -> None:
    flags = gpus.run("--gpus=device=1", "none").split()
    assert "--gpus=device=1" in flags
    assert "--gpus=all" not in flags


def test_nvidia_docker_is_used_where_there_is_one(gpus: Machine) -> None:
    gpus.add("nvidia-docker")
    call = gpus.run("none")
    assert call.startswith("nvidia-docker run ")
    assert "--gpus" not in call


def test_rootless_docker_maps_its_root_to_the_caller(gpus: Machine) -> None:
    gpus.add("docker", '[[ $* != *SecurityOptions* ]] || echo "[name=seccomp name=rootless]"')
    assert "--user=0:0" in gpus.run("none").split()


def test_podman_gets_gpus_by_cdi(machine: Machine) -> None:
    machine.add("podman")
    machine.add("nvidia-smi")
    machine.add("nvidia-ctk", "echo nvidia.com/gpu=0; echo nvidia.com/gpu=all")
    flags = machine.run("none").split()
    assert flags[:2] == ["podman", "run"]
    assert "--device=nvidia.com/gpu=all" in flags
    assert ("--userns=keep-id" in flags) == (os.getuid() != 0)


def test_podman_without_cdi_is_told_how_to_make_it(machine: Machine) -> None:
    machine.add("podman")
    machine.add("nvidia-smi")
    status, line = machine.script("run.sh", "none")
    assert status == 2
    assert "nvidia-ctk cdi generate" in line


def test_the_cpu_alone_asks_for_nothing_special(machine: Machine) -> None:
    machine.add("docker")
    call = machine.run("--cpu", "--network=none", "none")
    assert "gpu" not in call
    assert "memlock" not in call
    assert "--network=none" in call.split()


def test_mounts(machine: Machine) -> None:
    machine.add("docker")
    for split in ("train", "val"):
        (machine.folder / "data" / split).mkdir(parents=True)
    call = machine.run("--cpu", machine.folder / "data")
    assert f"source={machine.folder}/data,target=/data/imagenet,readonly" in call
    assert f"source={machine.folder}/results,target=/workspace/rn50/results" in call
    assert (machine.folder / "results").is_dir()


def test_what_is_missing_is_one_line(machine: Machine) -> None:
    assert machine.script("run.sh", "--cpu", "none") == (
        2,
        "run.sh: error: neither Docker nor Podman is installed",
    )
    machine.add("docker", "exit 1")
    assert "daemon does not answer" in machine.script("build.sh")[1]
    machine.add("docker", "[[ $1 == info ]]")
    assert "there is no image nvidia_rn50" in machine.script("run.sh", "--cpu", "none")[1]
    assert "there is no image nvidia_rn50" in machine.script("save.sh")[1]
    machine.add("docker")
    assert "give --cpu" in machine.script("run.sh", "none")[1]
    machine.add("nvidia-smi")
    assert "Container Toolkit" in machine.script("run.sh", "none")[1]
    assert "has no directory train" in machine.script("run.sh", "--cpu", machine.folder)[1]
    assert "which IMAGENET?" in machine.script("run.sh", "--cpu")[1]
    assert "--name=value" in machine.script("run.sh", "--cpu", "--network", "none")[1]


def test_a_build_knows_the_commit_and_the_caller(machine: Machine) -> None:
    machine.add("docker")
    status, line = machine.script("build.sh", "--build-arg", "WITH_APEX=1")
    assert status == 0, line
    flags = machine.calls.read_text().splitlines()[-1]
    assert "--tag nvidia_rn50" in flags
    assert "--build-arg WITH_APEX=1" in flags
    assert ("USER_ID=" in flags) == (os.getuid() != 0)
    assert flags.endswith(f" {ROOT}")


def test_a_damaged_file_is_not_loaded(machine: Machine) -> None:
    machine.add("docker", '[[ $1 != save ]] || echo image >"$3"')
    file = machine.folder / "nvidia_rn50.tar"
    assert machine.script("save.sh")[0] == 0
    assert file.read_text() == "image\n"
    assert machine.script("load.sh")[0] == 0
    file.write_text("imagf\n")
    status, line = machine.script("load.sh")
    assert status == 2
    assert "nvidia_rn50.tar is damaged" in line
    (machine.folder / "nvidia_rn50.tar.sha256").unlink()
    assert "to check nvidia_rn50.tar with" in machine.script("load.sh")[1]
    file.unlink()
    assert "there is no file nvidia_rn50.tar" in machine.script("load.sh")[1]


def test_a_failed_save_leaves_no_file(machine: Machine) -> None:
    machine.add("docker", '[[ $1 != save ]] || { echo half >"$3"; exit 1; }')
    assert machine.script("save.sh")[0] != 0
    assert not list(machine.folder.glob("nvidia_rn50*"))
