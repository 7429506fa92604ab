"""The image: built, run, saved, removed, loaded and run again by the scripts in docker/."""

import json
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch

from tests.docker.building import CANARY, NAME, Image, execute

pytestmark = pytest.mark.docker


def test_the_image_says_what_it_is(image: Image) -> None:
    report = image.run("python", "main.py", "--version")
    versions = [metadata.version("torch"), metadata.version("nvidia-dali-cuda130")]
    for fact in (*versions, *filter(None, [torch.version.cuda]), image.commit):
        assert fact in report
    (facts,) = json.loads(execute(["docker", "image", "inspect", NAME]))
    assert facts["Config"]["Labels"]["org.opencontainers.image.revision"] == image.commit
    assert facts["Config"]["Healthcheck"]["Test"] == ["CMD", "python", "main.py", "--version"]
    assert facts["Config"]["User"].split(":")[0] not in ("", "0", "root")


def test_the_torch_of_the_base_image_is_kept(image: Image) -> None:
    listed = image.run(
        "python", "-m", "pip", "list", "--path", "/opt/venv/lib/python3.11/site-packages"
    )
    installed = {line.split()[0].lower() for line in listed.splitlines()[2:]}
    assert {"jsonargparse", "scikit-learn", "nvidia-ml-py"} <= installed
    assert not {"torch", "torchvision", "triton", "pip"} & installed
    image.run("python", "-m", "pip", "check")


def test_the_demo_trains_offline_and_its_files_belong_to_the_caller(
    image: Image, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    results.chmod(0o777)
    output = image.run(
        *"bash scripts/demo.sh --epochs 1 --output results/demo".split(),
        flags=("--user=4321:8765", f"--results={results}"),
    )
    assert any(line.startswith("rigl ") and line.endswith(" MB") for line in output.splitlines())
    files = [path for path in results.rglob("*") if path.is_file()]
    assert {"report.png", "checkpoint.pth.tar", "experiment_raport.json"} <= {f.name for f in files}
    assert {(f.stat().st_uid, f.stat().st_gid) for f in files} == {(4321, 8765)}


def test_the_other_programs_of_the_project_run_in_the_image(image: Image) -> None:
    assert "0.2431 of dense" in image.run("python", "costs.py", "--sparsity", "0.9")
    plain = ["docker", "run", "--rm", *image.flags[1:], NAME]
    plain = [word for word in plain if not word.startswith("--results")]
    assert "rn50_rigl_erk_0.9" in execute([*plain, "python", "costs.py", "--table", "port"])
    image.run("python", "export.py", "--help")
    image.run("python", "benchmarks/step_overhead.py", "--help")


def test_without_other_words_the_caller_is_the_user(image: Image, tmp_path: Path) -> None:
    image.run("touch", "results/mine", flags=(f"--results={tmp_path}",))
    assert (tmp_path / "mine").owner() == tmp_path.owner()


def test_imagenet_is_mounted_read_only(image: Image, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    command = "ls /data/imagenet && ! touch /data/imagenet/train/new 2>/dev/null"
    output = image.run("bash", "-c", command, data=str(tmp_path))
    assert output.split() == ["train", "val"]
    assert not list((tmp_path / "train").iterdir())


def test_save_remove_load_run(image: Image, tmp_path: Path) -> None:
    file = tmp_path / "nvidia_rn50.tar"
    image.script("save.sh", file)
    assert not _contains(file, CANARY.encode()), "a planted secret is in the image"
    execute(["docker", "rmi", NAME])
    assert subprocess.run(["docker", "image", "inspect", NAME], capture_output=True).returncode
    image.script("load.sh", file)
    file.unlink()  # pytest would keep a gigabyte
    assert image.run("cat", "COMMIT").strip() == image.commit
    image.run("python", "main.py", "--help")


def _contains(file: Path, word: bytes) -> bool:
    """Return whether a file holds a word, its layers being plain tar files."""
    tail = b""
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            if word in tail + block:
                return True
            tail = block[-len(word) :]
    return False
