"""Bring training crops to their final size with torchvision's filters for uint8 images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F


def resize_crop(crop: Tensor, *, size: int, interpolation: str, flip: bool) -> Tensor:
    """Return a crop, uint8 [3, h, w], resized to [3, size, size] with antialiasing, and flipped."""
    mode = v2.InterpolationMode("bilinear" if interpolation == "triangular" else interpolation)
    resized: Tensor = F.resize(crop, [size, size], interpolation=mode, antialias=True)
    return resized.flip(-1) if flip else resized


class CropResizer:
    """Resize the crops of whole batches in threads of its own.

    DALI's resize on the CPU takes four times as long, more than decoding.

    Args:
        size: Side of the images.
        interpolation: Name of the filter.
        threads: Crops under way at a time.
    """

    def __init__(self, *, size: int, interpolation: str, threads: int) -> None:
        self._size = size
        self._interpolation = interpolation
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="resize")

    def start(self, crops: Sequence[Tensor], flips: Sequence[bool]) -> Callable[[], Tensor]:
        """Begin with a batch of uint8 crops [h, w, 3].

        Returns:
            A function that waits for the batch and returns it, uint8 [n, size, size, 3].
        """
        batch = torch.empty(len(crops), self._size, self._size, 3, dtype=torch.uint8)

        def resize(image: Tensor, crop: Tensor, flip: bool) -> None:
            channels_first = crop.permute(2, 0, 1)
            resized = resize_crop(
                channels_first, size=self._size, interpolation=self._interpolation, flip=flip
            )
            image.copy_(resized.permute(1, 2, 0))

        running = [self._pool.submit(resize, *row) for row in zip(batch, crops, flips, strict=True)]

        def wait() -> Tensor:
            for future in running:
                future.result()
            return batch

        return wait

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(cancel_futures=True)
