"""Classify one image: `python classify.py --resume CHECKPOINT --image FILE`.

Prints the most likely classes, one per line: rank, probability, class.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from image_classification import checkpoint
from image_classification.config import Config
from image_classification.data.decode import read_image
from image_classification.data.stage import MEAN, STD
from image_classification.models import create_model, default_image_size


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises ValueError where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        """Raise `message`."""
        raise ValueError(message)


def build_parser() -> OneLineParser:
    """Return the command line."""
    parser = OneLineParser(prog="classify.py", description="Classify one image.")
    add = parser.add_argument
    add("--resume", type=Path, required=True, metavar="CHECKPOINT", help="written by main.py")
    add("--image", type=Path, required=True, metavar="FILE")
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
    # every network here ends in its classifier, with a row or an element per class
    *_, last = checkpoint.entry(state, "state_dict", path).values()
    model = create_model(
        held, num_classes=len(last), stem=config["stem"], width=config["width"]
    ).eval()
    checkpoint.restore({"state_dict": model}, state, path)
    return model, config


def load_image(path: Path, *, image_size: int, interpolation: str) -> Tensor:
    """Return an image as validation sees it: float32 (1, 3, image_size, image_size).

    Args:
        path: Image file.
        image_size: Side of the center crop; the shorter side is resized to 256 / 224 of it.
        interpolation: "bilinear", "bicubic" or "triangular", which is what an antialiased bilinear
            filter is.

    Raises:
        ValueError: One line: the file cannot be read.
    """
    filter_name = "bilinear" if interpolation == "triangular" else interpolation
    prepare = v2.Compose(
        [
            v2.Resize(round(image_size * 256 / 224), v2.InterpolationMode(filter_name)),
            v2.CenterCrop(image_size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    image: Tensor = prepare(read_image(str(path)))
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


def report(args: argparse.Namespace) -> str:
    """Return the lines that the command line asks for.

    Raises:
        ValueError: A user's mistake, in one line.
    """
    if args.topk < 1:
        raise ValueError(f"--topk must be at least 1, got {args.topk}")
    if args.image_size is not None and args.image_size < 1:
        raise ValueError(f"--image-size must be at least 1, got {args.image_size}")
    model, config = load_model(args.resume, arch=args.arch)
    size = args.image_size or config["image_size"] or default_image_size(config["arch"])
    image = load_image(args.image, image_size=size, interpolation=config["interpolation"])
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    probabilities = classify(model.to(device), image.to(device))
    names: Sequence[object] = range(len(probabilities))
    if args.class_names is not None:
        names = read_class_names(args.class_names, num_classes=len(probabilities))
    best = probabilities.topk(min(args.topk, len(probabilities)))
    ranking = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return "\n".join(
        f"{rank} {probability:.4f} {names[index]}"
        for rank, (probability, index) in enumerate(ranking, start=1)
    )


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
