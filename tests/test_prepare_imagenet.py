"""scripts/prepare_imagenet.sh on made-up tarballs of the real layout."""

import fcntl
import hashlib
import io
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from scipy.io import savemat  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[1]
TRAIN, VAL, KIT = (
    "ILSVRC2012_img_train.tar",
    "ILSVRC2012_img_val.tar",
    "ILSVRC2012_devkit_t12.tar.gz",
)
# Number in the development kit -> class; sorting by number and by name differ, as in ImageNet.
CLASSES = {1: "n03", 2: "n01", 3: "n02"}
TRUTH = [3, 1, 2, 2, 1]
TRAIN_IMAGES = {
    f"{c}/{c}_{i}.JPEG": f"{c} {i}".encode() * 999 for c in CLASSES.values() for i in (7, 8)
}
VAL_IMAGES = {
    f"{CLASSES[n]}/ILSVRC2012_val_{i:08}.JPEG": f"val {i}".encode() for i, n in enumerate(TRUTH, 1)
}


@dataclass(frozen=True)
class Source:
    """The three files and the list of their MD5."""

    folder: Path

    def prepare(
        self, data: Path, *flags: str, path: Path | None = None, jobs: int = 1
    ) -> subprocess.CompletedProcess[str]:
        """Run the script, with `path` before the other directories of commands."""
        search = f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]
        script = ["bash", str(ROOT / "scripts/prepare_imagenet.sh"), "--count", "6,5"]
        return subprocess.run(
            [*script, "--md5", str(self.folder / "md5"), *flags, str(self.folder), str(data)],
            env={**os.environ, "PATH": search, "PYTHON": sys.executable, "JOBS": str(jobs)},
            capture_output=True,
            text=True,
            timeout=60,
            start_new_session=True,
        )

    def list_md5(self) -> None:
        """Write the list that the script checks against."""
        lines = [
            f"{hashlib.md5((self.folder / name).read_bytes()).hexdigest()}  {name}\n"
            for name in (TRAIN, VAL, KIT)
        ]
        (self.folder / "md5").write_text("".join(lines))


def tar(files: dict[str, bytes], mode: Literal["w", "w:gz"] = "w") -> bytes:
    """Return a tar file with these contents."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def images(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Write the tarballs, the development kit with its MATLAB file among them."""
    folder = tmp_path / "tarballs"
    folder.mkdir()
    per_class = {
        f"{c}.tar": tar({Path(n).name: b for n, b in TRAIN_IMAGES.items() if n.startswith(c)})
        for c in sorted(CLASSES.values())
    }
    (folder / TRAIN).write_bytes(tar(per_class))
    (folder / VAL).write_bytes(tar({Path(name).name: b for name, b in VAL_IMAGES.items()}))
    # Number 4 is an inner node of WordNet: no image has it.
    rows = [(n, c, "words", 0) for n, c in CLASSES.items()] + [(4, "n00", "all", 3)]
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    matrix = io.BytesIO()
    savemat(matrix, {"synsets": np.array(rows, dtype=kinds)})
    kit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": matrix.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "".join(
            f"{n}\n" for n in TRUTH
        ).encode(),
    }
    (folder / KIT).write_bytes(tar(kit, "w:gz"))
    result = Source(folder)
    result.list_md5()
    return result


@pytest.mark.parametrize("jobs", [1, 3])
def test_images_arrive_in_their_classes(source: Source, tmp_path: Path, jobs: int) -> None:
    data = tmp_path / "a folder" / "data"
    result = source.prepare(data, jobs=jobs)
    assert result.returncode == 0, result.stderr
    assert images(data / "train") == TRAIN_IMAGES
    assert images(data / "val") == VAL_IMAGES
    assert result.stdout.splitlines() == [
        "train: 6 images in 3 classes",
        "val: 5 images in 3 classes",
    ]


def test_a_second_run_needs_no_tarballs(source: Source, tmp_path: Path) -> None:
    source.prepare(tmp_path / "data")
    for name in (TRAIN, VAL, KIT):
        (source.folder / name).unlink()
    assert source.prepare(tmp_path / "data").returncode == 0


def test_a_killed_run_is_resumed(source: Source, tmp_path: Path) -> None:
    data, commands = tmp_path / "data", tmp_path / "commands"
    commands.mkdir()
    # Kills the run in the middle of the second class, its first image half written.
    (commands / "tar").write_text(
        '#!/bin/sh\ncase "$*" in *--directory*n02*)\n'
        f'  head -c 99 /dev/zero > "{data}/.prepare/n02/n02_7.JPEG"; kill -9 0;;\nesac\n'
        'exec /usr/bin/env PATH="${PATH#*:}" tar "$@"\n'
    )
    (commands / "tar").chmod(0o755)
    assert source.prepare(data, path=commands).returncode == -9
    assert [f.name for f in (data / "train").iterdir()] == ["n01"]
    finished = (data / "train/n01").stat().st_ino
    result = source.prepare(data)
    assert result.returncode == 0, result.stderr
    assert images(data / "train") == TRAIN_IMAGES
    assert (data / "train/n01").stat().st_ino == finished
    assert "unpacking 2 classes" in result.stderr
    assert "MD5" not in result.stderr  # of 138 GB: once is enough


@pytest.mark.parametrize("name", [TRAIN, VAL, KIT])
def test_a_damaged_tarball_is_refused(source: Source, tmp_path: Path, name: str) -> None:
    file = source.folder / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    result = source.prepare(tmp_path / "data")
    assert result.returncode == 2
    assert f"{file} is damaged" in result.stderr.splitlines()[-1]


def test_a_truncated_class_does_not_count_as_done(source: Source, tmp_path: Path) -> None:
    file = source.folder / TRAIN
    os.truncate(file, file.stat().st_size // 2)
    source.list_md5()
    result = source.prepare(tmp_path / "data")
    assert result.returncode == 2
    complete = images(tmp_path / "data/train")
    assert complete.items() <= TRAIN_IMAGES.items()
    assert complete.keys() < TRAIN_IMAGES.keys()


def test_missing_images_are_counted_and_restored(source: Source, tmp_path: Path) -> None:
    data = tmp_path / "data"
    source.prepare(data)
    for image in (data / "train/n02").iterdir():
        image.unlink()
    (data / "train/n02").rmdir()
    result = source.prepare(data)
    assert result.returncode == 2
    assert "holds 4 images, not 6" in result.stderr
    assert source.prepare(data).returncode == 0
    assert images(data / "train") == TRAIN_IMAGES


def test_a_missing_tarball_is_named(source: Source, tmp_path: Path) -> None:
    (source.folder / KIT).unlink()
    result = source.prepare(tmp_path / "data")
    assert result.returncode == 2
    assert f"there is no {KIT}" in result.stderr.splitlines()[-1]


def test_two_runs_at_once_are_refused(source: Source, tmp_path: Path) -> None:
    state = tmp_path / "data/.prepare"
    state.mkdir(parents=True)
    with (state / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = source.prepare(tmp_path / "data")
    assert result.returncode == 2
    assert "another prepare_imagenet.sh is at work" in result.stderr


def test_wrong_use_is_explained(source: Source, tmp_path: Path) -> None:
    for flags in (["--counts", "1"], ["--count", "many"], ["extra"]):
        result = source.prepare(tmp_path / "data", *flags)
        assert result.returncode == 2
        assert result.stderr.startswith("prepare_imagenet.sh: error: ")
