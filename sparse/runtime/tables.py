"""Tables of weights, in the order in which the kernels read them."""

from dataclasses import dataclass

import numpy as np

from .arrays import Array
from .layout import Map
from .lower import PACKED, Layer
from .windows import Windows

DENSE_CHANNELS = 4  # kDenseChannels of conv.h


@dataclass(frozen=True, kw_only=True)
class SparseTable:
    """Connections by part, block and group of output channels; op.h explains the members."""

    row_channel: Array
    counts: Array
    part_begin: Array
    part_stream: Array
    connections: Array


@dataclass(frozen=True, kw_only=True)
class DenseTable:
    """All weights in groups of 4 output channels, and the offset of every term.

    For pairs of rows, a term has two offsets and the sign of the second one. `counts` then has the
    number of terms of each product.
    """

    weights: Array
    offsets: Array
    part_begin: Array
    counts: Array | None = None


def offsets(layer: Layer, source: Map) -> Array:
    """Return the offset (input channels, kh, kw) of every tap from a tile's first vector."""
    kh, kw = layer.kernel
    channel = np.arange(source.channels)[:, None, None] * source.plane
    row = (np.arange(kh) * layer.dilation[0] - layer.padding[0])[None, :, None] * source.row
    vector = (np.arange(kw) * layer.dilation[1] - layer.padding[1]) * source.lanes
    result = channel + row + vector[None, None, :]
    if abs(result).max() >= 2**31:
        raise ValueError(f"layer {layer.name!r}: the image is too large for the runtime")
    return result


def split(channels: int, num_parts: int) -> Array:
    """Return the first channel of each of `num_parts` parts, multiples of 4, and the end."""
    bounds = np.arange(num_parts + 1) * channels // num_parts
    bounds = bounds // DENSE_CHANNELS * DENSE_CHANNELS
    bounds[-1] = channels
    return bounds.astype(np.int64)


