"""The DALI backends: decoding and resizing in threads (dali-cpu) or on the GPU (dali-gpu).

The pipelines hold no random operator and no reader. They are given the file names of each batch and
the random numbers of its crops, so order and augmentation are those of the plan. A pipeline has no
state to save: any batch of any epoch can be made on its own.

`read_image` decides for all backends whether a file is an image. DALI differs in three ways:

- A file that DALI cannot decode ends the pipeline. The bad files of the batch are then searched
  for, and a new pipeline continues with the same batch without them.
- DALI cannot decode a few files that are images. These are copied to PNG files, and so are TIFF
  files about which DALI would print complaints on the terminal.
- DALI decodes only the crop of a file, and does not notice if the file is cut off below the crop.
  The first and the last bytes of a file tell which files have to be checked.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.utils.dlpack
from torch import Tensor

from image_classification.data.config import DataConfig
from image_classification.data.crop import crop_parameters
from image_classification.data.decode import (
    is_plain_tiff,
    read_image,
    why_unreadable,
    write_png,
)
from image_classification.data.folder import ImageList
from image_classification.data.loader import BackendSpec
from image_classification.data.order import IntArray
from image_classification.data.resize import CropResizer
from image_classification.data.stage import Batch

Feed = tuple[list[npt.NDArray[Any]], ...]

_TIFF = (b".tif", b".tiff")


class DaliSource:
    """Read images with a DALI pipeline."""

    def __init__(self, config: DataConfig, images: ImageList, *, training: bool) -> None:
        self._config = config
        self._images = images
        self._training = training
        self._labels = torch.from_numpy(images.labels)
        self._epoch = 0
        self._batches: Sequence[IntArray] = ()
        self._feeds: Iterator[Feed] = iter(())
        self._bad: dict[int, str] = {}  # index -> reason
        self._whole: set[int] = set()  # checked because they looked suspicious: they are images
        self._copies: dict[int, bytes] = {}  # index -> name of the PNG file
        self._directory: tempfile.TemporaryDirectory[str] | None = None  # of the copies
        self._pipeline = self._build()
        self._threads = max(1, config.workers)
        self._resizer: CropResizer | None = None
        if (training and config.backend == "dali-cpu") or config.interpolation == "tensorflow":
            self._resizer = CropResizer(
                size=config.image_size,
                interpolation=config.interpolation,
                threads=self._threads,
            )

    def read(self, epoch: int, batches: Sequence[IntArray]) -> Generator[Batch, None, None]:
        """Yield the images of each batch of indices."""
        self._clear()
        self._epoch, self._batches = epoch, batches
        self._feeds = self._feeds_from(0)
        under_way: deque[Callable[[], Batch]] = deque()  # batches whose crops are being resized
        ahead = 0 if self._resizer is None else 1
        for number in range(len(batches) + ahead):
            if number < len(batches):
                under_way.append(self._run(number))
            if number >= ahead:
                yield under_way.popleft()()

    def close(self) -> None:
        """Free the pipeline with its threads and buffers."""
        self._pipeline = None
        if self._resizer is not None:
            self._resizer.close()
        if self._directory is not None:
            self._directory.cleanup()

    def _build(self) -> Any:
        return _build(self._config, training=self._training, feed=self._next_feed)

    def _next_feed(self) -> Feed:
        return next(self._feeds)  # StopIteration tells DALI that the epoch has ended

    def _feeds_from(self, number: int) -> Iterator[Feed]:
        for indices in self._batches[number:]:
            good = self._readable(indices)
            if len(good):  # DALI takes no empty batch
                yield self._feed(good)

    def _feed(self, indices: IntArray) -> Feed:
        paths = self._images.paths[indices].tolist()
        names = [
            np.frombuffer(self._copies.get(index, path), dtype=np.uint8)
            for index, path in zip(indices.tolist(), paths, strict=True)
        ]
        if not self._training:
            return (names,)
        return names, list(crop_parameters(self._config.seed, self._epoch, indices))

    def _readable(self, indices: IntArray) -> IntArray:
        """Return the indices without the files known to be bad, which no later batch changes."""
        for index in self._images.irregular.intersection(indices.tolist()):
            self._is_image(index)  # DALI would wait for a pipe to be written
        self._admit_tiffs(indices)
        return indices[[index not in self._bad for index in indices.tolist()]]

    def _admit_tiffs(self, indices: IntArray) -> None:
        """Check TIFF files before DALI sees them; copy those about which DALI would complain."""
        named = zip(indices.tolist(), self._images.paths[indices].tolist(), strict=True)
        tiffs = [index for index, path in named if path.lower().endswith(_TIFF)]
        fresh = [index for index in tiffs if index not in self._whole and index not in self._bad]
        if fresh:
            self._look_at(fresh)
        for index in fresh:
            if index in self._whole and not is_plain_tiff(self._images.path(index)):
                self._copy(index)

    def _is_image(self, index: int) -> bool:
        """Check a suspicious file, only once."""
        if index not in self._whole and index not in self._bad:
            self._look_at([index])
        return index in self._whole

    def _look_at(self, indices: Sequence[int]) -> None:
        with ThreadPoolExecutor(self._threads) as pool:
            reasons = pool.map(why_unreadable, map(self._images.path, indices))
            for index, reason in zip(indices, reasons, strict=True):
                if reason is None:
                    self._whole.add(index)
                else:
                    self._whole.discard(index)
                    self._bad[index] = reason

    def _run(self, number: int) -> Callable[[], Batch]:
        """Take a batch from the pipeline; return a function that waits for its images."""
        on_gpu = self._config.backend == "dali-gpu"
        failed = False
        while len(good := self._readable(self._batches[number])):
            # A buffer is bound to the stream that uses it. It goes back to DALI in the order of
            # this stream.
            stream = torch.cuda.current_stream(self._config.device) if on_gpu else None
            try:
                outputs = self._pipeline.run(stream)
            except RuntimeError as error:
                self._pipeline = None  # a DALI pipeline cannot run after an error
                # If no file is to blame, a file server may have failed to answer: try again once.
                if not self._found_culprit(good) and failed:
                    raise RuntimeError(f"DALI failed: {_gist(error)}") from error
                failed = True
                self._pipeline = self._build()
                self._feeds = self._feeds_from(number)
            else:
                return self._collect(number, good, outputs)
        size = self._config.image_size
        images = torch.empty(0, size, size, 3, dtype=torch.uint8, device=self._output_device())
        return lambda: self._batch(number, good, images)

    def _collect(self, number: int, fed: IntArray, outputs: Any) -> Callable[[], Batch]:
        *pixels, heads, tails = outputs
        suspects = fed[_is_suspicious(heads.as_array(), tails.as_array())]
        keep = np.isin(fed, [i for i in suspects.tolist() if not self._is_image(i)], invert=True)
        kept, good = np.flatnonzero(keep).tolist(), fed[keep]
        images = pixels[0]
        if self._resizer is not None:
            crops = [torch.utils.dlpack.from_dlpack(images[i]) for i in kept]
            flips = pixels[1].as_array()[keep].tolist() if self._training else [False] * len(crops)
            wait = self._resizer.start(crops, flips)
            return lambda: self._batch(number, good, wait())
        tensor: Tensor = torch.utils.dlpack.from_dlpack(images.as_tensor())
        if len(good) < len(fed):
            tensor = tensor[kept]
        return lambda: self._batch(number, good, tensor)

    def _batch(self, number: int, good: IntArray, images: Tensor) -> Batch:
        indices = self._batches[number].tolist()
        bad_files = {self._images.path(i): self._bad[i] for i in indices if i in self._bad}
        return Batch(images, self._labels[torch.from_numpy(good)], bad_files)

    def _output_device(self) -> torch.device:
        on_gpu = self._config.backend == "dali-gpu"
        return self._config.device if on_gpu else torch.device("cpu")

    def _found_culprit(self, fed: IntArray) -> bool:
        """Find the files on which DALI failed: bad files, else images that it cannot decode."""
        self._look_at(fed.tolist())
        return not self._bad.keys().isdisjoint(fed.tolist()) or self._copied_undecodable(fed)

    def _copied_undecodable(self, indices: IntArray) -> bool:
        num_copies = len(self._copies)
        for row in indices.reshape(-1, 1):
            (index,) = row.tolist()
            if index not in self._copies and not self._decodes(row):
                self._copy(index)
        return len(self._copies) > num_copies

    def _copy(self, index: int) -> None:
        """Let DALI read a PNG file in the place of an image."""
        if self._directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix="images-")
        copy = Path(self._directory.name) / f"{index}.png"
        write_png(read_image(self._images.path(index)), copy)
        self._copies[index] = os.fsencode(copy)

    def _decodes(self, row: IntArray) -> bool:
        """Return whether DALI decodes an image."""
        alone = dataclasses.replace(self._config, batch_size=1, workers=1, prefetch=1)
        feeds = iter([self._feed(row)])
        pipeline = _build(alone, training=self._training, feed=lambda: next(feeds))
        try:
            pipeline.run()
        except RuntimeError:
            return False
        return True

    def _clear(self) -> None:
        """Empty the pipeline of what the previous epoch left in it."""
        self._feeds = iter(())
        try:
            while self._pipeline is not None:
                self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
        except RuntimeError:  # a bad file in a batch that is no longer wanted
            self._pipeline = None
        if self._pipeline is None:
            self._pipeline = self._build()


def _is_suspicious(heads: npt.NDArray[np.uint8], tails: npt.NDArray[np.uint8]) -> Any:
    """Return which files DALI may take a crop of although they are cut off.

    These are JPEG files that do not end with the end-of-image marker, and TIFF files. DALI reads
    all other formats to the end.

    Args:
        heads: First two bytes of each file, [n, 2].
        tails: Last two bytes of each file, [n, 2].
    """
    is_jpeg = (heads == (0xFF, 0xD8)).all(1)
    is_ended = (tails == (0xFF, 0xD9)).all(1)
    is_tiff = (heads == tuple(b"II")).all(1) | (heads == tuple(b"MM")).all(1)
    return (is_jpeg & ~is_ended) | is_tiff


def _gist(error: Exception) -> str:
    """Return the line of DALI's message that tells what was wrong."""
    text = str(error).rpartition("encountered:")[2]
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


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


_NO_POLICIES = {
    "autoaugment": "needs --data-backend pytorch: DALI draws its policies from a hidden state, so"
    " that a resumed run would not repeat them"
}
CPU_SPEC = BackendSpec(source=DaliSource, refuses=_NO_POLICIES)
GPU_SPEC = BackendSpec(
    source=DaliSource,
    needs_cuda=True,
    refuses={
        **_NO_POLICIES,
        "tensorflow": "is computed on the CPU: pass --data-backend dali-cpu or pytorch",
    },
)
