"""The graphs of the DALI pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types

from image_classification.data.config import DataConfig
from image_classification.data.crop import (
    ASPECT_RATIO,
    ATTEMPTS,
    FLIP,
    HEIGHTS,
    LEFT,
    TOP,
    WIDTHS,
)

# nvJPEG's buffers for the largest image of ImageNet: without the hint they are reallocated each
# time a larger one comes (sizes from NVIDIA's ConvNets).
_DEVICE_PADDING = 211_025_920
_HOST_PADDING = 140_544_512

_INTERPOLATIONS = {
    "bilinear": types.INTERP_LINEAR,
    "bicubic": types.INTERP_CUBIC,
    "triangular": types.INTERP_LINEAR,  # what DALI's linear filter with antialiasing is
}


def build(config: DataConfig, *, training: bool, feed: Callable[[], Any]) -> Any:
    """Build the pipeline of one split.

    Args:
        config: What to read and where.
        training: Random crop and flip; else resize and center crop.
        feed: Returns what the coming batch is made of: the encoded file names and, for training,
            rows of `crop_parameters`; raises StopIteration at the end of an epoch.
    """
    on_gpu = config.backend == "dali-gpu"
    device_id = None
    if on_gpu:
        device_id = config.device.index
        device_id = torch.cuda.current_device() if device_id is None else device_id
    graph = _training_graph if training else _validation_graph
    pipeline = pipeline_def(graph)(
        config,
        feed,
        on_gpu,
        batch_size=config.batch_size,
        num_threads=max(1, config.workers),
        device_id=device_id,
        prefetch_queue_depth=config.prefetch,
        exec_dynamic=True,
    )
    pipeline.build()
    return pipeline


def _training_graph(config: DataConfig, feed: Callable[[], Any], on_gpu: bool) -> Any:
    names, parameters = fn.external_source(
        source=feed, num_outputs=2, dtype=[types.UINT8, types.FLOAT64], ndim=1
    )
    encoded = fn.io.file.read(names)
    top, left, height, width = _crop_window(*_shape(encoded), parameters)
    memory = _memory(on_gpu)
    images = fn.decoders.image_slice(
        encoded,
        device="mixed" if on_gpu else "cpu",
        start=fn.cast(fn.stack(top, left), dtype=types.INT32),
        shape=fn.cast(fn.stack(height, width), dtype=types.INT32),
        axes=[0, 1],
        output_type=types.RGB,
        adjust_orientation=False,
        **memory,
    )
    size = float(config.image_size)
    return fn.resize(
        images,
        # A negative width flips the image.
        resize_x=fn.cast(size * (1 - 2 * parameters[FLIP]), dtype=types.FLOAT),
        resize_y=size,
        interp_type=_INTERPOLATIONS[config.interpolation],
        antialias=True,
    )


def _validation_graph(config: DataConfig, feed: Callable[[], Any], on_gpu: bool) -> Any:
    (names,) = fn.external_source(source=feed, num_outputs=1, dtype=types.UINT8, ndim=1)
    encoded = fn.io.file.read(names)
    height, width = _shape(encoded)
    shorter, crop = config.shorter_side, config.image_size
    # The geometry of torchvision's Resize and CenterCrop, in integers: the longer side is rounded
    # down, the start of the crop to the nearest even number when it lies between two.
    smaller = math.min(height, width)
    new_height, new_width = height * shorter // smaller, width * shorter // smaller
    images = fn.decoders.image(
        encoded,
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        **_memory(on_gpu),
    )
    images = fn.resize(
        images,
        size=fn.cast(fn.stack(new_height, new_width), dtype=types.FLOAT),
        interp_type=_INTERPOLATIONS[config.interpolation],
        antialias=True,
    )
    start = fn.stack(_half_to_even(new_height - crop), _half_to_even(new_width - crop))
    return fn.slice(
        images, start=fn.cast(start, dtype=types.INT32), shape=[crop, crop], axes=[0, 1]
    )


def _memory(on_gpu: bool) -> dict[str, Any]:
    if not on_gpu:
        return {}
    return {"device_memory_padding": _DEVICE_PADDING, "host_memory_padding": _HOST_PADDING}


def _shape(encoded: Any) -> tuple[Any, Any]:
    """Return the height and the width of encoded images, int64."""
    shape = fn.peek_image_shape(encoded, adjust_orientation=False, dtype=types.INT64)
    return shape[0], shape[1]


def _half_to_even(number: Any) -> Any:
    """Return `round(number / 2)` as Python rounds, for non-negative integers."""
    half = number // 2
    return half + (number - 2 * half) * (half - 2 * (half // 2))


def _crop_window(height: Any, width: Any, parameters: Any) -> tuple[Any, Any, Any, Any]:
    """Return top, left, height and width as `crop.crop_window` does, with its arithmetic."""
    height = fn.cast(height, dtype=types.FLOAT64)
    width = fn.cast(width, dtype=types.FLOAT64)
    side = math.sqrt(height * width)
    widths = _rounded(side * parameters[WIDTHS])
    heights = _rounded(side * parameters[HEIGHTS])
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    # The first attempt that fits, or the one behind them all.
    numbers = types.Constant(np.arange(ATTEMPTS, dtype=np.int32))
    first = fn.reductions.min(numbers * fits + ATTEMPTS * (fits == 0))
    found = first < ATTEMPTS
    widest = ASPECT_RATIO[1]
    widths = fn.cat(widths, fn.stack(math.min(width, _rounded(height * widest))))
    heights = fn.cat(heights, fn.stack(math.min(height, _rounded(width * widest))))
    window_height, window_width = heights[first], widths[first]
    room_y, room_x = height - window_height, width - window_width
    top = found * math.floor(parameters[TOP] * (room_y + 1)) + (1 - found) * math.floor(room_y / 2)
    left = found * math.floor(parameters[LEFT] * (room_x + 1)) + (1 - found) * math.floor(
        room_x / 2
    )
    return top, left, window_height, window_width


def _rounded(number: Any) -> Any:
    return math.floor(number + 0.5)
