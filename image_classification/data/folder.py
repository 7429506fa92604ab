"""The directory layout of a data set: `train/<class>/<image>` and `val/<class>/<image>`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torchvision.datasets.folder import IMG_EXTENSIONS


@dataclass(frozen=True)
class DatasetInfo:
    """Say what a data directory holds.

    Attributes:
        num_train: Images under `train/`; 0 when training was not asked for.
        num_val: Images under `val/`; 0 when validation was not asked for.
        classes: Names of the class directories, sorted; the position is the target.
    """

    num_train: int
    num_val: int
    classes: tuple[str, ...]


@dataclass(frozen=True)
class ImageList:
    """List the images of one split.

    Arrays instead of lists of strings: worker processes share them without copying (counting
    references to a million strings would write to, hence copy, every page of them).

    Attributes:
        paths: Encoded file names, fixed width.
        labels: The class of each file, int64.
        classes: Class names, sorted.
        irregular: Indices of what is no regular file, such as a pipe or a broken link.
        skipped: Directories and links that could not be followed: name -> reason.
    """

    paths: npt.NDArray[np.bytes_]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    irregular: frozenset[int]
    skipped: dict[str, str]

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """Return the file name of an image."""
        return os.fsdecode(self.paths[index])


def inspect_dataset(
    path: Path, *, num_classes: int | None = None, training: bool = True, validation: bool = True
) -> DatasetInfo:
    """Count the images of a data directory and check that it fits.

    Args:
        path: Directory with `train/<class>/` and `val/<class>/`.
        num_classes: Classes the model tells apart; None accepts any number.
        training: Whether `train/` is needed.
        validation: Whether `val/` is needed.

    Raises:
        ValueError: A directory is missing or empty, the classes of `train/` and `val/` differ, or
            their number is not `num_classes`.
    """
    if not path.is_dir():
        raise ValueError(f"data directory {path} does not exist")
    train = list_images(path, "train") if training else None
    val = list_images(path, "val") if validation else None
    if train is not None and val is not None:
        _check_same_classes(path, train.classes, val.classes)
    split, images = ("train", train) if train is not None else ("val", val)
    if images is not None and num_classes is not None:
        check_num_classes(path / split, images.classes, num_classes)
    return DatasetInfo(
        num_train=0 if train is None else len(train),
        num_val=0 if val is None else len(val),
        classes=() if images is None else images.classes,
    )


def list_images(path: Path, split: str) -> ImageList:
    """List the images of a split in sorted order, with the extensions torchvision knows.

    Whatever bears such an extension counts as an image, readable or not. Links are followed, but
    not those that lead back to a directory they lie in.

    Raises:
        ValueError: The directory is missing or cannot be listed, or one of its classes has no
            images.
    """
    directory = path / split
    if not directory.is_dir():
        raise ValueError(f"data directory {path} has no directory {split}/ with a class in each"
                         " subdirectory")  # fmt: skip
    skipped: dict[str, str] = {}
    try:
        classes = _subdirectories(str(directory), skipped)
    except OSError as error:
        raise ValueError(f"cannot list {directory}: {error.strerror}") from None
    if not classes:
        raise ValueError(f"{directory} is empty: expected one subdirectory per class")
    above = _parents(str(directory / "_"))
    found: list[_Found] = []
    counts = []
    for name in classes:
        of_class = _images(str(directory / name), above, skipped)
        if not of_class:
            raise ValueError(_empty_class(str(directory / name), skipped))
        found += sorted(of_class, key=lambda image: image.directory)  # stable: names stay sorted
        counts.append(len(of_class))
    return ImageList(
        paths=np.array([os.fsencode(os.path.join(i.directory, i.name)) for i in found]),
        labels=np.repeat(np.arange(len(classes), dtype=np.int64), counts),
        classes=tuple(classes),
        irregular=frozenset(index for index, image in enumerate(found) if not image.is_regular),
        skipped=skipped,
    )


class _Found(NamedTuple):
    directory: str
    name: str
    is_regular: bool


def _images(directory: str, above: frozenset[tuple[int, int]], skipped: dict[str, str]
            ) -> list[_Found]:  # fmt: skip
    """Return the images below a directory; `above` are the directories that lead to it."""
    try:
        own = _identity(directory)
        if own in above:
            skipped[directory] = f"cannot follow {directory}: it leads back to where it lies"
            return []
        with os.scandir(directory) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        skipped[directory] = f"cannot list {directory}: {error.strerror}"
        return []
    above |= {own}
    if os.path.islink(directory):
        above |= _parents(directory)
    found, deeper = [], []
    for entry in entries:
        if entry.name.lower().endswith(IMG_EXTENSIONS):
            found.append(_Found(directory, entry.name, _is_file(entry)))
        elif _is_directory(entry, skipped):
            deeper.append(entry.path)
    for path in deeper:
        found += _images(path, above, skipped)
    return found


def _subdirectories(directory: str, skipped: dict[str, str]) -> list[str]:
    with os.scandir(directory) as scan:
        return sorted(entry.name for entry in scan if _is_directory(entry, skipped))


def _identity(directory: str) -> tuple[int, int]:
    status = os.stat(directory)
    return status.st_dev, status.st_ino


def _parents(path: str) -> frozenset[tuple[int, int]]:
    return frozenset(_identity(str(parent)) for parent in Path(path).resolve().parents)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False


def _is_directory(entry: os.DirEntry[str], skipped: dict[str, str]) -> bool:
    """Return whether an entry is a directory; note a link that leads nowhere."""
    try:
        if entry.is_symlink():
            entry.stat()
        return entry.is_dir()
    except OSError as error:
        skipped[entry.path] = f"cannot follow {entry.path}: {error.strerror}"
        return False


def _empty_class(directory: str, skipped: dict[str, str]) -> str:
    if directory in skipped:
        return skipped[directory]
    return (
        f"{directory} holds no images ({', '.join(IMG_EXTENSIONS)}): add some or remove the"
        " directory"
    )


def check_num_classes(directory: Path, classes: tuple[str, ...], num_classes: int) -> None:
    """Raise a ValueError unless a split has as many classes as the model."""
    if len(classes) != num_classes:
        raise ValueError(
            f"--num-classes {num_classes} does not fit the {len(classes)} class directories of"
            f" {directory}: pass --num-classes {len(classes)}"
        )


def _check_same_classes(path: Path, train: tuple[str, ...], val: tuple[str, ...]) -> None:
    for present, absent, missing in (
        ("train", "val", sorted(set(train) - set(val))),
        ("val", "train", sorted(set(val) - set(train))),
    ):
        if missing:
            raise ValueError(
                f"{path / present} and {path / absent} differ: {len(missing)} classes are in"
                f" {present}/ only, the first is {missing[0]!r}"
            )
