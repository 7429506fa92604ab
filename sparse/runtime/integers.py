"""The int8 network in exact integers: the definition that all kernels must equal.

What is quantized is described in docs/runtime.md. Integers are those that ONNX Runtime computes for
the same network. Sums are exact, because float64 holds all of them exactly; everything else is in
float32, in the order that is written here. Units that compute in float32 do so in any order: where
a byte depends on one, it may differ by one step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import graph
from .graph import INPUT, Node
from .units import MAX_SCALE, Quantization, Unit

MAX_WEIGHT = 127
MAX_BIAS = 2**30
MAX_SUM = 2**31 - 1
EXACT = 2**24
"""float32 holds all integers up to here."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The numbers of a convolution or a linear layer."""

    weight: Tensor
    """int8, in the shape of the state dict: -127 to 127, and 0 where the mask is inactive."""
    scale: Tensor
    """float32 (out,): of the weight."""
    bias: Tensor
    """int32 (out,), in steps of `bias_scale`."""
    bias_scale: Tensor
    """float32 (out,): the input's scale times the weight's."""
    multiplier: Tensor
    """float32 (out,): a sum, as float32, times this is the value in units of its scale.

    For a value that is float32, whose scale is 1, it gives the value itself.
    """


@dataclass(frozen=True, kw_only=True)
class IntegerNetwork:
    """A quantized network."""

    units: Sequence[Unit]
    activations: Mapping[str, Quantization]
    """Of every value that a unit of int8 reads."""
    parameters: Mapping[str, Parameters]
    """Of the units with weights, by the name of the unit."""
    state: Mapping[str, Tensor]
    """What units of float32 read (`float_entries`)."""


