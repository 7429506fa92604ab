"""The directory layout of a data set: `train/<class>/<image>` and `val/<class>/<image>`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset


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
    """

    paths: npt.NDArray[np.bytes_]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]

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

    Raises:
        ValueError: The directory is missing, or one of its classes has no images.
    """
    directory = path / split
    if not directory.is_dir():
        raise ValueError(f"data directory {path} has no directory {split}/ with a class in each"
                         " subdirectory")  # fmt: skip
    try:
        classes, class_to_index = find_classes(str(directory))
    except FileNotFoundError:
        raise ValueError(f"{directory} is empty: expected one subdirectory per class") from None
    samples = make_dataset(
        str(directory), class_to_index, extensions=IMG_EXTENSIONS, allow_empty=True
    )
    labels = np.array([label for _, label in samples], dtype=np.int64)
    counts = np.bincount(labels, minlength=len(classes))
    if not counts.all():
        empty = classes[int(np.flatnonzero(counts == 0)[0])]
        raise ValueError(
            f"{directory / empty} holds no images ({', '.join(IMG_EXTENSIONS)}): add some or"
            " remove the directory"
        )
    return ImageList(
        paths=np.array([os.fsencode(name) for name, _ in samples]),
        labels=labels,
        classes=tuple(classes),
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
