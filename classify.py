"""Classify images: `python classify.py --resume CHECKPOINT --image FILE`.

Prints the most likely classes, one per line: rank, probability, class. A compact sparse file is run
on the CPU, and timed: `python classify.py IMAGE ... --model FILE`.
"""

from image_classification import versions

if __name__ == "__main__":
    versions.require()

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cli import networks, program
from cli.predictions import predict, predict_compact, ranking
from image_classification import flags
from image_classification.flags import argument, flag
from sparse import runtime


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Which network says what of which images."""

    images: list[Path] = argument("image files", default=[], nargs="*", metavar="IMAGE")
    resume: Path | None = flag(None, "the network: written by main.py", metavar="CHECKPOINT")
    model: Path | None = flag(None, "or the network: written by export.py", metavar="FILE")
    image: Path | None = flag(None, "one more image", metavar="FILE")
    batch: bool = flag(False, "classify all images at once (with --model)")
    arch: str | None = flag(None, "what the file must hold; by default whatever it holds", "-a")
    image_size: int | None = flag(None, "side of the network's input (that of the training)")
    topk: int = flag(5, "classes to print")
    class_names: Path | None = flag(
        None,
        "file with a name per line, or the data directory; by default classes are numbers",
        metavar="PATH",
    )
    cpu: bool = flag(False, "stay on the CPU where there is a GPU")


def parse(argv: Sequence[str]) -> Flags:
    """Return the flags of a command line."""
    return flags.read(Flags, argv, program="classify.py", description="Classify images.")


def report(given: Flags) -> str:
    """Return the lines that the command line asks for.

    Raises:
        ValueError: A user's mistake, in one line.
    """
    paths = [*given.images, *([] if given.image is None else [given.image])]
    if given.topk < 1:
        raise ValueError(f"--topk must be at least 1, got {given.topk}")
    if given.image_size is not None and given.image_size < 1:
        raise ValueError(f"--image-size must be at least 1, got {given.image_size}")
    if not paths:
        raise ValueError("there is no image: name a file")
    if given.resume is not None and given.model is not None:
        raise ValueError("--resume and --model exclude each other: name one network")
    if given.model is not None:
        return _report_compact(given, given.model, paths)
    if given.resume is None:
        raise ValueError("there is no network: name one with --resume or --model")
    if given.batch:
        raise ValueError("--batch has no effect without --model")
    trained = networks.read_checkpoint(given.resume, arch=given.arch)
    found = predict(trained, paths, image_size=given.image_size, cpu=given.cpu)
    return "\n".join(_lines(given, zip(found, paths, strict=True), many=len(paths) > 1))


def _report_compact(given: Flags, file: Path, paths: Sequence[Path]) -> str:
    """Tell the milliseconds of each call, too."""
    network = runtime.load(file)
    held = network.header.arch
    if given.arch not in (None, held):
        raise ValueError(f"{file} holds {held}, --arch is {given.arch}; leave it out")
    lines: list[str] = []
    remaining = iter(paths)
    calls = predict_compact(network, paths, image_size=given.image_size, batch=given.batch)
    for found, milliseconds in calls:
        lines += _lines(given, zip(found, remaining, strict=False), many=len(paths) > 1)
        lines.append(f"{milliseconds:.2f} ms for {len(found)} image{'s' * (len(found) > 1)}")
    return "\n".join(lines)


def _lines(given: Flags, found: Iterable[tuple[Tensor, Path]], *, many: bool) -> list[str]:
    lines = []
    for probabilities, path in found:
        lines += [f"{path}"] * many
        lines += ranking(probabilities, topk=given.topk, class_names=given.class_names)
    return lines


def main(argv: Sequence[str]) -> int:
    """Run the command line; return its exit status: 0, or 2 for a user's mistake."""
    return program.run("classify.py", lambda: report(parse(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