def read_parameters(
    found: Sequence[Unit],
    activations: Mapping[str, Quantization],
    masks: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> dict[str, Parameters]:
    """Return the numbers of the units with weights of a quantized file, by the name of the unit.

    Args:
        found: The units.
        activations: Scales and zero points that `check_activations` accepts.
        masks: Masks of the entries that are stored as mask and values.
        tensors: The tensors of the file.

    Raises:
        ValueError: A weight is no int8 with a scale in range, a bias is not finite, or sums may
            exceed 32 bits; names the weight.
    """
    return {
        unit.name: _parameters(unit, activations, masks, tensors)
        for unit in found
        if unit.is_weighted
    }


def float_entries(found: Sequence[Unit]) -> set[str]:
    """Return the names of the entries of the state dict that units of float32 may read."""
    return {name for unit in found if not unit.is_int8 for name in graph.entries(unit.node)}


def _parameters(
    unit: Unit,
    activations: Mapping[str, Quantization],
    masks: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> Parameters:
    name = unit.node.parameters + "weight"
    weight, scale = read_weight(name, masks, tensors)
    for node in (unit.node, unit.norm):
        if node is not None and node.parameters + "bias" in masks:
            raise ValueError(f"{node.parameters + 'bias'!r} has a mask: biases are stored whole")
    bias = bias_of(unit, tensors, len(weight))
    if not bool(torch.isfinite(bias).all()):
        raise ValueError(f"the bias of {name!r} is not finite")
    bias_scale = input_scale(unit, activations) * scale
    steps = (bias.double() / bias_scale.double()).round().clamp(-MAX_BIAS, MAX_BIAS)
    largest = 255 * weight.flatten(1).double().abs().sum(1) + steps.abs()
    if bool((largest > MAX_SUM).any()):
        raise ValueError(f"sums of {name!r} may be larger than 32 bits hold")
    own_scale = _float32(activations[unit.name][0] if unit.gives_bytes else 1.0)
    return Parameters(
        weight=weight,
        scale=scale,
        bias=steps.to(torch.int32),
        bias_scale=bias_scale,
        multiplier=bias_scale / own_scale,
    )


def weight_scales(
    found: Sequence[Unit],
    state: Mapping[str, Tensor],
    activations: Mapping[str, Quantization],
) -> dict[str, Tensor]:
    """Return the scales, float32 (out,), that the weights of a network are to be stored with.

    The largest weight of a channel is 127 steps, unless the channel's bias would then be more than
    2^29 steps. A channel without weights has a scale that suits its bias.

    Args:
        found: The units.
        state: Dense state dict, BatchNorm folded.
        activations: Of all values.
    """
    scales: dict[str, Tensor] = {}
    for unit in found:
        if not unit.is_weighted:
            continue
        name = unit.node.parameters + "weight"
        largest = state[name].flatten(1).abs().amax(1).float()
        bias = bias_of(unit, state, len(largest)).abs() / input_scale(unit, activations)
        scale = torch.maximum(largest / MAX_WEIGHT, bias / (MAX_BIAS / 2))
        scale = torch.where(largest > 0, scale, bias / EXACT)
        scale = torch.where((largest > 0) | (bias > 0), scale.clamp(min=1 / MAX_SCALE), 1.0)
        scales[name] = torch.maximum(scale, scales.get(name, scale))
    return scales


def read_weight(
    name: str, masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the int8 weight of an entry with its zeros, and its scale, float32 (out,).

    Raises:
        ValueError: The entry is none, or out of range.
    """
    stored = name + ".values" if name in masks else name
    values = tensors[stored]
    if values.dtype != torch.int8:
        raise ValueError(f"{stored!r} is {values.dtype}, in a quantized network it is torch.int8")
    if bool((values < -MAX_WEIGHT).any()):
        raise ValueError(f"{stored!r} has the value -128: values are -127 to 127")
    scale = tensors[name + ".scale"]
    if not bool(((scale >= 1 / MAX_SCALE) & (scale <= MAX_SCALE)).all()):
        raise ValueError(
            f"{name + '.scale'!r} has a scale that is not {1 / MAX_SCALE:g} to {MAX_SCALE:g}"
        )
    if name not in masks:
        return values, scale
    weight = torch.zeros(masks[name].shape, dtype=torch.int8, device="cpu")
    weight[masks[name]] = values
    return weight, scale


def bias_of(unit: Unit, tensors: Mapping[str, Tensor], channels: int) -> Tensor:
    """Return the bias of a unit, float32 (out,): its own plus that of its folded BatchNorm."""
    total = torch.zeros(channels, dtype=torch.float64, device="cpu")
    for node in (unit.node, unit.norm):
        name = "" if node is None else node.parameters + "bias"
        if name in tensors:
            if not tensors[name].is_floating_point():
                raise ValueError(f"{name!r} is {tensors[name].dtype}: biases are torch.float32")
            total = total + tensors[name].double()
    return (total if unit.node.key_bias else graph.without_key_bias(total)).float()


def input_scale(unit: Unit, activations: Mapping[str, Quantization]) -> Tensor:
    """Return the scale of the value that a unit reads first, as float32."""
    return _float32(activations[unit.node.inputs[0]][0])


def run(
    network: IntegerNetwork, images: Tensor, *, values: dict[str, Tensor] | None = None
) -> Tensor:
    """Return the logits (N, K) of images (N, C, H, W), float32.

    Args:
        network: A quantized network.
        images: float32, normalized.
        values: Receives the uint8 value of everything that a unit of int8 reads, by its name.
    """
    known = {INPUT: images}  # uint8 or float32
    uses = {name: i for i, unit in enumerate(network.units) for name in unit.node.inputs}
    for i, unit in enumerate(network.units):
        inputs = [known[name] for name in unit.node.inputs]
        if unit.is_int8:
            for j, name in enumerate(unit.node.inputs):
                if inputs[j].dtype != torch.uint8:
                    inputs[j] = quantized(inputs[j], network.activations[name])
                if values is not None:
                    values[name] = inputs[j]
        known[unit.name] = _value(network, unit, inputs)
        for name in set(unit.node.inputs):
            if uses[name] == i:
                del known[name]
    return known[network.units[-1].name]


def quantized(x: Tensor, quantization: Quantization) -> Tensor:
    """Return float32 values as uint8: round half to even, and saturate."""
    scale, zero_point = quantization
    steps = (x / _float32(scale)).round() + zero_point
    return steps.clamp(0, 255).to(torch.uint8)


def _value(network: IntegerNetwork, unit: Unit, inputs: Sequence[Tensor]) -> Tensor:
    if not unit.is_int8:
        return graph.value(unit.node, network.state, *inputs)
    if not unit.gives_bytes:
        found = _scaled(network, unit, inputs[0])
        return found if unit.activation is None else clamped(unit.activation, found)
    read = [network.activations[name] for name in unit.node.inputs]
    own = network.activations[unit.name]
    if unit.node.op == "max_pool":
        return _max_pool(unit.node, inputs[0])
    if unit.node.op == "mean_pool":
        return _mean_pool(inputs[0], read[0], own)
    if unit.node.op == "add":
        found = _add(inputs[0], inputs[1], read[0], read[1], own)
        return found.clamp(0, top(unit, own)).to(torch.uint8)
    if not unit.is_weighted:
        return looked_up(unit, read[0], own)[inputs[0].long()]
    return _saturated(_scaled(network, unit, inputs[0]), own[1], top(unit, own))


def looked_up(unit: Unit, read: Quantization, own: Quantization) -> Tensor:
    """Return the uint8 (256,) that a lone activation makes of every uint8."""
    x = (torch.arange(256, device="cpu").float() - read[1]) * _float32(read[0])
    return quantized(clamped(unit.activation or "", x), own)


def clamped(activation: str, x: Tensor) -> Tensor:
    """Return the ReLU or ReLU6 of float32 values."""
    return x.clamp(0, 6 if activation == "relu6" else torch.inf)


def top(unit: Unit, own: Quantization) -> int:
    """Return the largest uint8 of a unit's value."""
    if unit.activation != "relu6":
        return 255
    return min(255, int((_float32(6.0) / _float32(own[0])).round()) + own[1])


def _saturated(steps: Tensor, zero_point: int, highest: int = 255) -> Tensor:
    found = steps.round().clamp(-zero_point, highest - zero_point) + zero_point
    return found.to(torch.uint8)


def _scaled(network: IntegerNetwork, unit: Unit, x: Tensor) -> Tensor:
    """Return the sums of a convolution or a linear layer, times its multiplier."""
    node, given = unit.node, network.parameters[unit.name]
    zero_point = network.activations[node.inputs[0]][1]
    x, weight, bias = x.double() - zero_point, given.weight.double(), given.bias.double()
    if node.op == "pixel_linear":
        weight = weight[:, :, None, None]
    if node.op == "linear" or x.dim() == 2:
        found = F.linear(x.flatten(1), weight.flatten(1), bias)
        return found.float() * given.multiplier
    found = F.conv2d(x, weight, bias, node.stride, node.padding, node.dilation, node.groups)
    return found.float() * given.multiplier[:, None, None]


def _max_pool(node: Node, x: Tensor) -> Tensor:
    window = (node.kernel, node.stride, node.padding)
    return F.max_pool2d(x.float(), *window, ceil_mode=node.ceil_mode).to(torch.uint8)


def _mean_pool(x: Tensor, read: Quantization, own: Quantization) -> Tensor:
    num_pixels = x.shape[2] * x.shape[3]
    sums = x.sum((2, 3), dtype=torch.int64) - read[1] * num_pixels
    multiplier = _float32(read[0]) / (_float32(own[0]) * _float32(num_pixels))
    return _saturated(sums.float() * multiplier, own[1])


def _add(
    a: Tensor, b: Tensor, read_a: Quantization, read_b: Quantization, own: Quantization
) -> Tensor:
    """Return the rounded sum, before it is saturated: two fused multiply-adds from a constant."""
    ratio_a, ratio_b, constant = add_scales(read_a, read_b, own)
    return fused_multiply_add(a, ratio_a, fused_multiply_add(b, ratio_b, constant)).round()


def add_scales(
    read_a: Quantization, read_b: Quantization, own: Quantization
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors of the operands of a sum and what is added to both, float32."""
    ratio_a, ratio_b = (_float32(scale) / _float32(own[0]) for scale, _ in (read_a, read_b))
    zero_a = torch.tensor(read_a[1], dtype=torch.uint8, device="cpu")
    return ratio_a, ratio_b, own[1] - fused_multiply_add(zero_a, ratio_a, ratio_b * read_b[1])


def fused_multiply_add(x: Tensor, factor: Tensor, added: Tensor) -> Tensor:
    """Return x * factor + added, float32, rounded once; x is uint8, the others float32.

    The product is exact in float64. If the sum is not, it is rounded to the odd neighbor, so that
    rounding to float32 gives what rounding once gives (Boldo and Melquiond, 2008).
    """
    product, added = x.double() * factor.double(), added.double()
    total = product + added
    back = total - product
    error = (product - (total - back)) + (added - back)
    is_even = total.contiguous().view(torch.int64) % 2 == 0
    neighbor = torch.nextafter(total, error.sign() * torch.inf)
    return torch.where((error != 0) & is_even, neighbor, total).float()


def _float32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")
