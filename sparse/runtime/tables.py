"""Weights in the order in which the kernels read them."""

from dataclasses import dataclass

import numpy as np

from sparse.runtime.layout import Map
from sparse.runtime.lower import Array, Layer

CONNECTION = np.dtype([("offset", "<i4"), ("weight", "<f4")])
DENSE_CHANNELS = 4  # kDenseChannels of conv.h


@dataclass(frozen=True, kw_only=True)
class SparseTable:
    """Connections by part, block of input channels, output channel; see op.h."""

    row_begin: Array
    row_channel: Array
    part_begin: Array
    connections: Array
    num_blocks: int


@dataclass(frozen=True, kw_only=True)
class DenseTable:
    """All weights in groups of 4 output channels, and the offset of every term."""

    weights: Array
    offsets: Array
    part_begin: Array


def offsets(layer: Layer, source: Map) -> Array:
    """Return the offset (input channels, kh, kw) of every tap from a tile's first vector."""
    kh, kw = layer.kernel
    channel = np.arange(source.channels)[:, None, None] * source.plane
    row = (np.arange(kh) * layer.dilation[0] - layer.padding[0])[None, :, None] * source.row
    vector = (np.arange(kw) * layer.dilation[1] - layer.padding[1]) * source.lanes
    result = channel + row + vector[None, None, :]
    if abs(result).max() >= 2**31:
        raise ValueError(f"layer {layer.name}: the image is too large for the runtime")
    return result


def split(channels: int, num_parts: int) -> Array:
    """Return the first channel of each of `num_parts` parts, and the end: multiples of 4."""
    bounds = np.arange(num_parts + 1) * channels // num_parts
    bounds = bounds // DENSE_CHANNELS * DENSE_CHANNELS
    bounds[-1] = channels
    return bounds.astype(np.int64)


def sparse_table(layer: Layer, source: Map, *, block_size: int, num_parts: int) -> SparseTable:
    """Return the connections of a convolution: the weights that are not zero.

    Inside a part and block, output channels are ordered by their number of connections, so that
    the lengths of successive loops are predictable.

    Args:
        layer: A convolution.
        source: Layout of its input.
        block_size: Input channels per block; 0 for one block.
        num_parts: Ranges of output channels.
    """
    assert layer.weight is not None
    weight = layer.weight
    out, tap_in, i, j = np.nonzero(weight)
    per_group = len(weight) // layer.groups
    tap = tap_in + out // per_group * weight.shape[1]
    num_blocks = -(-source.channels // block_size) if block_size else 1
    block = tap // block_size if block_size else np.zeros_like(tap)
    bounds = split(layer.channels, num_parts)
    part_of = np.repeat(np.arange(num_parts), np.diff(bounds))

    counts = np.zeros((num_blocks, layer.channels), np.int64)
    np.add.at(counts, (block, out), 1)
    channels = np.arange(layer.channels)
    order = [np.lexsort((channels, -row, part_of)) for row in counts]
    begin: list[Array] = []
    channel: list[Array] = []
    start = 0
    rank = np.empty((num_blocks, layer.channels), np.int64)  # of a channel in the stream
    for part in range(num_parts):
        for b in range(num_blocks):
            chosen = order[b][bounds[part] : bounds[part + 1]]
            ends = start + np.concatenate([[0], np.cumsum(counts[b, chosen])])
            rank[b, chosen] = len(channel) * layer.channels + np.arange(len(chosen))
            begin.append(ends)
            channel.append(chosen)
            start = int(ends[-1])
    taps = offsets(layer, source)
    offset = taps[tap, i, j]
    nearness = np.empty(taps.size, np.int64)  # rank of a tap in the order of memory
    nearness[np.argsort(taps.ravel(), kind="stable")] = np.arange(taps.size)
    stream = np.argsort(rank[block, out] * taps.size + nearness.reshape(taps.shape)[tap, i, j])
    connections = np.empty(len(stream), CONNECTION)
    connections["offset"] = offset[stream]
    connections["weight"] = weight[out, tap_in, i, j][stream]
    return SparseTable(
        row_begin=np.concatenate(begin).astype(np.int32),
        row_channel=np.concatenate(channel).astype(np.int32),
        part_begin=bounds,
        connections=connections,
        num_blocks=num_blocks,
    )


def dense_table(layer: Layer, source: Map, *, num_parts: int) -> DenseTable:
    """Return all weights of an ungrouped convolution, zeros included, in the order of memory."""
    assert layer.weight is not None
    taps = offsets(layer, source).ravel()
    order = np.argsort(taps, kind="stable")
    flat = expand_groups(layer).reshape(layer.channels, -1)[:, order]
    padded = np.zeros((-(-layer.channels // DENSE_CHANNELS) * DENSE_CHANNELS, len(taps)))
    padded[: layer.channels] = flat
    packed = padded.reshape(-1, DENSE_CHANNELS, len(taps)).transpose(0, 2, 1)
    return DenseTable(
        weights=np.ascontiguousarray(packed, np.float32),
        offsets=taps[order].astype(np.int32),
        part_begin=split(layer.channels, num_parts),
    )


def expand_groups(layer: Layer) -> Array:
    """Return the weight (out, in, kh, kw) of the same convolution with one group."""
    assert layer.weight is not None
    if layer.groups == 1:
        return layer.weight
    out, per_group, kh, kw = layer.weight.shape
    full = np.zeros((out, per_group * layer.groups, kh, kw), np.float32)
    for c in range(out):
        first = c // (out // layer.groups) * per_group
        full[c, first : first + per_group] = layer.weight[c]
    return full


def linear_table(weight: Array) -> SparseTable:
    """Return the connections of a linear layer; an offset is the index of the input."""
    out, source = np.nonzero(weight)
    connections = np.empty(len(out), CONNECTION)
    connections["offset"], connections["weight"] = source, weight[out, source]
    begin = np.concatenate([[0], np.cumsum(np.bincount(out, minlength=len(weight)))])
    return SparseTable(
        row_begin=begin.astype(np.int32),
        row_channel=np.arange(len(weight), dtype=np.int32),
        part_begin=np.array([0, len(weight)], np.int64),
        connections=connections,
        num_blocks=1,
    )
