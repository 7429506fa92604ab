"""The oldest supported versions, checked before anything that needs newer ones is imported.

Imports nothing but the standard library.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

OLDEST = {"torch": "2.9.1", "torchvision": "0.24.1"}
"""Those that requirements.txt allows; `scripts/test.sh --oldest` runs the tests with them."""
OTHERS = ("numpy", "safetensors", "jsonargparse", "tqdm")
"""What else every program imports at its start."""


def require() -> None:
    """End the program with status 2 and one line where a package is missing or too old.

    A version is judged by its numbers alone: development builds of a newer release, such as the
    2.10.0a0+b558c986e8.nv25.11 of NVIDIA's images, are newer.
    """
    if problem := next(filter(None, map(_problem, (*OLDEST, *OTHERS))), None):
        remedy = "pip install --upgrade -r requirements.txt (bash scripts/test.sh makes .venv)"
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {problem}: {remedy}\n")
        sys.exit(2)


def _problem(package: str) -> str | None:
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"{sys.executable} has no {package}"
    if package in OLDEST and _numbers(found) < _numbers(OLDEST[package]):
        return f"{package} {found} is too old, {OLDEST[package]} is the oldest supported"
    return None


def _numbers(version: str) -> list[int]:
    """Return the numbers of a release, without what marks builds before or after it."""
    return [int(number) for number in re.split(r"[^\d.]", version)[0].strip(".").split(".")]
