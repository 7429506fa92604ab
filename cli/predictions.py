"""What a trained network says of images: decoding, running, ranking."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from cli import networks
from image_classification.data.decode import read_image
from image_classification.data.resize import validation_crop
from image_classification.data.stage import MEAN, STD
from image_classification.models import check_image_size
from sparse import runtime


@dataclass(frozen=True)
class Classifier:
    """A trained network, ready to run."""

    load: Callable[[Path], Tensor]
    """Returns an image file as the network takes it: (1, 3, S, S)."""
    logits: Callable[[Tensor], Tensor]
    """Takes any number of such images."""


def from_checkpoint(
    file: Path, *, arch: str | None, image_size: int | None, cpu: bool
) -> Classifier:
    """Return the network of a checkpoint of main.py, on the GPU where there is one.

    Args:
        file: The checkpoint.
        arch: What it must hold; None accepts any.
        image_size: Side of the images; None: that of the training.
        cpu: Stay on the CPU.

    Raises:
        ValueError: One line: the file cannot be used, or the size does not suit.
    """
    trained = networks.read_checkpoint(file, arch=arch)
    size = image_size or trained.image_size
    model = trained.model()
    check_image_size(model, trained.arch, size)
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    model = model.to(device)
    load = functools.partial(load_image, image_size=size, interpolation=trained.interpolation)
    return Classifier(load, lambda images: model(images.to(device)))


def from_compact(file: Path, *, arch: str | None, image_size: int | None) -> Classifier:
    """Return the network of a compact file, planned and tuned for the CPU; else as above."""
    network = runtime.load(file)
    header = network.header
    if arch not in (None, header.arch):
        raise ValueError(f"{file} holds {header.arch}, --arch is {arch}; leave --arch out")
    if header.in_channels != len(MEAN):
        raise ValueError(
            f"{file} takes images of {header.in_channels} channels, image files are read with "
            f"{len(MEAN)}: run it with sparse.runtime.load"
        )
    size = image_size or header.image_size
    network(torch.zeros(1, header.in_channels, size, size))
    load = functools.partial(load_image, image_size=size, interpolation=header.interpolation)
    return Classifier(functools.partial(load, mean=header.mean, std=header.std), network)


def from_both(file: Path, *, arch: str | None, image_size: int | None) -> tuple[Classifier, str]:
    """Return the network of a checkpoint, which sparse.runtime and torch run; and what torch runs.

    Raises:
        ValueError: One line: the file cannot be used, or the network cannot be traced.
    """
    if networks.is_compact(file):
        raise ValueError(
            f"--fallback has no effect with {file}, which is no checkpoint: leave it out"
        )
    trained = networks.read_checkpoint(file, arch=arch)
    size = image_size or trained.image_size
    model = trained.model()
    check_image_size(model, trained.arch, size)
    try:
        network = runtime.hybrid(model, image_size=size)
    except runtime.BuildError as error:
        raise ValueError(
            f"--fallback needs the kernels of the runtime: {error}; --resume runs {file} in torch"
        ) from error
    network(torch.zeros(1, 3, size, size))  # plans and tunes it
    load = functools.partial(load_image, image_size=size, interpolation=trained.interpolation)
    return Classifier(load, network), str(network.report)


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
