"""The graphs of the DALI pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, math, pipeline_def, types

from image_classification.data.config import DataConfig
from image_classification.data.crop import FLIP, crop_windows
from image_classification.data.order import FloatArray, IntArray

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
        training: Random crop and flip; else resize and center crop. On the CPU the pipeline yields
            the crops as they are and whether to flip them, on the GPU it resizes and flips, too.
            With TensorFlow's filter validation yields crops, too.
            The last two outputs are the first and the last two bytes of each file, in memory.
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
    encoded = _read(names)
    # In Python: the same windows as in the other backend, and one call for a batch costs less
    # than the thirty arithmetic operators it takes in the graph.
    call: Any = fn.python_function
    start, window = call(
        _shape(encoded), parameters, function=_windows, num_outputs=2, batch_processing=True
    )
    images = _decode(encoded, on_gpu, start=start, shape=window)
    if not on_gpu:
        flips = fn.cast(parameters[FLIP], dtype=types.BOOL)
        return images, flips, *_ends(encoded)  # for `CropResizer`
    size = float(config.image_size)
    images = fn.resize(
        images,
        # A negative width flips the image.
        resize_x=fn.cast(size * (1 - 2 * parameters[FLIP]), dtype=types.FLOAT),
        resize_y=size,
        interp_type=_INTERPOLATIONS[config.interpolation],
        antialias=True,
    )
    return images, *_ends(encoded)


def _validation_graph(config: DataConfig, feed: Callable[[], Any], on_gpu: bool) -> Any:
    (names,) = fn.external_source(source=feed, num_outputs=1, dtype=types.UINT8, ndim=1)
    encoded = _read(names)
    shape = _shape(encoded)
    height, width = shape[0], shape[1]
    shorter, crop = config.shorter_side, config.image_size
    if config.interpolation == "tensorflow":
        side = math.max(1, math.min(height, width) * crop // shorter)
        start = fn.stack((height - side + 1) // 2, (width - side + 1) // 2)
        start, window = (
            fn.cast(place, dtype=types.INT32) for place in (start, fn.stack(side, side))
        )
        return _decode(encoded, on_gpu, start=start, shape=window), *_ends(encoded)  # CropResizer
    # The geometry of torchvision's Resize and CenterCrop, in integers: the longer side is rounded
    # down, the start of the crop to the nearest even number when it lies between two.
    smaller = math.min(height, width)
    new_height, new_width = height * shorter // smaller, width * shorter // smaller
    # The slice is the whole image. It makes the decoder wait for the shape, so that the decoder
    # never sees a file without a shape. DALI 2.4 crashes on such a file while other threads open
    # theirs.
    whole = fn.cast(shape[:2], dtype=types.INT32)
    images = _decode(encoded, on_gpu, start=[0, 0], shape=whole)
    images = fn.resize(
        images,
        size=fn.cast(fn.stack(new_height, new_width), dtype=types.FLOAT),
        interp_type=_INTERPOLATIONS[config.interpolation],
        antialias=True,
    )
    start = fn.stack(_half_to_even(new_height - crop), _half_to_even(new_width - crop))
    images = fn.slice(
        images, start=fn.cast(start, dtype=types.INT32), shape=[crop, crop], axes=[0, 1]
    )
    return images, *_ends(encoded)


def _decode(encoded: Any, on_gpu: bool, *, start: Any, shape: Any) -> Any:
    memory: dict[str, Any] = {}
    if on_gpu:
        memory = {"device_memory_padding": _DEVICE_PADDING, "host_memory_padding": _HOST_PADDING}
    return fn.decoders.image_slice(
        encoded,
        device="mixed" if on_gpu else "cpu",
        start=start,
        shape=shape,
        axes=[0, 1],
        output_type=types.RGB,
        adjust_orientation=False,
        **memory,
    )


def _read(names: Any) -> Any:
    # Without memory mapping: faster here, and what network file systems want.
    return fn.io.file.read(names, dont_use_mmap=True)


def _ends(encoded: Any) -> tuple[Any, Any]:
    return encoded[:2], encoded[-2:]


def _shape(encoded: Any) -> Any:
    """Return height, width and channels of encoded images, int64."""
    return fn.peek_image_shape(encoded, adjust_orientation=False, dtype=types.INT64)


def _half_to_even(number: Any) -> Any:
    """Return `round(number / 2)` as Python rounds, for non-negative integers."""
    half = number // 2
    return half + (number - 2 * half) * (half - 2 * (half // 2))


def _windows(
    shapes: list[IntArray], parameters: list[FloatArray]
) -> tuple[list[npt.NDArray[np.int32]], list[npt.NDArray[np.int32]]]:
    """Return start and shape of the crops of a batch."""
    windows = crop_windows(np.stack(shapes)[:, :2], np.stack(parameters)).astype(np.int32)
    return list(windows[:, :2]), list(windows[:, 2:])
