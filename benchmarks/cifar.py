"""CIFAR-10 on one device, and the two recipes of benchmarks/convergence.py.

Images stay on the device as bytes and are augmented there. All random numbers come from torch's
generator of the CPU, so that an epoch has the same batches on every device.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from image_classification.models import create_model

CLASSES = 10
Split = tuple[Tensor, Tensor]
"""Images, uint8 (N, 3, 32, 32), and labels, int64 (N,)."""

PUBLISHED = {
    "rigl": {0.5: 94.2, 0.8: 93.6, 0.9: 92.9, 0.95: 91.8},
    "static": {0.5: 94.1, 0.8: 92.9, 0.9: 91.5, 0.95: 89.0},
    "gmp": {0.5: 94.0, 0.8: 93.6, 0.9: 93.3, 0.95: 92.3},
}
"""Top-1 in percent by method and sparsity: WRN-22-2, ERK, 250 epochs.

Source: https://github.com/google-research/rigl/issues/8 (one number each, without a spread).
"""


@dataclass(frozen=True)
class Pruning:
    """The ramp of gradual pruning, in optimizer steps."""

    start: int
    end: int
    every: int


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the functions of a run's length take its number of steps."""

    title: str
    epochs: int
    sparsities: tuple[float, ...]
    delta_t: int
    build: Callable[[], nn.Module]
    batches: Callable[[Split, int], Iterator[Split]]
    """Takes a split and the batch size; yields the augmented batches of an epoch."""
    prepare: Callable[[Tensor], Tensor]
    """Makes the network's input of bytes, without augmentation."""
    lr_factor: Callable[[int, int], float]
    """Takes the step and the number of steps; what the first learning rate is multiplied by."""
    t_end: Callable[[int], int]
    """The last step of a topology update."""
    pruning: Callable[[int, int], Pruning]
    """Takes the number of steps and delta_t."""
    decays_all: bool
    """Whether weight decay applies to BatchNorm and biases, too."""
    memory_format: torch.memory_format


def load(folder: Path, device: torch.device) -> dict[str, Split]:
    """Read the images of both splits as bytes.

    Raises:
        ValueError: The folder does not hold CIFAR-10 as directories of images.
    """
    data, names = {}, {}
    for split in ("train", "val"):
        try:
            dataset = ImageFolder(str(folder / split))
        except OSError as error:
            raise ValueError(f"{folder / split} holds no directories of images: {error}") from None
        names[split] = dataset.classes

        def read(path: str, dataset: ImageFolder = dataset) -> Tensor:
            try:
                image = pil_to_tensor(dataset.loader(path))
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error}") from None
            if image.shape != (3, 32, 32):
                height, width = image.shape[1:]
                raise ValueError(f"{path} has {width} x {height} pixels; CIFAR-10 has 32 x 32")
            return image

        with ThreadPoolExecutor() as pool:
            images = list(pool.map(read, (path for path, _ in dataset.samples)))
        data[split] = torch.stack(images).to(device), torch.tensor(dataset.targets).to(device)
    if names["train"] != names["val"] or len(names["train"]) != CLASSES:
        raise ValueError(
            f"{folder} has {len(names['train'])} classes in train and {len(names['val'])} in val; "
            f"CIFAR-10 has the same {CLASSES} in both"
        )
    return data


def build_small() -> nn.Module:
    """Build a network of three strided convolutions and two linear layers: 288 thousand weights."""

    def convolution(inputs: int, outputs: int) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *convolution(3, 16),
        *convolution(16, 32),
        *convolution(32, 64),
        nn.Flatten(),
        nn.Linear(1024, 256, bias=False),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Linear(256, CLASSES),
    )


def small_batches(split: Split, batch_size: int) -> Iterator[Split]:
    """Shuffle a split; flip images at random and shift each batch by up to four pixels."""
    images, labels = split
    order = torch.randperm(len(labels)).to(labels.device)
    for index in order.split(batch_size):
        if len(index) < batch_size:
            return
        batch = normalize(images[index])
        flip = torch.rand(batch_size, 1, 1, 1) < 0.5
        # The host need not wait: the few bytes are copied when the call returns.
        batch = torch.where(flip.to(batch.device, non_blocking=True), batch.flip(3), batch)
        padded = F.pad(batch, (4, 4, 4, 4))
        top, left = torch.randint(0, 9, (2,)).tolist()
        yield padded[:, :, top : top + 32, left : left + 32], labels[index]


