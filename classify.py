"""Classify images: `python classify.py --resume CHECKPOINT --image FILE`.

Prints the most likely classes, one per line: rank, probability, class. A compact sparse file is run
on the CPU, and timed: `python classify.py IMAGE ... --model FILE`. With `--fallback torch` the file
is a checkpoint, also of a network that export.py refuses.
"""

from image_classification import versions

if __name__ == "__main__":
    versions.require()

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from cli.predictions import from_both, from_checkpoint, from_compact, ranking
from cli.program import Program
from image_classification.flags import argument, flag


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Classify images."""

    images: list[Path] = argument("image files", [], nargs="*", metavar="IMAGE")
    resume: Path | None = flag(None, "the network: written by main.py", metavar="CHECKPOINT")
    model: Path | None = flag(None, "or the network: written by export.py", metavar="FILE")
    fallback: Literal["torch"] | None = flag(
        None,
        "--model is a checkpoint; torch runs what the sparse runtime does not know of the network",
    )
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
    if given.fallback is not None and given.model is None:
        raise ValueError("--fallback has no effect without --model: name the checkpoint there")
    asked: dict[str, Any] = {"arch": given.arch, "image_size": given.image_size}
    told: list[str] = []
    if given.model is not None and given.fallback is not None:
        network, in_torch = from_both(given.model, **asked)
        told.append(in_torch)
    elif given.model is not None:
        network = from_compact(given.model, **asked)
    elif given.resume is None:
        raise ValueError("there is no network: name one with --resume or --model")
    elif given.batch:
        raise ValueError("--batch has no effect without --model")
    else:
        network = from_checkpoint(given.resume, **asked, cpu=given.cpu)
    lines: list[str] = []
    for group in [paths] if given.batch else [[path] for path in paths]:
        images = torch.cat([network.load(path) for path in group])
        start = time.perf_counter()
        with torch.no_grad():
            probabilities = network.logits(images).softmax(1)
        milliseconds = 1e3 * (time.perf_counter() - start)
        for path, of_image in zip(group, probabilities, strict=True):
            lines += [f"{path}"] * (len(paths) > 1)
            lines += ranking(of_image, topk=given.topk, class_names=given.class_names)
        if given.model is not None:
            lines.append(f"{milliseconds:.2f} ms for {len(group)} image{'s' * (len(group) > 1)}")
    return "\n".join([*lines, *told])


PROGRAM = Program("classify.py", Flags, report)
main = PROGRAM.main


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
