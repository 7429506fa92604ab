"""A quantized network as an ONNX graph in QDQ form.

Every unit of int8 ends with a QuantizeLinear and begins with a DequantizeLinear of each value that
it reads. Weights are int8 with a scale per output channel, biases int32. ONNX Runtime fuses a unit
to one operation, whose integers are those of `sparse.runtime.integers`. Other units compute in
float32, as does a unit of int8 whose value is float32.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from cli.onnx_floats import FloatGraph, window
from sparse.runtime.check import made_size
from sparse.runtime.graph import INPUT, Node, vectors
from sparse.runtime.integers import IntegerNetwork, top
from sparse.runtime.units import Unit

OPSET, IR_VERSION = 17, 8
IMAGES, LOGITS = "images", "logits"


def to_onnx(network: IntegerNetwork, *, in_channels: int, image_size: int = 224) -> Any:
    """Return an onnx.ModelProto, for batches of any size.

    Its input is `images` and its output `logits`, float32. What int8 reads of the value `name` is
    the uint8 tensor `name:uint8`, that of the images `input:uint8`.

    Args:
        network: The network.
        in_channels: Channels of the images.
        image_size: Side of the images. Where all units are int8, they may have any other size that
            the network takes.

    Raises:
        ImportError: The package onnx is not installed.
    """
    import onnx

    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    writer = Writer(network, image_size)
    given = network.parameters.get(network.units[-1].name)
    num_logits = "K" if given is None else len(given.bias)
    sizes: list[str | int | None] = ["N", num_logits, "rows", "columns"]
    graph = helper.make_graph(
        [
            helper.make_node(known.op, known.inputs, [output], output, **known.attributes)
            for output, known in writer.operations.items()
        ],
        "quantized",
        [helper.make_tensor_value_info(IMAGES, float32, ["N", in_channels, "H", "W"])],
        [helper.make_tensor_value_info(LOGITS, float32, sizes[: 2 if writer.ends_flat else 4])],
        [onnx.numpy_helper.from_array(value, name) for name, value in writer.constants.items()],
    )
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model


class Writer(FloatGraph):
    """The graph of a quantized network."""

    def __init__(self, network: IntegerNetwork, image_size: int) -> None:
        flat = _vectors(network)
        super().__init__(network.state, _sizes(network, image_size), flat)
        self._network, self._flat = network, flat
        self._floats = {INPUT: IMAGES}  # name of a value -> its float32 tensor
        for unit in network.units:
            output = LOGITS if unit is network.units[-1] else f"{unit.name}:value"
            if not unit.is_int8:
                read = [self._floats[name] for name in unit.node.inputs]
                self.add_node(unit.node, read, output)
                self._floats[unit.name] = output
            elif unit.gives_bytes:
                self._bytes(unit)
            else:
                self._float_sum(unit, output)
                self._floats[unit.name] = output
        self.ends_flat = network.units[-1].name in flat

    def _bytes(self, unit: Unit) -> None:
        found = _UNITS[unit.node.op](self, unit, f"{unit.name}:sum")
        if unit.activation == "relu" and unit.node.op != "relu":
            found = self.add("Relu", [found], f"{unit.name}:relu")
        self._quantize(found, unit.name, top(unit, self._network.activations[unit.name]))

    def _float_sum(self, unit: Unit, output: str) -> None:
        if unit.activation is None:
            self.weighted(unit, output)
            return
        found = self.weighted(unit, f"{unit.name}:sum")
        self.add_node(Node(name=unit.name, op=unit.activation, inputs=()), [found], output)

    def _quantization(self, name: str) -> list[str]:
        """Return the names of the constants with scale and zero point of a value."""
        scale, zero_point = self._network.activations[name]
        return [
            self.constant(f"{name}:scale", np.float32(scale)),
            self.constant(f"{name}:zero_point", np.uint8(zero_point)),
        ]

    def _quantize(self, source: str, name: str, highest: int = 255) -> None:
        """Add the uint8 value of a float one.

        A ReLU6 is the saturation at 255, or else a clip of integers: ONNX Runtime does not fuse a
        clip of floats.
        """
        output = f"{name}:uint8"
        if highest == 255:
            self.add("QuantizeLinear", [source, *self._quantization(name)], output)
            return
        steps = self.add("QuantizeLinear", [source, *self._quantization(name)], f"{name}:unclipped")
        limits = {"lowest": 0, "highest": highest}
        given = [self.constant(f"{name}:{end}", np.uint8(n)) for end, n in limits.items()]
        self.add("Clip", [steps, *given], output)

    def _require(self, name: str) -> None:
        """Quantize a value if it is float32 and has not been quantized."""
        if f"{name}:uint8" not in self.operations:
            self._quantize(self._floats[name], name)

    def _read(self, name: str) -> str:
        """Return the name of a value as float32."""
        self._require(name)
        output = f"{name}:float"
        return self.add("DequantizeLinear", [f"{name}:uint8", *self._quantization(name)], output)

    def _read_flat(self, name: str) -> str:
        """Return the name of a value as float32 (N, numbers)."""
        self._require(name)
        flat = self.add("Flatten", [f"{name}:uint8"], f"{name}:flat")
        return self.add("DequantizeLinear", [flat, *self._quantization(name)], f"{name}:flat_float")

    def _parameter(self, name: str, value: Tensor, scale: npt.NDArray[np.float32]) -> str:
        """Return the name of integers, one scale for each of the first dimension, as float32."""
        steps = value.numpy()
        given = [
            self.constant(f"{name}:steps", steps),
            self.constant(f"{name}:scale", scale),
            self.constant(f"{name}:zero_point", np.zeros(len(steps), steps.dtype)),
        ]
        return self.add("DequantizeLinear", given, name, axis=0)

    def _parameters(self, unit: Unit) -> list[str]:
        """Return the names of weight and bias of a unit."""
        given = self._network.parameters[unit.name]
        weight = given.weight.flatten(1) if self._is_flat(unit) else given.weight
        if unit.node.op == "pixel_linear":
            weight = weight[:, :, None, None]
        return [
            self._parameter(f"{unit.name}:weight", weight, given.scale.numpy()),
            self._parameter(f"{unit.name}:bias", given.bias, given.bias_scale.numpy()),
        ]

    def _is_flat(self, unit: Unit) -> bool:
        """Tell whether a unit with weights reads one vector per image."""
        return unit.node.op == "linear" or unit.node.inputs[0] in self._flat

    def weighted(self, unit: Unit, output: str) -> str:
        (source,) = unit.node.inputs
        if self._is_flat(unit):
            inputs = [self._read_flat(source), *self._parameters(unit)]
            return self.add("Gemm", inputs, output, transB=1)
        inputs = [self._read(source), *self._parameters(unit)]
        more = {"dilations": unit.node.dilation, "group": unit.node.groups}
        return self.add("Conv", inputs, output, **window(unit.node), **more)

    def sum(self, unit: Unit, output: str) -> str:
        return self.add("Add", [self._read(name) for name in unit.node.inputs], output)

    def max_pool(self, unit: Unit, output: str) -> str:
        source, ceil = self._read(unit.node.inputs[0]), int(unit.node.ceil_mode)
        return self.add("MaxPool", [source], output, **window(unit.node), ceil_mode=ceil)

    def mean_pool(self, unit: Unit, output: str) -> str:
        return self.add("GlobalAveragePool", [self._read(unit.node.inputs[0])], output)

    def relu(self, unit: Unit, output: str) -> str:
        return self.add("Relu", [self._read(unit.node.inputs[0])], output)

    def relu6(self, unit: Unit, output: str) -> str:
        limits = {"lowest": 0, "highest": 6}
        given = [self.constant(f"relu6:{end}", np.float32(n)) for end, n in limits.items()]
        return self.add("Clip", [self._read(unit.node.inputs[0]), *given], output)


def _vectors(network: IntegerNetwork) -> set[str]:
    """Return the names of the values that are one vector per image."""
    return vectors([replace(unit.node, name=unit.name) for unit in network.units])


def _sizes(network: IntegerNetwork, image_size: int) -> dict[str, tuple[int, int]]:
    """Return height and width of every value; those of a vector are 1."""
    sizes = {INPUT: (image_size, image_size)}
    for unit in network.units:
        sizes[unit.name] = made_size(unit.node, max(sizes[name] for name in unit.node.inputs))
    return sizes


_UNITS: Mapping[str, Callable[[Writer, Unit, str], str]] = {
    "conv": Writer.weighted,
    "linear": Writer.weighted,
    "pixel_linear": Writer.weighted,
    "add": Writer.sum,
    "max_pool": Writer.max_pool,
    "mean_pool": Writer.mean_pool,
    "relu": Writer.relu,
    "relu6": Writer.relu6,
}