def normalize(images: Tensor) -> Tensor:
    """Scale bytes to about unit variance."""
    return (images.float() - 120.0) / 62.0


def published_batches(split: Split, batch_size: int, *, group: int = 50) -> Iterator[Split]:
    """Shuffle a split; shift every image by up to four pixels and flip it at random.

    Args:
        split: Images and labels on the device.
        batch_size: Images per batch. What is left over at the end of an epoch is left out.
        group: Batches that are augmented together; a GPU does it in few large operations.
    """
    images, labels = split
    count = len(labels) // batch_size * batch_size
    order = torch.randperm(len(labels))[:count]
    top, left = torch.randint(0, 9, (2, count))
    flip = torch.rand(count) < 0.5
    draws = [drawn.to(labels.device) for drawn in (order, top, left, flip)]
    for index, *where in zip(*(drawn.split(group * batch_size) for drawn in draws), strict=True):
        augmented = crop(standardize(images[index]), *where)
        yield from zip(augmented.split(batch_size), labels[index].split(batch_size), strict=True)


def standardize(images: Tensor) -> Tensor:
    """Give each image mean 0 and variance 1 over its pixels and colors, as TensorFlow does."""
    values = images.float()
    deviation, mean = torch.std_mean(values, dim=(1, 2, 3), correction=0, keepdim=True)
    return (values - mean) / deviation.clamp(min=values[0].numel() ** -0.5)


def crop(images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Pad images by four pixels on each side, cut their own size out of them, flip some.

    The padding mirrors the image at its edge: row -1 is row 0, and row -2 is row 1.

    Args:
        images: (N, C, S, S).
        top: First row of the cut in the padded image, int64 (N,), from 0 to 8.
        left: First column, likewise.
        flip: Whether to swap left and right after the cut, bool (N,).
    """
    size = images.shape[-1]

    def source(start: Tensor) -> Tensor:
        index = start[:, None] - 4 + torch.arange(size, device=images.device)
        index = torch.where(index < 0, -1 - index, index)
        return torch.where(index >= size, 2 * size - 1 - index, index)

    rows, columns = source(top), source(left)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    number = torch.arange(len(images), device=images.device)
    cut = images[number[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2)


def published_lr_factor(step: int, total: int) -> float:
    """Multiply by 0.2 at steps 30,000, 60,000 and 90,000 of 97,500, in proportion."""
    return float(0.2 ** sum(step >= total * part // 13 for part in (4, 8, 12)))


def published_pruning(total: int, delta_t: int) -> Pruning:
    """Prune from step 20,000 to 75,000 of 97,500, every 1,000 steps; shorter runs more often."""
    start, end = total * 8 // 39, total * 10 // 13
    return Pruning(start, end, min(1000, max(1, (end - start) // 55)))


RECIPES = {
    "small": Recipe(
        title="small convolutional network",
        epochs=10,
        sparsities=(0.95, 0.98),
        delta_t=50,
        build=build_small,
        batches=small_batches,
        prepare=normalize,
        lr_factor=lambda step, total: 0.5 * (1.0 + math.cos(math.pi * step / total)),
        t_end=lambda total: 3 * total // 4,
        pruning=lambda total, delta_t: Pruning(total // 10, 3 * total // 4, delta_t),
        decays_all=True,
        memory_format=torch.contiguous_format,
    ),
    "wrn22_2": Recipe(
        title="WRN-22-2",
        epochs=250,
        sparsities=(0.95,),
        delta_t=100,
        build=lambda: create_model("wrn22_2", num_classes=CLASSES),
        batches=published_batches,
        prepare=standardize,
        lr_factor=published_lr_factor,
        t_end=lambda total: total * 10 // 13,
        pruning=published_pruning,
        decays_all=False,
        memory_format=torch.channels_last,
    ),
}
"""By --arch. That of wrn22_2 is the published one: rigl/cifar_resnet of google-research/rigl."""
