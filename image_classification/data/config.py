"""What a data loader is told (`DataConfig`) and what it offers (`Loader`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from image_classification.data.bad_files import BadFiles
from image_classification.ranges import AT_LEAST_0, AT_LEAST_1, Range

INTERPOLATIONS = ("bilinear", "bicubic", "triangular", "tensorflow")
AUGMENTATIONS = ("autoaugment",)
MEMORY_FORMATS = (torch.channels_last, torch.contiguous_format)
RANGES = {
    "image_size": AT_LEAST_1,
    "batch_size": AT_LEAST_1,
    "prefetch": AT_LEAST_1,
    "num_classes": AT_LEAST_1,
    "synthetic_length": AT_LEAST_1,
    "workers": AT_LEAST_0,
    "max_bad_files": Range("in [0, 1]", lambda value: 0 <= value <= 1),
}
"""Ranges of the numbers in `DataConfig`."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Describe the loaders of one process.

    Attributes:
        path: Directory with `train/<class>/` and `val/<class>/`; None for the synthetic backend.
        backend: A name in `image_classification.data.BACKENDS`.
        image_size: Side of the square images handed out, in pixels.
        resize: Shorter side of a validation image before its center crop, at least `image_size`;
            None means `image_size * 256 / 224`, rounded.
        interpolation: One of `INTERPOLATIONS`, antialiased but for "tensorflow", which is the
            bicubic filter of TensorFlow 1 and crops validation images before it resizes them. The
            triangular filter is what an antialiased bilinear one is; DALI alone knows that name.
        batch_size: Images per batch of this process.
        workers: Loader processes (pytorch; 0 loads in the calling process) or threads (DALI).
        prefetch: Batches made ahead: per worker (pytorch) or in the pipeline (DALI).
        seed: Seed of the order, the crops and the flips.
        rank: Rank of this process among all, across machines.
        world_size: Number of processes.
        device: Where batches are handed out.
        memory_format: `torch.channels_last` or `torch.contiguous_format`.
        num_classes: Number of classes the model tells apart.
        augmentation: None or one of `AUGMENTATIONS` (pytorch backend, training only).
        synthetic_length: Batches per epoch of the synthetic backend.
        max_bad_files: Share of the images of a split, 0 to 1, that may be unreadable.

    Raises:
        ValueError: A value is out of range, or the combination has no meaning.
    """

    path: Path | None
    backend: str
    image_size: int = 224
    resize: int | None = None
    interpolation: str = "bilinear"
    batch_size: int = 256
    workers: int = 5
    prefetch: int = 2
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    memory_format: torch.memory_format = torch.channels_last
    num_classes: int = 1000
    augmentation: str | None = None
    synthetic_length: int = 100
    max_bad_files: float = 0.001

    @property
    def shorter_side(self) -> int:
        """Return the shorter side of a validation image before its center crop, in pixels."""
        return round(self.image_size * 256 / 224) if self.resize is None else self.resize

    def __post_init__(self) -> None:
        # Imported here, because the backends import this module.
        from image_classification.data.backends import BACKENDS, check_backend

        _check_choice("--data-backend", self.backend, BACKENDS)
        _check_choice("--interpolation", self.interpolation, INTERPOLATIONS)
        if self.augmentation is not None:
            _check_choice("--augmentation", self.augmentation, AUGMENTATIONS)
        for name, within in RANGES.items():
            if (value := getattr(self, name)) not in within:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be {within}")
        if self.memory_format not in MEMORY_FORMATS:
            raise ValueError(f"memory_format {self.memory_format}: channels last or contiguous")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size} processes")
        if self.shorter_side < self.image_size:
            raise ValueError(
                f"validation images resized to {self.shorter_side} pixels are too small for a crop"
                f" of {self.image_size}: pass a size of at least {self.image_size}"
            )
        check_backend(self.backend, self.interpolation, self.augmentation)
        spec = BACKENDS[self.backend]
        if spec.reads_images and self.path is None:
            raise ValueError(f"--data-backend {self.backend} needs a data directory")
        if spec.needs_cuda and self.device.type != "cuda":
            raise ValueError(
                f"--data-backend {self.backend} needs a CUDA device, not {self.device}: pass"
                " --data-backend dali-cpu"
            )


def _check_choice(flag: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{flag} {value!r} is not one of {', '.join(choices)}")


class Loader(Protocol):
    """Hand out the batches of this rank, one epoch at a time.

    What an epoch holds depends on the seed, the epoch and the position only, never on the epochs
    that ran before in this process.
    """

    @property
    def bad_files(self) -> BadFiles:
        """Return the account of the files that could not be read."""
        ...

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch on this rank."""
        ...

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield float32 images [n, 3, S, S], normalized, and int64 targets [n], on the device.

        A batch has no image at all (n = 0) when none of them can be read.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position: what comes after the batch handed out last."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the coming `epoch` go on from a position."""
        ...

    def close(self) -> None:
        """Stop the processes and threads of the loader; it is not used afterwards."""
        ...
