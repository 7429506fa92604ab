"""Images per second of the data backends, beside a plain torchvision loader.

Measures training batches at 224 pixels from photo-sized JPEG files (500 x 375, about 100 KB, made
from scikit-learn's sample photos): reading, decoding, random resized crop, flip and normalization.
The loaders take turns within each round, so that a busy machine slows all of them; medians over
the rounds are printed. A CPU-second counts user and system time of this process and its workers.

    python -m benchmarks.data_loading [--json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout

from image_classification import data

Epoch = Callable[[int], Iterator[Any]]
IMAGE_SIZE = 224


def main() -> None:
    """Run the benchmark."""
    arguments = parse()
    torch.set_num_threads(1)  # of this process; the loaders bring their own workers
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        kilobytes = write_photos(root / "train", arguments.images)
        loaders: dict[str, Epoch] = {
            name.replace("-", "_"): ours(root, name, arguments) for name in arguments.backends
        }
        loaders["torchvision"] = plain_torchvision(root / "train", arguments)
        rounds = [measure_all(loaders, epoch) for epoch in range(arguments.rounds + 1)]
    result = summarize(rounds[1:])  # the first round starts workers and fills caches
    result |= {
        "images": arguments.images,
        "mean_kilobytes": round(kilobytes),
        "batch_size": arguments.batch_size,
        "workers": arguments.workers,
        "rounds": arguments.rounds,
    }
    report(list(loaders), result)
    if arguments.json:
        print(json.dumps(result))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--backends", nargs="+", default=["dali-cpu", "pytorch"], choices=["dali-cpu", "pytorch"]
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    return parser.parse_args()


def write_photos(directory: Path, count: int) -> float:
    """Write photos into two classes and return their mean size in kilobytes."""
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    sizes = []
    for number in range(count):
        label = number % 2
        photo = photos[label]
        scale = rng.uniform(0.6, 1.0)
        width, height = int(photo.width * scale), int(photo.height * scale)
        left = rng.integers(photo.width - width + 1)
        top = rng.integers(photo.height - height + 1)
        size = (500, 375) if rng.random() < 0.75 else (375, 500)
        photo = photo.resize(size, box=(left, top, left + width, top + height))
        if rng.random() < 0.5:
            photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        file = directory / str(label) / f"{number:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        photo.save(file, quality=97)
        sizes.append(file.stat().st_size / 1000)
    return mean(sizes)


def ours(root: Path, backend: str, arguments: argparse.Namespace) -> Epoch:
    """Return the training epochs of one of our backends."""
    config = data.DataConfig(
        path=root,
        backend=backend,
        image_size=IMAGE_SIZE,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        num_classes=2,
    )
    return data.create_train_loader(config).epoch


def plain_torchvision(directory: Path, arguments: argparse.Namespace) -> Epoch:
    """Return the epochs of the loader that most training scripts write."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(IMAGE_SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    loader = DataLoader(
        ImageFolder(str(directory), transform),
        batch_size=arguments.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=arguments.workers,
        persistent_workers=True,
    )
    return lambda epoch: iter(loader)


def measure_all(loaders: dict[str, Epoch], epoch: int) -> dict[str, tuple[float, float]]:
    """Return images per CPU-second and per second of each loader, over one epoch."""
    return {name: measure(loader, epoch) for name, loader in loaders.items()}


def measure(epochs: Epoch, epoch: int) -> tuple[float, float]:
    """Return images per CPU-second and per second of an epoch."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    images = sum(len(batch[0]) for batch in epochs(epoch))
    cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    return images / cpu, images / wall


def cpu_seconds() -> float:
    """Return the user and system time of this process, its threads and its live workers."""
    ticks = 0
    for child in multiprocessing.active_children():
        # The name of the program, in parentheses, may hold spaces; utime and stime come after.
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def summarize(rounds: list[dict[str, tuple[float, float]]]) -> dict[str, Any]:
    """Return medians over the rounds, and ratios to torchvision as medians of per-round ratios."""
    result: dict[str, Any] = {}
    for name in rounds[0]:
        result[f"{name}_per_cpu_second"] = round(median(r[name][0] for r in rounds), 1)
        result[f"{name}_per_second"] = round(median(r[name][1] for r in rounds), 1)
        if name != "torchvision":
            for suffix, column in (("", 0), ("_wall", 1)):
                ratios = [r[name][column] / r["torchvision"][column] for r in rounds]
                result[f"{name}_over_torchvision{suffix}"] = round(median(ratios), 3)
    return result


def report(names: list[str], result: dict[str, Any]) -> None:
    """Print a table."""
    print(f"{'loader':<14}{'img/CPU-s':>10}{'ratio':>8}{'img/s':>10}{'ratio':>8}")
    for name in names:
        ratios = [result.get(f"{name}_over_torchvision{suffix}", 1.0) for suffix in ("", "_wall")]
        print(
            f"{name:<14}{result[f'{name}_per_cpu_second']:>10.1f}{ratios[0]:>8.2f}"
            f"{result[f'{name}_per_second']:>10.1f}{ratios[1]:>8.2f}"
        )


if __name__ == "__main__":
    main()
