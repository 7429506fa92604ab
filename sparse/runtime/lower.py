"""Lower a graph to layers: fold BatchNorm, activations and sums into the layers before them.

An operation that cannot be folded becomes a depthwise convolution. A lone BatchNorm is a 1x1
convolution, as is a lone sum or activation, with weight 1. Average-pooling has equal weights. What
happens to each channel of a vector becomes a linear layer with one group per channel.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from . import graph
from .arrays import Array
from .graph import ACTIVATIONS, INPUT, VECTORS, Node, entries

PACKED = 4  # kPacked of op.h

_KEEPING = ("layer_norm", "quantize", "lookup")
"""Kinds of layers that give a vector if they read one."""


@dataclass(frozen=True, kw_only=True)
class Integers:
    """How a layer computes in int8; op.h explains the numbers."""

    channels: int
    """Output channels. Those of a layer whose value is bytes are planes of 4 of them."""
    zero_point: int = 0
    """Of the layer's value."""
    scales: Array | None = None
    """float32."""
    rescale: Array | None = None
    """float32, the members of Rescale; None if the value is float32."""


@dataclass(kw_only=True)
class Layer:
    """A node of the graph and what was folded into it. The layer's value has the layer's name."""

    name: str
    kind: str
    """conv, linear, max_pool, mean_pool, scale, adaptive_avg_pool, concat, chunk, shuffle or slice;
    layer_norm, tokens, token or attention. In int8 also quantize and lookup.

    A linear layer whose source is a map reads its pixels, channel by channel. `tokens` takes the
    pixels of a map row by row, puts others before them and adds to all.
    """
    source: str
    """Name of the layer whose value is read, or `INPUT`."""
    channels: int
    """Output channels."""
    weight: Array | None = None
    """float32 (out, in / groups), and then (kh, kw) of a convolution.

    A layer_norm has (channels,). The tokens have (channels, tokens), which are added.
    """
    bias: Array | None = None
    """float32 (out,)."""
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    ceil_mode: bool = False
    output: tuple[int, int] = (1, 1)
    """Height and width of the value of an adaptive_avg_pool or a slice."""
    start: tuple[int, int] = (0, 0)
    """Row and column of the first pixel that a slice takes."""
    index: int = 0
    """The part of the channels that a chunk takes, or the pixel that a token takes."""
    parts: tuple[str, ...] = ()
    """Names of the layers whose values concat joins."""
    residual: str | None = None
    """Name of a layer whose value is added before the activation."""
    factor: str | None = None
    """Name of a layer whose vector multiplies the channels, for scale."""
    activation: str | None = None
    """One of `ACTIVATIONS`."""
    eps: float = 0.0
    """Of a layer_norm."""
    heads: int = 0
    score_scale: float = 0.0
    head_scale: Array | None = None
    """float32 (heads,), of an attention whose scores are cosines: by what they are multiplied."""
    position_bias: Array | None = None
    """float32 (heads, queries, keys): what an attention adds to the scores of a window."""
    window: tuple[int, int] = (0, 0)
    """Height and width of the windows of an attention; (0, 0) for all pixels."""
    shift: tuple[int, int] = (0, 0)
    spread: bool = False
    size: tuple[int, int] = (0, 0)
    """Height and width that `tokens` give; the last of them are the pixels of the source."""
    integers: "Integers | None" = None
    """How the layer computes in int8; its fields are then those that int8.py says."""

    @cached_property
    def num_active(self) -> int:
        """Number of weights that are not zero. Ask only when the layer is complete."""
        return 0 if self.weight is None else int(np.count_nonzero(self.weight))


def lower(nodes: Sequence[Node], state: dict[str, Tensor], *, in_channels: int) -> list[Layer]:
    """Return the layers of a graph that `check` accepts, with folded weights.

    Folding is done in float64: y = (x - mean) * scale + shift, scale = weight / sqrt(var + eps).

    Args:
        nodes: The graph.
        state: Parameters and statistics of the graph. Weights are removed from it one by one, so
            that memory does not hold them twice.
        in_channels: Channels of the images.

    Non-finite weights and statistics give non-finite results, as in torch, without a warning.
    """
    with np.errstate(all="ignore"):
        lowering = Lowering(nodes, state, in_channels)
        for node in nodes:
            lowering.add(node)
        return lowering.layers


