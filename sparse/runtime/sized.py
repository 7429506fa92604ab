"""Turn layers whose windows depend on the size of the images into layers with windows."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from .graph import INPUT, VECTORS
from .layout import out_size
from .lower import Layer

Size = tuple[int, int]


def sized(layers: Sequence[Layer], size: tuple[int, int, int]) -> list[Layer]:
    """Return the layers for images of a size (channels, height, width).

    An adaptive average-pool becomes a depthwise convolution, whose windows do not overlap.
    """
    sizes = {INPUT: size[1:]}
    found = []
    for layer in layers:
        source = sizes.get(layer.source, (1, 1))
        if layer.kind == "adaptive_avg_pool":
            layer = _averaging(layer, source)
        if layer.kind not in VECTORS:
            sizes[layer.name] = layer_size(layer, source)
        found.append(layer)
    return found


def layer_size(layer: Layer, size: Size) -> Size:
    """Return height and width of a layer's value from those of its source."""
    if layer.kind == "tokens":
        return layer.size
    if layer.kind == "slice":
        return layer.output
    down, right = (
        out_size(*window, ceil_mode=layer.ceil_mode)
        for window in zip(
            size, layer.kernel, layer.stride, layer.padding, layer.dilation, strict=True
        )
    )
    return down, right


def _averaging(layer: Layer, size: Size) -> Layer:
    kernel = (size[0] // layer.output[0], size[1] // layer.output[1])
    weight = np.full((layer.channels, 1, *kernel), 1 / (kernel[0] * kernel[1]), np.float32)
    return dataclasses.replace(
        layer,
        kind="conv",
        weight=weight,
        bias=np.zeros(layer.channels, np.float32),
        kernel=kernel,
        stride=kernel,
        groups=layer.channels,
    )
