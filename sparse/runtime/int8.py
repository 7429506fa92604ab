"""Turn the units of a quantized network into layers: in int8, and in float32 (units.py).

Four neighboring channels lie where one channel lies in float32. Such a plane is what the plan of an
int8 network calls a channel, and four int8 weights are what it calls a weight. A weight is thus
active if one of the four is not zero.

Quantizing commutes with joining channels and with pooling the largest values. What a network
defines as float32 is therefore computed in bytes where only int8 reads it in the end, with the same
result (`kept_values`).
"""

import math
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import memory
from .arrays import Array
from .graph import INPUT
from .integers import IntegerNetwork, Parameters, add_scales, looked_up, top
from .lower import PACKED, Integers, Layer, Lowering
from .units import CLAMPS, Quantization, Unit

SIGNED = 128  # what kernels that multiply signed bytes subtract from activations


def integer_layers(network: IntegerNetwork, *, in_channels: int) -> list[Layer]:
    """Return the layers of a quantized network.

    A value that is read as bytes is quantized once: the images by the first layer, or else a
    float32 value by a layer before the first one that reads it so. A sum becomes part of the
    convolution that computes its later operand, if only the sum reads it. Units that compute in
    float32 become layers as those of a float32 network do.

    Args:
        network: The quantized network.
        in_channels: Channels of the images.

    Raises:
        ValueError: The groups of a convolution take too much memory.
    """
    with np.errstate(all="ignore"):
        conversion = _Conversion(network, in_channels)
        for unit in network.units:
            if unit.is_int8 or unit.name in conversion.kept:
                conversion.add_int8(unit)
            else:
                conversion.add(unit.node)
        return conversion.layers


