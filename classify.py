"""Classify images: `python classify.py --resume CHECKPOINT --image FILE`.

Prints the most likely classes, one per line: rank, probability, class. A compact sparse file is run
on the CPU, and timed: `python classify.py IMAGE ... --model FILE`.
"""

from image_classification import versions

if __name__ == "__main__":
    versions.require()

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from image_classification import checkpoint
from image_classification.config import Config
from image_classification.data.decode import read_image
from image_classification.data.resize import validation_crop
from image_classification.data.stage import MEAN, STD
from image_classification.models import (
    check_image_size,
    count_classes,
    create_model,
    default_image_size,
)
from sparse import runtime


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises ValueError where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        """Raise `message`."""
        raise ValueError(message)


def build_parser() -> OneLineParser:
    """Return the command line."""
    parser = OneLineParser(prog="classify.py", description="Classify images.")
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--resume", type=Path, metavar="CHECKPOINT", help="written by main.py")
    network.add_argument("--model", type=Path, metavar="FILE", help="written by export.py")
    add = parser.add_argument
    add("images", type=Path, nargs="*", metavar="IMAGE")
    add("--image", type=Path, metavar="FILE", help="one more image")
    add("--batch", action="store_true", help="classify all images at once (with --model)")
    add("-a", "--arch", help="what CHECKPOINT must hold; by default whatever it holds")
    add("--image-size", type=int, help="side of the network's input (that of the training)")
    add("--topk", type=int, default=5, help="classes to print")
    add(
        "--class-names",
        type=Path,
        metavar="PATH",
        help="file with a name per line, or the data directory; by default classes are numbers",
    )
    add("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    return parser


def load_model(path: Path, *, arch: str | None) -> tuple[nn.Module, Mapping[str, Any]]:
    """Return the network of a checkpoint and the configuration that it was trained with.

    Args:
        path: Checkpoint of the trainer.
        arch: Name that the checkpoint must carry; None accepts any.

    Raises:
        ValueError: One line naming the file and what is missing or does not fit.
    """
    state = checkpoint.load(path)
    held = checkpoint.entry(state, "arch", path)
    if arch not in (None, held):
        raise ValueError(f"{path} holds {held}, --arch is {arch}; leave --arch out")
    # a converted checkpoint carries no flags: those of main.py's defaults fit, or loading fails
    config = {**vars(Config()), **state.get("config", {}), "arch": held}
    weights = checkpoint.entry(state, "state_dict", path)
    try:
        num_classes = count_classes(held, weights)
    except ValueError as error:
        raise ValueError(f"{path}: entry 'state_dict' does not fit: {error}") from error
    model = create_model(
        held, num_classes=num_classes, stem=config["stem"], width=config["width"]
    ).eval()
    checkpoint.restore({"state_dict": model}, state, path)
    return model, config


def load_image(
    path: Path,
    *,
    image_size: int,
    interpolation: str,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Tensor:
    """Return an image as validation sees it: float32 (1, 3, image_size, image_size).

    Args:
        path: Image file.
        image_size: Side of the image. The shorter side of the file is resized to 256 / 224 of it.
        interpolation: As main.py takes it.
        mean: Normalization, per channel, of values in [0, 1].
        std: The same.

    Raises:
        ValueError: One line: the file cannot be read.
    """
    pixels = validation_crop(
        read_image(str(path)),
        size=image_size,
        shorter_side=round(image_size * 256 / 224),
        interpolation=interpolation,
    )
    image: Tensor = F.normalize(F.to_dtype(pixels, torch.float32, scale=True), [*mean], [*std])
    return image[None]


def read_class_names(path: Path, *, num_classes: int) -> list[str]:
    """Return the names of the classes in the order of the network's outputs.

    Args:
        path: Text file with a name per line, or a directory with `train/<class>/` or
            `val/<class>/`.
        num_classes: Number of outputs.

    Raises:
        ValueError: The path is missing or holds another number of names.
    """
    if path.is_dir():
        split = next((path / name for name in ("train", "val") if (path / name).is_dir()), None)
        if split is None:
            raise ValueError(f"--class-names {path} has neither train/ nor val/")
        names = sorted(entry.name for entry in split.iterdir() if entry.is_dir())
    else:
        try:
            names = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text file"
            raise ValueError(f"--class-names {path} cannot be read: {reason}") from error
    if len(names) != num_classes:
        raise ValueError(
            f"--class-names {path} holds {len(names)} names, the network has {num_classes} classes"
        )
    return names


@torch.no_grad()
def classify(model: nn.Module, image: Tensor) -> Tensor:
    """Return the probability of each class, (num_classes,), for an image (1, 3, H, W)."""
    probabilities: Tensor = model(image)[0].softmax(0)
    return probabilities


def ranking(probabilities: Tensor, *, topk: int, class_names: Path | None) -> list[str]:
    """Return the lines of one image: rank, probability, class.

    Raises:
        ValueError: One line: the names cannot be read or do not fit.
    """
    names: Sequence[object] = range(len(probabilities))
    if class_names is not None:
        names = read_class_names(class_names, num_classes=len(probabilities))
    best = probabilities.topk(min(topk, len(probabilities)))
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [f"{i} {p:.4f} {names[index]}" for i, (p, index) in enumerate(pairs, start=1)]


def report(args: argparse.Namespace) -> str:
    """Return the lines that the command line asks for.

    Raises:
        ValueError: A user's mistake, in one line.
    """
    paths = [*args.images, *([] if args.image is None else [args.image])]
    if args.topk < 1:
        raise ValueError(f"--topk must be at least 1, got {args.topk}")
    if args.image_size is not None and args.image_size < 1:
        raise ValueError(f"--image-size must be at least 1, got {args.image_size}")
    if not paths:
        raise ValueError("there is no image: name a file")
    if args.model is not None:
        return _report_compact(args, paths)
    if args.batch:
        raise ValueError("--batch has no effect without --model")
    model, config = load_model(args.resume, arch=args.arch)
    size = args.image_size or config["image_size"] or default_image_size(config["arch"])
    check_image_size(model, config["arch"], size)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    model = model.to(device)
    lines = []
    for path in paths:
        image = load_image(path, image_size=size, interpolation=config["interpolation"])
        probabilities = classify(model, image.to(device))
        lines += [f"{path}"] * (len(paths) > 1)
        lines += ranking(probabilities, topk=args.topk, class_names=args.class_names)
    return "\n".join(lines)


def _report_compact(args: argparse.Namespace, paths: Sequence[Path]) -> str:
    """Run a compact sparse file, warmed up, and tell the milliseconds per call too."""
    network = runtime.load(args.model)
    header = network.header
    if args.arch not in (None, header.arch):
        raise ValueError(f"{args.model} holds {header.arch}, --arch is {args.arch}; leave it out")
    images = torch.cat(
        [
            load_image(
                path,
                image_size=args.image_size or header.image_size,
                interpolation=header.interpolation,
                mean=header.mean,
                std=header.std,
            )
            for path in paths
        ]
    )
    network(images[:1])  # plans and tunes
    lines: list[str] = []
    remaining = iter(paths)
    for group in [images] if args.batch else [image[None] for image in images]:
        start = time.perf_counter()
        logits = network(group)
        milliseconds = 1e3 * (time.perf_counter() - start)
        for probabilities in logits.softmax(1):
            path = next(remaining)
            lines += [f"{path}"] * (len(paths) > 1)
            lines += ranking(probabilities, topk=args.topk, class_names=args.class_names)
        lines.append(f"{milliseconds:.2f} ms for {len(group)} image{'s' * (len(group) > 1)}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run the command line; return its exit status: 0, or 2 for a user's mistake."""
    try:
        print(report(build_parser().parse_args(argv)))
    except ValueError as error:
        print(f"classify.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
