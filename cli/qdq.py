"""A quantized network as an ONNX graph in QDQ form.

Every unit ends with a QuantizeLinear and begins with a DequantizeLinear of each value that it
reads. Weights are int8 with a scale per output channel, biases int32. ONNX Runtime fuses a unit to
one operation, whose integers are those of `sparse.runtime.integers`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sparse.runtime.graph import INPUT, Node, vectors
from sparse.runtime.integers import IntegerNetwork, top
from sparse.runtime.units import Unit

OPSET, IR_VERSION = 17, 8
IMAGES, LOGITS = "images", "logits"


@dataclass(frozen=True)
class Operation:
    """A node of the ONNX graph; it has one output."""

    op: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Any]


def to_onnx(network: IntegerNetwork, *, in_channels: int) -> Any:
    """Return an onnx.ModelProto, for batches and images of any size that the network takes.

    Its input is `images` and its output `logits`, float32. The value of the unit `name` is the
    uint8 tensor `name:uint8`, that of the images `input:uint8`.

    Raises:
        ImportError: The package onnx is not installed.
        ValueError: Some of the network runs in float32.
    """
    import onnx

    for unit in network.units:
        if not unit.is_int8:
            raise ValueError(
                f"--to onnx of a quantized file needs a network that is int8 throughout, the "
                f"{unit.node.op} {unit.name!r} runs in float32: export the checkpoint to onnx"
            )

    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    writer = Writer(network)
    last = network.units[-1]
    sizes: list[str | int | None] = [
        "N",
        len(network.parameters[last.name].bias),
        "rows",
        "columns",
    ]
    graph = helper.make_graph(
        [
            helper.make_node(known.op, known.inputs, [output], output, **known.attributes)
            for output, known in writer.operations.items()
        ],
        "quantized",
        [helper.make_tensor_value_info(IMAGES, float32, ["N", in_channels, "H", "W"])],
        [helper.make_tensor_value_info(LOGITS, float32, sizes[: 2 if writer.is_flat(last) else 4])],
        [onnx.numpy_helper.from_array(value, name) for name, value in writer.constants.items()],
    )
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model


class Writer:
    """The operations of the graph, by the name of their output, and its constants."""

    def __init__(self, network: IntegerNetwork) -> None:
        self.operations: dict[str, Operation] = {}
        self.constants: dict[str, npt.NDArray[Any]] = {}
        self._network = network
        self._vectors = vectors([unit.node for unit in network.units])
        self._quantize(IMAGES, INPUT)
        for unit in network.units[:-1]:
            found = _UNITS[unit.node.op](self, unit, f"{unit.name}:sum")
            if unit.activation == "relu" and unit.node.op != "relu":
                found = self._add("Relu", [found], f"{unit.name}:relu")
            self._quantize(found, unit.name, top(unit, network.activations[unit.name]))
        last = network.units[-1]
        _UNITS[last.node.op](self, last, LOGITS)

    def _add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.operations[output] = Operation(op, tuple(inputs), attributes)
        return output

    def _constant(self, name: str, value: Any) -> str:
        self.constants[name] = np.asarray(value)
        return name

    def _scale(self, name: str) -> list[str]:
        """Return the names of the constants with scale and zero point of a value."""
        scale, zero_point = self._network.activations[name]
        return [
            self._constant(f"{name}:scale", np.float32(scale)),
            self._constant(f"{name}:zero_point", np.uint8(zero_point)),
        ]

    def _quantize(self, source: str, name: str, highest: int = 255) -> None:
        """Add the uint8 value of a float one.

        A ReLU6 is the saturation at 255, or else a clip of integers: ONNX Runtime does not fuse a
        clip of floats.
        """
        output = f"{name}:uint8"
        if highest == 255:
            self._add("QuantizeLinear", [source, *self._scale(name)], output)
            return
        steps = self._add("QuantizeLinear", [source, *self._scale(name)], f"{name}:unclipped")
        limits = {"lowest": 0, "highest": highest}
        given = [self._constant(f"{name}:{end}", np.uint8(n)) for end, n in limits.items()]
        self._add("Clip", [steps, *given], output)

    def _read(self, name: str) -> str:
        """Return the name of a value as float32."""
        output = f"{name}:float"
        return self._add("DequantizeLinear", [f"{name}:uint8", *self._scale(name)], output)

    def _read_flat(self, name: str) -> str:
        """Return the name of a value as float32 (N, numbers)."""
        flat = self._add("Flatten", [f"{name}:uint8"], f"{name}:flat")
        return self._add("DequantizeLinear", [flat, *self._scale(name)], f"{name}:flat_float")

    def _parameter(self, name: str, value: Tensor, scale: npt.NDArray[np.float32]) -> str:
        """Return the name of integers, one scale for each of the first dimension, as float32."""
        steps = value.numpy()
        given = [
            self._constant(f"{name}:steps", steps),
            self._constant(f"{name}:scale", scale),
            self._constant(f"{name}:zero_point", np.zeros(len(steps), steps.dtype)),
        ]
        return self._add("DequantizeLinear", given, name, axis=0)

    def _parameters(self, unit: Unit) -> list[str]:
        """Return the names of weight and bias of a unit."""
        given = self._network.parameters[unit.name]
        weight = given.weight.flatten(1) if self.is_flat(unit) else given.weight
        return [
            self._parameter(f"{unit.name}:weight", weight, given.scale.numpy()),
            self._parameter(f"{unit.name}:bias", given.bias, given.bias_scale.numpy()),
        ]

    def is_flat(self, unit: Unit) -> bool:
        """Tell whether a unit with weights reads one vector per image."""
        return unit.node.op == "linear" or unit.node.inputs[0] in self._vectors

    def weighted(self, unit: Unit, output: str) -> str:
        (source,) = unit.node.inputs
        if self.is_flat(unit):
            inputs = [self._read_flat(source), *self._parameters(unit)]
            return self._add("Gemm", inputs, output, transB=1)
        inputs = [self._read(source), *self._parameters(unit)]
        more = {"dilations": unit.node.dilation, "group": unit.node.groups}
        return self._add("Conv", inputs, output, **_window(unit.node), **more)

    def sum(self, unit: Unit, output: str) -> str:
        return self._add("Add", [self._read(name) for name in unit.node.inputs], output)

    def max_pool(self, unit: Unit, output: str) -> str:
        source, ceil = self._read(unit.node.inputs[0]), int(unit.node.ceil_mode)
        return self._add("MaxPool", [source], output, **_window(unit.node), ceil_mode=ceil)

    def mean_pool(self, unit: Unit, output: str) -> str:
        return self._add("GlobalAveragePool", [self._read(unit.node.inputs[0])], output)

    def relu(self, unit: Unit, output: str) -> str:
        return self._add("Relu", [self._read(unit.node.inputs[0])], output)

    def relu6(self, unit: Unit, output: str) -> str:
        limits = {"lowest": 0, "highest": 6}
        given = [self._constant(f"relu6:{end}", np.float32(n)) for end, n in limits.items()]
        return self._add("Clip", [self._read(unit.node.inputs[0]), *given], output)


def _window(node: Node) -> dict[str, Any]:
    return {"kernel_shape": node.kernel, "strides": node.stride, "pads": node.padding * 2}


_UNITS: Mapping[str, Callable[[Writer, Unit, str], str]] = {
    "conv": Writer.weighted,
    "linear": Writer.weighted,
    "add": Writer.sum,
    "max_pool": Writer.max_pool,
    "mean_pool": Writer.mean_pool,
    "relu": Writer.relu,
    "relu6": Writer.relu6,
}
