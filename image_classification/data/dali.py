"""The DALI backends: decoding and resizing in threads (dali-cpu) or on the GPU (dali-gpu).

The pipelines hold no random operator and no reader. They are fed the file names of each batch and
the random numbers of its crops, so that order and augmentation are those of the plan, with no state
to save: any batch of any epoch can be made at any time, alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.utils.dlpack
from torch import Tensor

from image_classification.data.config import DataConfig
from image_classification.data.crop import crop_parameters
from image_classification.data.decode import read_image
from image_classification.data.folder import ImageList
from image_classification.data.order import IntArray
from image_classification.data.resize import CropResizer
from image_classification.data.stage import Batch

Feed = tuple[list[npt.NDArray[Any]], ...]


class DaliSource:
    """Read images with a DALI pipeline."""

    def __init__(self, config: DataConfig, images: ImageList, *, training: bool) -> None:
        self._config = config
        self._images = images
        self._training = training
        self._labels = torch.from_numpy(images.labels)
        self._feeds: Iterator[Feed] = iter(())
        self._pipeline = self._build()
        self._resizer: CropResizer | None = None
        if training and config.backend == "dali-cpu":
            self._resizer = CropResizer(
                size=config.image_size,
                interpolation=config.interpolation,
                threads=max(1, config.workers),
            )

    def read(self, epoch: int, batches: Sequence[IntArray]) -> Generator[Batch, None, None]:
        """Yield the images of each batch of indices."""
        self._clear()
        self._feeds = (self._feed(epoch, indices) for indices in batches)
        under_way: deque[Callable[[], Tensor]] = deque()  # crops of the coming batch are resized
        ahead = 0 if self._resizer is None else 1
        for number in range(len(batches) + ahead):
            if number < len(batches):
                under_way.append(self._run(batches[number : number + self._config.prefetch + 1]))
            if number >= ahead:
                indices = batches[number - ahead]
                yield under_way.popleft()(), self._labels[torch.from_numpy(indices)]

    def close(self) -> None:
        """Free the pipeline with its threads and buffers."""
        self._pipeline = None
        if self._resizer is not None:
            self._resizer.close()

    def _build(self) -> Any:
        return _build(self._config, training=self._training, feed=self._next_feed)

    def _next_feed(self) -> Feed:
        return next(self._feeds)  # at the end of the epoch StopIteration tells DALI so

    def _feed(self, epoch: int, indices: IntArray) -> Feed:
        names = [
            np.frombuffer(name, dtype=np.uint8) for name in self._images.paths[indices].tolist()
        ]
        if not self._training:
            return (names,)
        return names, list(crop_parameters(self._config.seed, epoch, indices))

    def _run(self, in_flight: Sequence[IntArray]) -> Callable[[], Tensor]:
        """Take a batch from the pipeline; return a function that waits for its images."""
        device = self._config.device
        on_gpu = self._config.backend == "dali-gpu"
        # Bound to the stream that uses it, a buffer goes back to DALI in the order of that stream.
        stream = torch.cuda.current_stream(device) if on_gpu else None
        try:
            outputs = self._pipeline.run(stream)
        except RuntimeError as error:
            self._pipeline = None  # DALI does not go on after an error
            self._blame(in_flight)
            raise RuntimeError(f"DALI failed: {_last_line(error)}") from error
        images = outputs[0]
        if self._resizer is not None:
            crops = [torch.utils.dlpack.from_dlpack(images[i]) for i in range(len(images))]
            return self._resizer.start(crops, outputs[1].as_array().tolist())
        tensor: Tensor = torch.utils.dlpack.from_dlpack(images.as_tensor())
        return lambda: tensor

    def _blame(self, in_flight: Sequence[IntArray]) -> None:
        """Raise the error of the first file that cannot be read: DALI does not name it."""
        for indices in in_flight:
            for index in indices:
                read_image(self._images.path(index))

    def _clear(self) -> None:
        """Make the pipeline ready for an epoch, whatever is left in it of the one before."""
        self._feeds = iter(())
        try:
            while self._pipeline is not None:
                self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
        except RuntimeError:  # by a file of a batch that nobody waits for
            self._pipeline = None
        if self._pipeline is None:
            self._pipeline = self._build()


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _build(config: DataConfig, *, training: bool, feed: Callable[[], Feed]) -> Any:
    # Imported here: the other backends work without DALI.
    try:
        from image_classification.data import dali_graph
    except ImportError as error:
        if not (error.name or "").startswith("nvidia"):
            raise
        raise ValueError(
            f"--data-backend {config.backend} needs the package nvidia-dali-cuda130, which cannot"
            f" be imported ({error}): install it or pass --data-backend pytorch"
        ) from None
    return dali_graph.build(config, training=training, feed=feed)
