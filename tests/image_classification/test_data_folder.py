"""Data directories that fit and data directories that do not."""

import re
from pathlib import Path

import pytest
from PIL import Image

from image_classification.data import DatasetInfo, inspect_dataset


def make(root: Path, *files: str) -> Path:
    for name in files:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(file)
    return root


def test_counts_images_and_names_classes(tmp_path):
    make(tmp_path, "train/b/1.jpg", "train/a/1.JPEG", "train/a/deep/2.png", "val/a/1.webp")
    make(tmp_path, "val/b/1.bmp")
    (tmp_path / "train/a/notes.txt").write_text("not an image")
    info = inspect_dataset(tmp_path, num_classes=2)
    assert info == DatasetInfo(num_train=3, num_val=2, classes=("a", "b"))


def test_a_split_that_is_not_needed_may_be_missing(tmp_path):
    make(tmp_path / "t", "train/a/1.jpg")
    make(tmp_path / "v", "val/a/1.jpg")
    assert inspect_dataset(tmp_path / "t", validation=False) == DatasetInfo(1, 0, ("a",))
    assert inspect_dataset(tmp_path / "v", training=False) == DatasetInfo(0, 1, ("a",))


@pytest.mark.parametrize(
    ("files", "num_classes", "message"),
    [
        ((), None, "data directory {root} has no directory train/"),
        (("train/a/1.jpg",), None, "data directory {root} has no directory val/"),
        (("train/1.jpg", "val/a/1.jpg"), None, "{root}/train is empty"),
        (
            ("train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg"),
            None,
            "{root}/train and {root}/val differ: 1 classes are in train/ only, the first is 'b'",
        ),
        (
            ("train/a/1.jpg", "val/a/1.jpg", "val/c/1.jpg"),
            None,
            "{root}/val and {root}/train differ: 1 classes are in val/ only, the first is 'c'",
        ),
        (
            ("train/a/1.jpg", "val/a/1.jpg"),
            10,
            "--num-classes 10 does not fit the 1 class directories of {root}/train: pass"
            " --num-classes 1",
        ),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(tmp_path, files, num_classes, message):
    make(tmp_path, *files)
    with pytest.raises(ValueError, match=re.escape(message.format(root=tmp_path))) as caught:
        inspect_dataset(tmp_path, num_classes=num_classes)
    assert "\n" not in str(caught.value)


def test_a_class_without_images_is_named(tmp_path):
    make(tmp_path, "train/a/1.jpg")
    (tmp_path / "train/b").mkdir()
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/train/b holds no images")):
        inspect_dataset(tmp_path, validation=False)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data directory .*nowhere does not exist"):
        inspect_dataset(tmp_path / "nowhere")