def sparse_table(
    layer: Layer, source: Map, *, group: int, num_blocks: int, num_parts: int
) -> SparseTable:
    """Return the connections of a convolution: the weights that are not zero.

    Inside a part, output channels are ordered by their number of connections. Every block has the
    same share of each list of connections. The lengths of successive loops are thus predictable.
    Lists are in the order of memory, so a block reads roughly one range of the input. In int8 the
    channels of an output plane follow each other, because they are written together; a plane that
    lacks channels is the last one.

    Args:
        layer: A convolution.
        source: Layout of its input.
        group: Number of output channels that share the loads of their inputs: 1, 2 or 4.
        num_blocks: Number of blocks of connections. Partial sums are kept between blocks.
        num_parts: Number of ranges of output channels.
    """
    assert layer.weight is not None
    weight = layer.weight
    channels = len(weight)
    active = np.flatnonzero(weight)
    values = weight.ravel()[active]
    out, tap = (part.astype(np.int32) for part in np.divmod(active, weight[0].size))
    tap += out // (len(weight) // layer.groups) * weight[0].size
    taps = offsets(layer, source).ravel()
    by_place = np.argsort(taps, kind="stable")
    nearness = np.empty(taps.size, np.int32)  # the rank of each tap in the order of memory
    nearness[by_place] = np.arange(taps.size)

    bounds = split(channels, num_parts)
    part_of = np.repeat(np.arange(num_parts), np.diff(bounds))
    together = 1 if layer.integers is None else PACKED
    plane = np.arange(channels) // together
    work = np.bincount(plane[out], minlength=plane[-1] + 1)[plane]
    order = np.lexsort((plane, -work, plane >= channels // together, part_of))
    place = np.empty(channels, np.int32)
    place[order] = np.arange(channels)

    # The connections from one tap to the channels of a group become one entry of the stream.
    num_groups = -(-channels // group)
    row = place[out]
    entry = (row // group).astype(np.int64) * taps.size + nearness[tap]
    by_tap = np.argsort(entry * group + row % group)
    entry, member, values = entry[by_tap], row[by_tap] % group, values[by_tap]
    del active, out, tap, row, by_tap  # each is as large as the weights
    begin = np.flatnonzero(
        np.diff(entry, prepend=-1)
    )  # where each entry begins among the connections
    pattern = np.add.reduceat(1 << member, begin) if len(begin) else begin
    owner, tap = (part.astype(np.int32) for part in np.divmod(entry[begin], taps.size))

    # Every list (group, pattern) is cut into blocks of equal size.
    patterns = (1 << group) - 1
    listed = owner * patterns + pattern - 1
    by_list = np.argsort(listed, kind="stable")
    lengths = np.bincount(listed, minlength=num_groups * patterns)
    index = np.arange(len(listed)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    listed = listed[by_list]
    block = ((index + 1) * num_blocks - 1) // lengths[listed]
    part = part_of[order[::group]][listed // patterns]
    stream = np.lexsort((listed, block, part))
    chosen = by_list[stream]
    del entry, member, owner, pattern, by_list, index

    sizes = np.diff(begin, append=len(values))[chosen]
    position = np.cumsum(1 + sizes) - (1 + sizes)
    connections = np.empty(len(chosen) + len(values), np.float32)
    connections.view(np.int32)[position] = taps[by_place][tap[chosen]]
    within = np.arange(len(values)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    connections[np.repeat(position + 1, sizes) + within] = values[
        np.repeat(begin[chosen], sizes) + within
    ]
    first = bounds // group  # the first group of each part
    first[-1] = num_groups
    cell = block * np.diff(first)[part] + listed // patterns + first[part] * (num_blocks - 1)
    counts = np.bincount(
        cell * patterns + listed % patterns, minlength=num_blocks * num_groups * patterns
    )
    part_words = np.bincount(part[stream], 1 + sizes, minlength=num_parts)
    return SparseTable(
        row_channel=order.astype(np.int32),
        counts=counts.astype(np.int32),
        part_begin=bounds,
        part_stream=(np.cumsum(part_words) - part_words).astype(np.int64),
        connections=connections,
    )


def dense_table(layer: Layer, source: Map, *, num_parts: int) -> DenseTable:
    """Return all weights of an ungrouped convolution, with zeros, in the order of memory."""
    taps = offsets(layer, source).ravel()
    order = np.argsort(taps, kind="stable")
    assert layer.weight is not None
    flat = layer.weight.reshape(layer.channels, -1)[:, order]
    return DenseTable(
        weights=_by_channels(flat),
        offsets=taps[order].astype(np.int32),
        part_begin=split(layer.channels, num_parts),
    )


def can_pair(layer: Layer, rows: int) -> bool:
    """Tell whether pairs of output rows need fewer multiplications; see `paired_table`."""
    return rows >= 2 and layer.dilation[0] == 1 and layer.kernel[0] > 2 * layer.stride[0]


def paired_table(layer: Layer, source: Map, *, num_parts: int) -> DenseTable:
    """Return the weights of a dense convolution that computes rows in pairs, by F(2, 3).

    Three taps in a column of the convolution kernel, whose distance is the vertical stride, take 4
    products for a pair of rows instead of 6 (Lavin and Gray, CVPR 2016). A tap that is left over
    takes 2. The kernel adds the products in the order m1, m2, m0, m3. Every term of a product
    reads one or two rows of the input.
    """
    taps = offsets(layer, source)
    assert layer.weight is not None
    weight = layer.weight.astype(np.float64)
    stride, down = layer.stride[0], layer.stride[0] * source.row
    products: list[list[tuple[Array, Array, int, Array]]] = [[], [], [], []]
    for phase in range(stride):
        rows = range(phase, layer.kernel[0], stride)
        tripled = len(rows) // 3 * 3
        for i in rows[:tripled:3]:
            at = taps[:, i]
            upper, middle, lower = (weight[:, :, i + j * stride] for j in range(3))
            even, odd = (upper + lower) / 2, middle / 2
            products[0].append((at + down, at + 2 * down, 1, even + odd))
            products[1].append((at + 2 * down, at + down, -1, even - odd))
            products[2].append((at, at + 2 * down, -1, upper))
            products[3].append((at + 3 * down, at + down, -1, lower))
        for i in rows[tripled:]:
            at = taps[:, i]
            products[2].append((at, at, 0, weight[:, :, i]))
            products[3].append((at + down, at + down, 0, weight[:, :, i]))
    terms = [term for product in products for term in product]
    table = [np.stack([a, b, np.full_like(a, sign)], -1) for a, b, sign, _ in terms]
    flat = [values.reshape(layer.channels, -1) for *_, values in terms]
    return DenseTable(
        weights=_by_channels(np.concatenate(flat, 1)),
        offsets=np.concatenate([entry.reshape(-1, 3) for entry in table]).astype(np.int32),
        counts=np.array([sum(a.size for a, *_ in product) for product in products], np.int32),
        part_begin=split(layer.channels, num_parts),
    )


def _by_channels(flat: Array) -> Array:
    """Return weights (out, terms) as (out / 4, terms, 4); zeros fill the last group."""
    channels = -(-len(flat) // DENSE_CHANNELS) * DENSE_CHANNELS
    padded = np.zeros((channels, flat.shape[1]), np.float32)
    padded[: len(flat)] = flat
    grouped = padded.reshape(-1, DENSE_CHANNELS, flat.shape[1]).transpose(0, 2, 1)
    return np.ascontiguousarray(grouped)


def linear_table(weight: Array, *, groups: int) -> tuple[Array, Array]:
    """Return where the connections of each output begin, and the pairs (input index, weight).

    The weight has the shape (out, in / groups).
    """
    out, source = np.nonzero(weight)
    connections = np.empty((len(out), 2), np.float32)
    connections[:, 1] = weight[out, source]
    group = out // (len(weight) // groups)
    connections.view(np.int32)[:, 0] = source + group * weight.shape[1]
    begin = np.concatenate([[0], np.cumsum(np.bincount(out, minlength=len(weight)))])
    return begin.astype(np.int32), connections


def window_table(windows: Windows, source: Map, target: Map) -> Array:
    """Return where the tokens of windows lie in a channel: (2, windows, whole vectors of tokens).

    The first half is for the source, the second one for the target. After the last token is -1.
    """
    row, column = windows.pixels()
    found = np.full((2, len(windows), _whole(windows.tokens, source.lanes)), -1, np.int32)
    for half, value in zip(found, (source, target), strict=True):
        half[:, : windows.tokens] = value.places(row, column)
    return found


def bias_table(windows: Windows, layer: Layer, *, lanes: int) -> tuple[Array, Array] | None:
    """Return what is added to scores, and which of it to those of each window; None for nothing.

    The shape of the first one is (biases, heads, keys, whole vectors of queries). Windows that have
    the same mask have the same bias.

    Args:
        windows: The windows of an attention.
        layer: The attention.
        lanes: Floats per vector.
    """
    if layer.position_bias is None and windows.shift == (0, 0):
        return None
    tokens = windows.tokens
    masks, number = np.zeros((1, tokens, tokens), np.float32), np.zeros(len(windows), np.int64)
    if windows.shift != (0, 0):
        masks, number = np.unique(windows.masks(), axis=0, return_inverse=True)
    own = np.zeros((layer.heads, tokens, tokens), np.float32)
    added = masks[:, None] + (own if layer.position_bias is None else layer.position_bias)
    found = np.zeros((len(masks), layer.heads, tokens, _whole(tokens, lanes)), np.float32)
    found[..., :tokens] = added.swapaxes(2, 3)
    return found, number.reshape(-1).astype(np.int32)


def _whole(count: int, lanes: int) -> int:
    """Return the floats of the vectors that hold so many numbers."""
    return -(-count // lanes) * lanes