class _Conversion(Lowering):
    def __init__(self, network: IntegerNetwork, in_channels: int) -> None:
        super().__init__([unit.node for unit in network.units], dict(network.state), in_channels)
        self._network = network
        self._units = {unit.name: unit for unit in network.units}
        self.kept = kept_values(network, in_channels)
        # name of a value, its scale and zero point -> name of the layer that gives these bytes
        self._bytes: dict[tuple[str, Quantization], str] = {}
        if all(unit.is_int8 for unit in network.units if INPUT in unit.node.inputs):
            self._quantize(INPUT, INPUT, network.activations[INPUT])

    def add_int8(self, unit: Unit) -> None:
        """Add a unit that computes in int8, or whose value is kept in bytes."""
        kind = "lookup" if unit.node.op in CLAMPS else unit.node.op
        getattr(self, "_int8_" + kind)(unit)

    def _quantize(self, name: str, layer_name: str, wanted: Quantization) -> None:
        """Append the layer that quantizes a float32 value."""
        scale, zero_point = wanted
        value = self._values[name]
        integers = Integers(
            channels=self._channels[value],
            zero_point=zero_point,
            scales=np.array([scale], np.float32),
            rescale=_rescale(zero=zero_point),
        )
        planes = -(-integers.channels // PACKED)
        layer = Layer(
            name=layer_name, kind="quantize", source=value, channels=planes, integers=integers
        )
        self._append(name, layer)
        self._values[name] = value  # still float32 for those that read it so
        self._bytes[name, wanted] = layer_name

    def _read(self, unit: Unit, name: str) -> str:
        """Return the name of the layer that gives a value in the bytes that a unit reads."""
        wanted = self._network.activations[name] if unit.is_int8 else self.kept[unit.name]
        if (name, wanted) not in self._bytes:
            layer_name = f"{name} (bytes)"
            while layer_name in self._units or layer_name in self._index:
                layer_name += "'"
            self._quantize(name, layer_name, wanted)
        return self._bytes[name, wanted]

    def _append_int8(self, unit: Unit, kind: str, integers: Integers, **values: Any) -> Layer:
        node, channels, own = unit.node, integers.channels, self._own(unit)
        layer = Layer(
            name=unit.name,
            kind=kind,
            source=self._read(unit, node.inputs[0]),
            channels=channels if own is None else -(-channels // PACKED),
            kernel=node.kernel,
            stride=node.stride,
            padding=node.padding,
            dilation=node.dilation,
            ceil_mode=node.ceil_mode,
            integers=integers,
            activation=unit.activation if own is None else None,
            **values,
        )
        self._append(unit.name, layer)
        if own is not None:
            self._bytes[unit.name, own] = layer.name
        return layer

    def _own(self, unit: Unit) -> Quantization | None:
        """Return scale and zero point of a unit's value in bytes; None if it is float32."""
        if unit.gives_bytes:
            return self._network.activations[unit.name]
        return self.kept.get(unit.name)

    def _zero_point(self, unit: Unit) -> int:
        own = self._own(unit)
        return 0 if own is None else own[1]

    def _num_channels(self, name: str) -> int:
        return self._channels[self._values[name]]

    def _is_vector(self, name: str) -> bool:
        return self._values[name] in self._vectors

    def _int8_max_pool(self, unit: Unit) -> None:
        channels, zero_point = self._num_channels(unit.node.inputs[0]), self._zero_point(unit)
        self._append_int8(unit, "max_pool", Integers(channels=channels, zero_point=zero_point))

    def _int8_concat(self, unit: Unit) -> None:
        parts = tuple(self._read(unit, name) for name in unit.node.inputs)
        channels = sum(self._channels[part] for part in parts)
        integers = Integers(channels=channels, zero_point=self._zero_point(unit))
        self._append_int8(unit, "concat", integers, parts=parts)

    def _int8_mean_pool(self, unit: Unit) -> None:
        source = unit.node.inputs[0]
        (scale, zero), (own_scale, own_zero) = (
            self._network.activations[name] for name in (source, unit.name)
        )
        integers = Integers(
            channels=self._num_channels(source),
            scales=np.array([scale, own_scale], np.float32),
            rescale=_rescale(zero=own_zero),
        )
        self._append_int8(unit, "mean_pool", integers, bias=_as_floats([zero]))

    def _int8_lookup(self, unit: Unit) -> None:
        source = unit.node.inputs[0]
        integers = Integers(channels=self._num_channels(source), zero_point=self._zero_point(unit))
        table = looked_up(unit, *(self._network.activations[n] for n in (source, unit.name)))
        self._append_int8(unit, "lookup", integers, weight=table.numpy().view(np.float32))

    def _int8_conv(self, unit: Unit) -> None:
        if self._is_vector(unit.node.inputs[0]):
            self._int8_linear(unit)
            return
        values, groups = _regrouped(self._given(unit).weight.numpy(), unit.node.groups)
        self._products(unit, "conv", _packed(values), groups=groups)

    def _int8_linear(self, unit: Unit) -> None:
        weight = self._given(unit).weight.flatten(1).numpy()
        if unit.node.op == "conv":
            weight = _merged(weight, unit.node.groups, unit.node.groups)
        channels = self._num_channels(unit.node.inputs[0])
        by_pixel = weight.reshape(len(weight), channels, -1)  # a vector has one pixel
        self._products(unit, "linear", _packed(by_pixel).reshape(len(weight), -1))

    def _int8_pixel_linear(self, unit: Unit) -> None:
        weight = self._given(unit).weight.numpy()
        self._products(unit, "conv", _packed(weight[:, :, None, None]))

    def _given(self, unit: Unit) -> Parameters:
        return self._network.parameters[unit.name]

    def _products(self, unit: Unit, kind: str, weight: Array, *, groups: int = 1) -> None:
        """Append a layer of sums of products, with packed weights (out, planes / groups, ...)."""
        given, own = self._given(unit), self._own(unit)
        rescale = None
        if own is not None:
            divisor = 1.0 if unit.gives_bytes else own[0]
            rescale = _rescale(zero=own[1], high=top(unit, own), divisor=divisor)
        integers = Integers(
            channels=len(weight),
            zero_point=self._zero_point(unit),
            scales=given.multiplier.numpy(),
            rescale=rescale,
        )
        zero_point = self._network.activations[unit.node.inputs[0]][1]
        bias = _bias(given.weight, given.bias, zero_point)
        self._append_int8(unit, kind, integers, weight=weight, bias=bias, groups=groups)

    def _int8_add(self, unit: Unit) -> None:
        first, second = unit.node.inputs
        early, late = sorted(unit.node.inputs, key=lambda name: self._index[self._values[name]])
        layer = self._open_sum(late)
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
        self._values[unit.name] = self._bytes[unit.name, value] = layer.name

    def _open_sum(self, name: str) -> Layer | None:
        """Return the convolution that computes a value if a sum may be folded into it."""
        layer = self.layers[self._index[self._values[name]]]
        if layer.kind != "conv" or layer.name != name or layer.residual is not None:
            return None
        is_open = self._uses[name] == 1 and self._units[name].activation is None
        return layer if is_open else None

    def _identity(self, unit: Unit, source: str) -> Layer:
        """Append a convolution that gives the bytes of its source."""
        channels = self._num_channels(source)
        weight = torch.ones(channels, 1, 1, 1, dtype=torch.int8, device="cpu")
        bias = torch.zeros(channels, dtype=torch.int32, device="cpu")
        values, groups = _regrouped(weight.numpy(), channels)
        integers = Integers(channels=channels, scales=np.ones(channels, np.float32))
        layer = self._append_int8(
            unit,
            "conv",
            integers,
            weight=_packed(values),
            bias=_bias(weight, bias, self._network.activations[source][1]),
            groups=groups,
        )
        layer.source = self._read(unit, source)
        return layer


def kept_values(network: IntegerNetwork, in_channels: int) -> dict[str, Quantization]:
    """Return the values of float32 that are kept in bytes, with their scale and zero point.

    Whatever reads such a value quantizes it alike, or joins or pools it and is kept so itself.
    """
    readers = defaultdict[str, list[Unit]](list)
    for unit in network.units:
        for name in unit.node.inputs:
            readers[name].append(unit)
    whole = _whole_planes(network, in_channels)
    kept: dict[str, Quantization] = {}
    for unit in reversed(network.units):
        wanted = {
            network.activations[unit.name] if reader.is_int8 else kept.get(reader.name)
            for reader in readers[unit.name]
        }
        found = wanted.pop() if len(wanted) == 1 else None
        if found is None or unit.gives_bytes:
            continue
        if unit.is_weighted:
            can_keep = unit.activation is None or found[1] == 0  # kernels cut off at byte 0
        elif unit.node.op == "concat":
            can_keep = whole.issuperset(unit.node.inputs)
        else:
            can_keep = unit.node.op == "max_pool"
        if can_keep:
            kept[unit.name] = found
    return kept


def _whole_planes(network: IntegerNetwork, in_channels: int) -> set[str]:
    """Return values whose channels fill planes of 4; what two operations give is left out."""
    whole = {INPUT} if in_channels % PACKED == 0 else set[str]()
    for unit in network.units:
        if unit.is_weighted:
            is_whole = len(network.parameters[unit.name].weight) % PACKED == 0
        else:
            inputs = unit.node.inputs
            is_whole = unit.node.op not in ("attention", "chunk") and whole.issuperset(inputs)
        if is_whole:
            whole.add(unit.name)
    return whole


def _rescale(
    *,
    zero: int,
    high: int = 255,
    divisor: float = 1,
    own_last: bool = False,
    own_scale: float = 0,
    res_scale: float = 0,
    shift: float = 0,
    sum_high: int = 255,
) -> Array:
    """Return the members of Rescale in op.h."""
    numbers = (zero, high - zero, divisor, own_last, own_scale, res_scale, shift, sum_high)
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
