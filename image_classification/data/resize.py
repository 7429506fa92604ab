"""Bring images to their final size, with torchvision's filters or TensorFlow's bicubic one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F


def resize_crop(crop: Tensor, *, size: int, interpolation: str, flip: bool) -> Tensor:
    """Return a crop, uint8 [3, h, w], resized to [3, size, size], and flipped.

    All filters but "tensorflow" are antialiased.
    """
    if interpolation == "tensorflow":
        resized = _resize_as_tensorflow(crop, size)
    else:
        resized = F.resize(crop, [size, size], interpolation=_mode(interpolation), antialias=True)
    return resized.flip(-1) if flip else resized


def validation_crop(image: Tensor, *, size: int, shorter_side: int, interpolation: str) -> Tensor:
    """Return an image, uint8 [3, H, W], as validation sees it, uint8 [3, size, size].

    torchvision's way resizes the shorter side to `shorter_side` and crops the center. With
    "tensorflow" the center crop of `size / shorter_side` of the shorter side comes first, as in
    the evaluation of the RigL repository (`_decode_and_center_crop` of TensorFlow's ResNet).
    """
    if interpolation != "tensorflow":
        image = F.resize(image, [shorter_side], interpolation=_mode(interpolation), antialias=True)
        cropped: Tensor = F.center_crop(image, [size, size])
        return cropped
    height, width = image.shape[1:]
    crop = max(1, min(height, width) * size // shorter_side)
    top, left = (height - crop + 1) // 2, (width - crop + 1) // 2
    return _resize_as_tensorflow(image[:, top : top + crop, left : left + crop], size)


def _mode(interpolation: str) -> v2.InterpolationMode:
    return v2.InterpolationMode("bilinear" if interpolation == "triangular" else interpolation)


def _resize_as_tensorflow(image: Tensor, size: int) -> Tensor:
    """Resize as `tf.image.resize_bicubic` of TensorFlow 1 does.

    Output pixel i lies at input pixel i * h / size, the kernel is Keys' with a = -0.75, it is not
    widened where images shrink, and the border is repeated.

    Deviations: TensorFlow looks the kernel up in a table of 1024 places (up to 0.25 of 255 for
    noise), and hands on fractions and values beyond 0 and 255, which are rounded off here.
    """
    # grid_sample counts from -1 at the first pixel to 1 at the last one
    y, x = (torch.arange(size) * (n / size) * 2 / max(n - 1, 1) - 1 for n in image.shape[1:])
    grid = torch.stack([x.expand(size, size), y[:, None].expand(size, size)], dim=-1)
    resized = grid_sample(
        image[None].float(), grid[None], mode="bicubic", padding_mode="border", align_corners=True
    )
    return resized[0].round().clamp(0, 255).to(torch.uint8)


class CropResizer:
    """Resize the crops of whole batches in a thread pool.

    DALI's resize on the CPU takes four times as long, which is more than decoding.

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
