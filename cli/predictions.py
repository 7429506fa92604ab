"""What a trained network says of images: decoding, running, ranking."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from cli.networks import Trained
from image_classification.data.decode import read_image
from image_classification.data.resize import validation_crop
from image_classification.data.stage import MEAN, STD
from image_classification.models import check_image_size
from sparse import runtime


@torch.no_grad()
def predict(
    trained: Trained, paths: Sequence[Path], *, image_size: int | None, cpu: bool
) -> Iterator[Tensor]:
    """Yield the probability of each class, (num_classes,), for one image after the other.

    Args:
        trained: The network.
        paths: Image files.
        image_size: Side of the images; None: that of the training.
        cpu: Stay on the CPU where there is a GPU.

    Raises:
        ValueError: One line: an image cannot be read, or is of a size that does not suit.
    """
    size = image_size or trained.image_size
    model = trained.model()
    check_image_size(model, trained.arch, size)
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    model = model.to(device)
    for path in paths:
        image = load_image(path, image_size=size, interpolation=trained.interpolation)
        yield model(image.to(device))[0].softmax(0)


def predict_compact(
    network: runtime.Network, paths: Sequence[Path], *, image_size: int | None, batch: bool
) -> Iterator[tuple[Tensor, float]]:
    """Yield the probabilities of each call, (images, num_classes), and its milliseconds.

    The first call was preceded by another one, which plans and tunes.

    Args:
        network: The network of a compact sparse file.
        paths: Image files.
        image_size: Side of the images; None: that of the training.
        batch: Run all images in one call.

    Raises:
        ValueError: One line: an image cannot be read.
    """
    header = network.header
    images = torch.cat(
        [
            load_image(
                path,
                image_size=image_size or header.image_size,
                interpolation=header.interpolation,
                mean=header.mean,
                std=header.std,
            )
            for path in paths
        ]
    )
    network(images[:1])
    for group in [images] if batch else [image[None] for image in images]:
        start = time.perf_counter()
        logits = network(group)
        milliseconds = 1e3 * (time.perf_counter() - start)
        yield logits.softmax(1), milliseconds


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