class Lowering:
    """Turns nodes into layers, one after the other. int8.py adds those that compute in int8."""

    def __init__(self, nodes: Sequence[Node], state: dict[str, Tensor], in_channels: int) -> None:
        self.layers: list[Layer] = []
        self._state = state
        self._readers = Counter(name for node in nodes for name in entries(node))
        self._uses = Counter(name for node in nodes for name in node.inputs)
        self._uses[nodes[-1].name] += 1
        # name of a node -> name of the layer that computes its value
        self._values = {INPUT: INPUT}
        self._channels = {INPUT: in_channels}
        self._index = {INPUT: -1}
        self._vectors = set[str]()  # names of the layers whose value is a vector

    def add(self, node: Node) -> None:
        """Add a node that computes in float32 to the layers."""
        getattr(self, "_activation" if node.op in ACTIVATIONS else "_" + node.op)(node)

    def _append(self, name: str, layer: Layer) -> None:
        """Append the layer that computes the value of a node."""
        integers = layer.integers
        self._index[layer.name] = len(self.layers)
        self._channels[layer.name] = layer.channels if integers is None else integers.channels
        is_vector = layer.kind in _KEEPING and layer.source in self._vectors
        if layer.kind in VECTORS or is_vector:
            self._vectors.add(layer.name)
        self._values[name] = layer.name
        self.layers.append(layer)

    def _source(self, node: Node) -> str:
        return self._values[node.inputs[0]]

    def _open(self, name: str, *kinds: str) -> Layer | None:
        """Return the layer that computes a node if another node may be folded into the layer."""
        value = self._values[name]
        if value == INPUT or self._uses[name] > 1:
            return None
        layer = self.layers[self._index[value]]
        return layer if layer.kind in kinds and layer.activation is None else None

    def _array(self, name: str) -> Array:
        return self._state[name].double().numpy()

    def _weight(self, node: Node) -> Array:
        name = node.parameters + "weight"
        shared = self._readers[name] > 1
        weight = self._state[name] if shared else self._state.pop(name)
        return np.array(weight.float().numpy())  # a copy, because folding changes it

    def _conv(self, node: Node) -> None:
        weight = self._weight(node)
        if self._source(node) in self._vectors:
            weight = weight.reshape(len(weight), -1)  # of a 1x1 convolution
        layer = self._convolution(node, weight, self._bias(node, len(weight)))
        layer.kind = "conv" if weight.ndim == 4 else "linear"
        self._append(node.name, layer)

    def _bias(self, node: Node, channels: int) -> Array:
        bias = self._state.get(node.parameters + "bias")
        return np.zeros(channels, np.float32) if bias is None else bias.float().numpy().copy()

    def _convolution(self, node: Node, weight: Array, bias: Array) -> Layer:
        return self._layer(node, "conv", len(weight), weight=weight, bias=bias)

    def _layer(self, node: Node, kind: str, channels: int, **values: Any) -> Layer:
        return Layer(
            name=node.name,
            kind=kind,
            source=self._source(node),
            channels=channels,
            kernel=node.kernel,
            stride=node.stride,
            padding=node.padding,
            dilation=node.dilation,
            groups=node.groups,
            ceil_mode=node.ceil_mode,
            output=node.output,
            index=node.index,
            start=node.start,
            **values,
        )

    def _depthwise(self, node: Node, weight: Array, bias: Array | None = None) -> Layer:
        """Append a depthwise convolution with a node's window; weight has the shape (channels,).

        For a vector it is the linear layer that does the same.
        """
        window = np.broadcast_to(weight[:, None, None, None], (len(weight), 1, *node.kernel))
        shift = np.zeros(len(weight)) if bias is None else bias
        layer = self._convolution(node, window.astype(np.float32), shift.astype(np.float32))
        layer.groups = len(weight)
        if self._source(node) in self._vectors:
            layer.kind, layer.weight = "linear", window[:, :, 0, 0].astype(np.float32)
        self._append(node.name, layer)
        return layer

    def _ones(self, node: Node) -> Array:
        return np.ones(self._channels[self._source(node)])

    def _batch_norm(self, node: Node) -> None:
        names = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, var = (self._array(node.parameters + name) for name in names)
        scale = weight / np.sqrt(var + node.eps)
        shift = bias - mean * scale
        self._affine(node, scale, shift)

    def _scale(self, node: Node) -> None:
        scale = self._array(node.parameters).reshape(-1)
        self._affine(node, scale, np.zeros(len(scale)))

    def _affine(self, node: Node, scale: Array, shift: Array) -> None:
        """Multiply the channels by a scale and add a shift, in the layer before if that is open."""
        conv = self._open(node.inputs[0], "conv", "linear")
        if conv is None or conv.residual is not None or (conv.integers is not None and shift.any()):
            self._depthwise(node, scale, shift)
            return
        self._values[node.name] = conv.name
        if conv.integers is not None:
            assert conv.integers.scales is not None
            scales = (conv.integers.scales * scale).astype(np.float32)
            conv.integers = replace(conv.integers, scales=scales)
            return
        assert conv.weight is not None
        assert conv.bias is not None
        scales = scale.reshape(-1, *[1] * (conv.weight.ndim - 1))
        np.multiply(conv.weight, scales, out=conv.weight, casting="same_kind")
        conv.bias = (conv.bias * scale + shift).astype(np.float32)

    def _activation(self, node: Node) -> None:
        layer = self._open(node.inputs[0], "conv", "linear")
        if layer is None:
            layer = self._depthwise(node, self._ones(node))
        layer.activation = node.op
        self._values[node.name] = layer.name

    def _add(self, node: Node) -> None:
        # The sum is folded into the later operand: the other one has been computed by then.
        early, late = sorted(node.inputs, key=lambda name: self._index[self._values[name]])
        layer = self._open(late, "conv")
        if layer is None or layer.residual is not None:
            layer = self._depthwise(node, self._ones(node))
            early = node.inputs[1]
        layer.residual = self._values[early]
        self._values[node.name] = layer.name

    def _mul(self, node: Node) -> None:
        source, factor = (self._values[name] for name in node.inputs)
        if source in self._vectors:
            source, factor = factor, source
        channels = self._channels[source]
        layer = Layer(name=node.name, kind="scale", source=source, factor=factor, channels=channels)
        self._append(node.name, layer)

    def _avg_pool(self, node: Node) -> None:
        self._depthwise(node, self._ones(node) / (node.kernel[0] * node.kernel[1]))

    def _own_layer(self, node: Node) -> None:
        """Append a layer of the kind of the node's operation."""
        self._other(node, node.op)

    _max_pool = _mean_pool = _token = _adaptive_avg_pool = _shuffle = _slice = _own_layer

    def _other(self, node: Node, kind: str, channels: int | None = None) -> Layer:
        """Append a layer that is no convolution; by default with the channels of its source."""
        own = self._channels[self._source(node)] if channels is None else channels
        layer = self._layer(node, kind, own)
        self._append(node.name, layer)
        return layer

    def _pixel_linear(self, node: Node) -> None:
        weight = self._weight(node)
        bias = self._bias(node, len(weight))
        if not node.key_bias:
            bias[len(bias) // 3 : len(bias) // 3 * 2] = 0
        self._append(node.name, self._convolution(node, weight[:, :, None, None], bias))

    def _layer_norm(self, node: Node) -> None:
        layer = self._other(node, "layer_norm")
        weight = self._state.get(node.parameters + "weight")
        layer.weight = np.ones(layer.channels, np.float32)
        if weight is not None:
            layer.weight = weight.float().numpy().copy()
        layer.bias = self._bias(node, layer.channels)
        layer.eps = node.eps

    def _attention(self, node: Node) -> None:
        layer = self._other(node, "attention", self._channels[self._source(node)] // 3)
        layer.heads, layer.score_scale = node.heads, node.score_scale
        layer.window, layer.shift, layer.spread = node.window, node.shift, node.spread
        state = {name: self._state[name].double() for name in entries(node)}
        index = graph.index_entry(node)
        if index is not None:
            state[index] = self._state[index]
        bias = graph.position_bias(node, state)
        layer.position_bias = None if bias is None else bias.float().numpy()
        if node.cosine:
            layer.score_scale = 1.0
            layer.head_scale = graph.cosine_scale(node, state).float().numpy()

    def _prepend(self, node: Node) -> None:
        layer = self._other(node, "tokens")
        first = self._array(node.parameters).reshape(node.tokens, layer.channels)
        count = node.tokens + node.size[0] * node.size[1]
        layer.size = 1, count
        layer.weight = np.zeros((layer.channels, count), np.float32)
        layer.weight[:, : node.tokens] = first.T

    def _embedding(self, node: Node) -> None:
        layer = self._open(node.inputs[0], "tokens")
        added = self._array(node.parameters).reshape(-1, self._channels[self._source(node)]).T
        if layer is None:
            layer = self._other(node, "tokens")
            layer.size, layer.weight = node.size, added.astype(np.float32)
            return
        assert layer.weight is not None
        layer.weight = (layer.weight + added).astype(np.float32)
        self._values[node.name] = layer.name

    def _chunk(self, node: Node) -> None:
        self._other(node, "chunk", self._channels[self._source(node)] // node.groups)

    def _concat(self, node: Node) -> None:
        parts = tuple(self._values[name] for name in node.inputs)
        self._other(node, "concat", sum(self._channels[name] for name in parts))
        self.layers[-1].parts = parts

    _linear = _conv
