"""The last step of every backend: to the device, to the memory format, normalized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Batch(NamedTuple):
    """Images, and what is missing among them.

    Attributes:
        images: As a source reads them uint8 [n, S, S, 3], as they go out float32 [n, 3, S, S].
        targets: int64 [n].
        bad_files: The files of the batch that could not be read: name -> reason.
    """

    images: Tensor
    targets: Tensor
    bad_files: dict[str, str]


class _Launched(NamedTuple):
    """A batch whose copy and normalization are under way on the side stream."""

    batch: Batch
    done: torch.cuda.Event


class DeviceStage:
    """Turn uint8 images [n, S, S, 3] into what a model takes.

    The images handed out are float32 [n, 3, S, S], `(value / 255 - mean) / std` per channel, in
    the memory format asked for. A CUDA device copies and normalizes the coming batch on a side
    stream while the model works on the present one.
    """

    def __init__(
        self, *, device: torch.device, memory_format: torch.memory_format, image_size: int
    ) -> None:
        self._device = device
        self._memory_format = memory_format
        # (x / 255 - mean) / std as one multiplication and one addition
        shift = [-mean / std for mean, std in zip(MEAN, STD, strict=True)]
        self._shift = self._row(shift, image_size)
        self._scale = self._row([1 / (255 * value) for value in STD], image_size)
        self._side = _side_stream(device) if device.type == "cuda" else None

    def __call__(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches on the device."""
        if self._side is not None:
            return self._on_cuda(batches, self._side)
        return (batch._replace(images=self._normalize(batch.images)) for batch in batches)

    def _row(self, values: list[float], width: int) -> Tensor:
        # One number for each element of a row of pixels: arithmetic on a row is vectorized, on
        # the three numbers of a pixel it is not.
        row = torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1).expand(1, 3, 1, width)
        return row.contiguous(memory_format=self._memory_format).to(self._device)

    def _normalize(self, images: Tensor) -> Tensor:
        view = images.permute(0, 3, 1, 2)
        pixels = self._empty(view.shape).copy_(view)
        return torch.addcmul(self._shift, pixels, self._scale, out=pixels)

    def _empty(self, shape: torch.Size) -> Tensor:
        if self._device.type != "cpu":
            return torch.empty(
                shape, device=self._device, memory_format=self._memory_format, dtype=torch.float32
            )
        # NumPy asks the kernel for huge pages, torch does not: the page faults of a fresh batch
        # would cost several times the arithmetic.
        n, c, h, w = shape
        if self._memory_format == torch.channels_last:
            return torch.from_numpy(np.empty((n, h, w, c), np.float32)).permute(0, 3, 1, 2)
        return torch.from_numpy(np.empty((n, c, h, w), np.float32))

    def _on_cuda(self, batches: Iterator[Batch], side: torch.cuda.Stream) -> Iterator[Batch]:
        side.wait_stream(torch.cuda.current_stream(self._device))  # for the constants
        ahead = self._launch(batches, side)
        while ahead is not None:
            ready, ahead = ahead, self._launch(batches, side)
            consumer = torch.cuda.current_stream(self._device)
            consumer.wait_event(ready.done)
            # The allocator knows these tensors on the side stream only. Without `record_stream` it
            # could give their memory to a later batch while the consumer still reads it.
            ready.batch.images.record_stream(consumer)
            ready.batch.targets.record_stream(consumer)
            yield ready.batch

    def _launch(self, batches: Iterator[Batch], side: torch.cuda.Stream) -> _Launched | None:
        # The backend runs inside this context, too. If it decodes on the GPU, it delivers on this
        # stream.
        with torch.cuda.stream(side):
            batch = next(batches, None)
            if batch is None:
                return None
            images = self._normalize(self._copy(batch.images))
            batch = batch._replace(images=images, targets=self._copy(batch.targets))
            return _Launched(batch, side.record_event())

    def _copy(self, tensor: Tensor) -> Tensor:
        # Only pinned memory is copied asynchronously; torch's host allocator keeps a pinned block
        # until the copies that read it are done.
        if tensor.device.type == "cpu" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
