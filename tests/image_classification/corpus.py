"""A data set with everything that is found in data sets, made for the tests."""

import io
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image


def photo(seed: int, height: int = 60, width: int = 80) -> Image.Image:
    """Return a picture with smooth detail."""
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    return noise.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    """Return an image file's bytes."""
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def odd_images() -> dict[str, bytes]:
    """Return files that are images, however unusual: name -> bytes."""
    picture = photo(0)
    gray = picture.convert("L")
    jpeg, png = encoded(picture, "JPEG", quality=95), encoded(picture, "PNG")
    turned = Image.Exif()
    turned[0x0112] = 6  # shown rotated by a quarter
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    seen_through = bytes([0] * 100 + [255] * 156)
    return {
        "ascii.ppm": b"P3 2 2 255 " + b"10 20 30 " * 4,  # DALI does not decode a crop of it
        "bilevel.png": encoded(picture.convert("1"), "PNG"),
        "cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG", quality=95),
        "deep.png": encoded(deep, "PNG"),
        "exif.jpg": encoded(picture, "JPEG", quality=95, exif=turned),
        "garbage_after.jpg": jpeg + b"garbage" * 9,
        "gif_inside.jpg": encoded(picture, "GIF"),  # which DALI does not decode
        "gray.jpg": encoded(gray, "JPEG", quality=95),
        "jpeg_inside.png": jpeg,
        "last_checksum_missing.png": png[:-13],  # all pixels are there
        "palette.png": encoded(picture.quantize(), "PNG", transparency=seen_through),
        "png_inside.jpg": png,
        "progressive.jpg": encoded(picture, "JPEG", quality=95, progressive=True),
        "rgba.png": encoded(picture.convert("RGBA"), "PNG"),
        "strips.tif": encoded(picture, "TIFF"),
        "webp.webp": encoded(picture, "WEBP", lossless=True),
    }


def bad_images() -> dict[str, bytes]:
    """Return files that are no images, or not whole ones: name -> bytes."""
    jpeg, png, tiff = (encoded(photo(1), name) for name in ("JPEG", "PNG", "TIFF"))
    half = len(jpeg) // 2
    return {
        "cut_at_the_end.jpg": jpeg[:-2],
        "cut_early.jpg": jpeg[:100],
        "cut_in_the_middle.jpg": jpeg[:half],
        "cut_in_the_middle.png": png[: len(png) // 2],
        "cut_in_the_middle.tif": tiff[: len(tiff) // 2],
        "empty.jpg": b"",
        "one_byte.jpg": b"\xff",
        "text.jpg": b"this is not an image\n" * 99,
        "web_page.png": b"<html><body>404 not found</body></html>",
        "zeros_after_half.jpg": jpeg[:half] + bytes(half),
    }


def make_special(directory: Path) -> list[str]:
    """Make things with names of images that are no files; return the names."""
    (directory / "directory.jpg").mkdir()
    os.mkfifo(directory / "pipe.jpg")  # whoever opens it waits
    (directory / "link_to_itself.jpg").symlink_to("link_to_itself.jpg")
    (directory / "link_to_nothing.jpg").symlink_to("nothing.jpg")
    (directory / "no_rights.jpg").write_bytes(encoded(photo(2), "JPEG"))
    (directory / "no_rights.jpg").chmod(0)
    names = ["directory.jpg", "pipe.jpg", "link_to_itself.jpg", "link_to_nothing.jpg"]
    return names if os.geteuid() == 0 else [*names, "no_rights.jpg"]  # root may read anything


def make(root: Path, *, num_plain: int = 12) -> set[str]:
    """Fill `train/` and `val/`; return the names of the bad files, below either.

    Class a holds the special ones, class b ordinary photos.
    """
    for split in ("train", "val"):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
        for name, content in (odd_images() | bad_images()).items():
            (root / split / "a" / name).write_bytes(content)
        special = make_special(root / split / "a")
        for number in range(num_plain):
            file = root / split / "b" / f"{number:02}.jpg"
            file.write_bytes(encoded(photo(10 + number), "JPEG", quality=95))
    return {f"a/{name}" for name in [*bad_images(), *special]}


def mend(root: Path, copy: Path, bad: set[str]) -> Path:
    """Copy a corpus with a photo in the place of each bad file."""
    for directory in ("train/a", "train/b", "val/a", "val/b"):
        (copy / directory).mkdir(parents=True)
        for name in os.listdir(root / directory):
            if f"{directory[-1]}/{name}" in bad:
                (copy / directory / name).write_bytes(encoded(photo(3), "JPEG"))
            else:
                shutil.copy(root / directory / name, copy / directory)
    return copy
