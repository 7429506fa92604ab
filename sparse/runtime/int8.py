"""Turn the units of a quantized network into layers that the kernels compute in int8.

Four neighboring channels lie where one channel lies in float32. Such a plane is what the plan of an
int8 network calls a channel, and four int8 weights are what it calls a weight. A weight is thus
active if one of the four is not zero.
"""

import math
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import memory
from .arrays import Array
from .graph import INPUT
from .integers import IntegerNetwork, Parameters, add_scales, looked_up, top
from .lower import PACKED, Integers, Layer
from .units import Unit

SIGNED = 128  # what kernels that multiply signed bytes subtract from activations


def integer_layers(network: IntegerNetwork, *, in_channels: int) -> list[Layer]:
    """Return the layers of a quantized network, after one that quantizes the images.

    A sum becomes part of the convolution that computes its later operand, if only the sum reads it.

    Args:
        network: The quantized network.
        in_channels: Channels of the images.

    Raises:
        ValueError: The groups of a convolution take too much memory.
    """
    return _Conversion(network, in_channels).layers


class _Conversion:
    def __init__(self, network: IntegerNetwork, in_channels: int) -> None:
        self._network = network
        self._units = {unit.name: unit for unit in network.units}
        self._uses = Counter(name for unit in network.units for name in unit.node.inputs)
        self._channels = {INPUT: in_channels}
        self._values = {INPUT: INPUT}  # name of a unit -> name of the layer that computes its value
        self._vectors = set[str]()
        self.layers = [self._image(in_channels)]
        self._index = {INPUT: 0}
        for unit in network.units:
            kind = "lookup" if unit.node.op in ("relu", "relu6") else unit.node.op
            getattr(self, "_" + kind)(unit)

    def _image(self, channels: int) -> Layer:
        scale, zero_point = self._network.activations[INPUT]
        integers = Integers(
            channels=channels,
            zero_point=zero_point,
            scales=np.array([scale], np.float32),
            rescale=_rescale(zero=zero_point),
        )
        planes = -(-channels // PACKED)
        return Layer(name=INPUT, kind="quantize", source=INPUT, channels=planes, integers=integers)

    def _append(self, unit: Unit, kind: str, integers: Integers, **values: Any) -> Layer:
        node = unit.node
        layer = Layer(
            name=unit.name,
            kind=kind,
            source=self._values[node.inputs[0]],
            channels=-(-integers.channels // PACKED),
            kernel=node.kernel,
            stride=node.stride,
            padding=node.padding,
            dilation=node.dilation,
            ceil_mode=node.ceil_mode,
            integers=integers,
            **values,
        )
        self._values[unit.name] = layer.name
        self._channels[unit.name] = integers.channels
        self._index[layer.name] = len(self.layers)
        self.layers.append(layer)
        return layer

    def _zero_point(self, name: str) -> int:
        return self._network.activations.get(name, (1.0, 0))[1]

    def _max_pool(self, unit: Unit) -> None:
        channels = self._channels[unit.node.inputs[0]]
        zero_point = self._zero_point(unit.name)
        self._append(unit, "max_pool", Integers(channels=channels, zero_point=zero_point))

    def _mean_pool(self, unit: Unit) -> None:
        source = unit.node.inputs[0]
        (scale, zero), (own_scale, own_zero) = (
            self._network.activations[name] for name in (source, unit.name)
        )
        integers = Integers(
            channels=self._channels[source],
            scales=np.array([scale, own_scale], np.float32),
            rescale=_rescale(zero=own_zero),
        )
        self._append(unit, "mean_pool", integers, bias=_as_floats([zero]))
        self._vectors.add(unit.name)

    def _lookup(self, unit: Unit) -> None:
        source = unit.node.inputs[0]
        integers = Integers(channels=self._channels[source], zero_point=self._zero_point(unit.name))
        table = looked_up(unit, *(self._network.activations[n] for n in (source, unit.name)))
        self._append(unit, "lookup", integers, weight=table.numpy().view(np.float32))
        if source in self._vectors:
            self._vectors.add(unit.name)

    def _conv(self, unit: Unit) -> None:
        if unit.node.inputs[0] in self._vectors:
            self._linear(unit)
            return
        values, groups = _regrouped(self._given(unit).weight.numpy(), unit.node.groups)
        self._products(unit, "conv", _packed(values), groups=groups)

    def _linear(self, unit: Unit) -> None:
        weight = self._given(unit).weight.flatten(1).numpy()
        if unit.node.op == "conv":
            weight = _merged(weight, unit.node.groups, unit.node.groups)
        channels = self._channels[unit.node.inputs[0]]
        by_pixel = weight.reshape(len(weight), channels, -1)  # a vector has one pixel
        self._products(unit, "linear", _packed(by_pixel).reshape(len(weight), -1))
        self._vectors.add(unit.name)

    def _given(self, unit: Unit) -> Parameters:
        return self._network.parameters[unit.name]

    def _products(self, unit: Unit, kind: str, weight: Array, *, groups: int = 1) -> None:
        """Append a layer of sums of products, with packed weights (out, planes / groups, ...)."""
        given, own = self._given(unit), self._network.activations.get(unit.name)
        integers = Integers(
            channels=len(weight),
            zero_point=self._zero_point(unit.name),
            scales=given.multiplier.numpy(),
            rescale=None if own is None else _rescale(zero=own[1], high=top(unit, own)),
        )
        bias = _bias(given.weight, given.bias, self._zero_point(unit.node.inputs[0]))
        self._append(unit, kind, integers, weight=weight, bias=bias, groups=groups)

    def _add(self, unit: Unit) -> None:
        first, second = unit.node.inputs
        early, late = sorted(unit.node.inputs, key=lambda name: self._index[self._values[name]])
        layer = self._open(late)
        if layer is None:
            early, late = second, first
            layer = self._identity(unit, late)
        activations = self._network.activations
        value = activations[unit.name]
        scale_a, scale_b, shift = add_scales(activations[first], activations[second], value)
        own_scale, res_scale = (scale_a, scale_b) if late == first else (scale_b, scale_a)
        assert layer.integers is not None
        layer.residual = self._values[early]
        layer.integers = Integers(
            channels=layer.integers.channels,
            zero_point=value[1],
            scales=layer.integers.scales,
            rescale=_rescale(
                zero=activations[late][1],
                own_last=late == first,
                own_scale=float(own_scale),
                res_scale=float(res_scale),
                shift=float(shift),
                sum_high=top(unit, value),
            ),
        )
        self._values[unit.name] = layer.name
        self._channels[unit.name] = self._channels[first]

    def _open(self, name: str) -> Layer | None:
        """Return the convolution that computes a value if a sum may be folded into it."""
        layer = self.layers[self._index[self._values[name]]]
        if layer.kind != "conv" or layer.name != name or layer.residual is not None:
            return None
        is_open = self._uses[name] == 1 and self._units[name].activation is None
        return layer if is_open else None

    def _identity(self, unit: Unit, source: str) -> Layer:
        """Append a convolution that gives the bytes of its source."""
        channels = self._channels[source]
        weight = torch.ones(channels, 1, 1, 1, dtype=torch.int8, device="cpu")
        bias = torch.zeros(channels, dtype=torch.int32, device="cpu")
        values, groups = _regrouped(weight.numpy(), channels)
        integers = Integers(channels=channels, scales=np.ones(channels, np.float32))
        layer = self._append(
            unit,
            "conv",
            integers,
            weight=_packed(values),
            bias=_bias(weight, bias, self._zero_point(source)),
            groups=groups,
        )
        layer.source = self._values[source]
        return layer


def _rescale(
    *,
    zero: int,
    high: int = 255,
    own_last: bool = False,
    own_scale: float = 0,
    res_scale: float = 0,
    shift: float = 0,
    sum_high: int = 255,
) -> Array:
    """Return the members of Rescale in op.h."""
    numbers = (zero, high - zero, own_last, own_scale, res_scale, shift, sum_high)
    return np.array(numbers, np.float32)


def _bias(weight: Tensor, bias: Tensor, zero_point: int) -> Array:
    """Return what sums of products begin with, and what signed bytes add to it (2 * out,)."""
    sums = weight.flatten(1).sum(1, dtype=torch.int64)
    return _as_floats(torch.cat([bias - zero_point * sums, SIGNED * sums]).tolist())


def _as_floats(integers: list[int]) -> Array:
    """Return the bits of 32-bit integers as float32."""
    return np.array(integers, np.int64).astype(np.int32).view(np.float32)


def _regrouped(values: Array, groups: int) -> tuple[Array, int]:
    """Return weights and a number of groups with which no plane has channels of several groups.

    As many groups as a plane needs become one, in which the weights between the former ones are 0.
    """
    together = PACKED // math.gcd(PACKED, values.shape[1])
    if groups == 1 or together == 1:
        return values, groups
    if groups % together:
        together = groups
    return _merged(values, groups, together), groups // together


def _merged(values: Array, groups: int, together: int) -> Array:
    """Return weights (out, in * together, ...) for groups / together groups."""
    rows, width = len(values) // groups, values.shape[1]
    if values.size * together > memory.limit():
        raise ValueError(f"the {groups} groups of a convolution take too much memory in int8")
    merged = np.zeros((len(values), width * together, *values.shape[2:]), np.int8)
    for group in range(groups):
        own, first = slice(group * rows, (group + 1) * rows), group % together * width
        merged[own, first : first + width] = values[own]
    return merged


def _packed(values: Array) -> Array:
    """Return int8 weights (out, in, ...) as float32 (out, planes, ...), 4 bytes each."""
    planes = -(-values.shape[1] // PACKED)
    padded = np.zeros((len(values), planes * PACKED, *values.shape[2:]), np.int8)
    padded[:, : values.shape[1]] = values
    by_plane = padded.reshape(len(values), planes, PACKED, *values.shape[2:])
    return np.ascontiguousarray(np.moveaxis(by_plane, 2, -1)).view(np.float32)[..., 0]
