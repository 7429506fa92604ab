"""Choose the scales and zero points of a network's values, from its values for some images."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.ao.quantization.observer import HistogramObserver

from . import graph
from .graph import INPUT, Node
from .units import Quantization, quantized_values, units

METHODS = ("mse", "percentile", "minmax")
"""How the range of a value is chosen; what lies outside is saturated."""

PERCENTILE = 99.99


def calibrate(
    nodes: Sequence[Node],
    state: Mapping[str, Tensor],
    batches: Iterable[Tensor],
    *,
    method: str = "mse",
) -> tuple[list[Node], dict[str, Quantization]]:
    """Return the graph to be quantized, and scale and zero point of each value that int8 reads.

    With both, `save(..., dtype="int8", fold=True)` writes a quantized network. The graph lacks the
    adaptive pools that change nothing for images of this size.

    Args:
        nodes: Graph of the network (`trace`).
        state: Dense state dict, as trained.
        batches: Images (N, C, H, W), normalized, float32. The same images give the same result.
        method: One of `METHODS`. "mse" takes the range with about the least squared error,
            "percentile" the range of 99.99% of the values, "minmax" that of all of them.

    Raises:
        ValueError: The network has nothing to compute in int8, there are no images, a value is not
            finite, or the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    state, batches = graph.float32(state), iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("there are no images to calibrate with")
    with torch.inference_mode():
        nodes = _without_identities(nodes, state, first[:1])
        found = units(nodes)
        names = quantized_values(found)
        # Pools whose value and source int8 reads. With one scale for both they stay in bytes.
        pools = {
            unit.name: unit
            for unit in found
            if unit.node.op == "max_pool" and {unit.name, unit.node.inputs[0]} <= set(names)
        }
        observers = {name: HistogramObserver() for name in names if name not in pools}
        for images in itertools.chain([first], batches):
            for name, value in itertools.chain(
                [(INPUT, images)], graph.values(nodes, state, images)
            ):
                if name in observers:
                    _observe(name, observers[name], value)
        chosen = {name: _choose(observer, method) for name, observer in observers.items()}
    for name, unit in pools.items():
        chosen[name] = chosen[unit.node.inputs[0]]
    return nodes, {name: chosen[name] for name in names}


def _without_identities(
    nodes: Sequence[Node], state: Mapping[str, Tensor], images: Tensor
) -> list[Node]:
    """Return the graph without the adaptive pools whose windows are single pixels."""
    shapes = {INPUT: images.shape}
    shapes |= {name: value.shape for name, value in graph.values(nodes, state, images)}
    stands_for = {INPUT: INPUT}
    kept = []
    for node in nodes:
        inputs = tuple(stands_for[name] for name in node.inputs)
        stands_for[node.name] = node.name
        if node.op == "adaptive_avg_pool" and shapes[node.name] == shapes[node.inputs[0]]:
            stands_for[node.name] = inputs[0]
        else:
            kept.append(dataclasses.replace(node, inputs=inputs))
    return kept


def _observe(name: str, observer: HistogramObserver, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"the value of {name!r} is not finite: the network cannot be quantized")
    observer(value)


def _choose(observer: HistogramObserver, method: str) -> Quantization:
    if method == "mse":
        scale, zero_point = observer.calculate_qparams()
        return float(scale), int(zero_point)
    low, high = float(observer.min_val), float(observer.max_val)
    if method == "percentile":
        low, high = _percentiles(observer)
    return affine(low, high)


def _percentiles(observer: HistogramObserver) -> tuple[float, float]:
    """Return the range of `PERCENTILE` of the values, half of the others on either side."""
    low, high = float(observer.min_val), float(observer.max_val)
    share = observer.histogram.double().cumsum(0) / observer.histogram.double().sum()
    outside = (1 - PERCENTILE / 100) / 2
    below = int((share < outside).sum())
    above = int((share < 1 - outside).sum()) + 1
    width = (high - low) / len(share)
    return low + below * width, min(high, low + above * width)


def affine(low: float, high: float) -> Quantization:
    """Return scale and zero point of a range, which is widened to hold 0 exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = torch.tensor((high - low) / 255, dtype=torch.float32).clamp(min=SMALLEST)
    return float(scale), round(-low / float(scale))


SMALLEST = torch.finfo(torch.float32).eps
"""The smallest scale: that of a value which is always 0."""
