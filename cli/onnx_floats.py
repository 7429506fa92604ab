"""The operations of a graph that compute in float32, as those of ONNX."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sparse.runtime.graph import Node, cosine_scale, position_bias, windows_of

Size = tuple[int, int]


@dataclass(frozen=True)
class Operation:
    """A node of the ONNX graph; it has one output."""

    op: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Any]


class FloatGraph:
    """The operations of an ONNX graph, by the name of their output, and its constants.

    Args:
        state: Parameters and statistics that operations read.
        sizes: Height and width of every value.
        vectors: Names of the values that are one vector per image.
    """

    def __init__(
        self, state: Mapping[str, Tensor], sizes: Mapping[str, Size], vectors: set[str]
    ) -> None:
        self.operations: dict[str, Operation] = {}
        self.constants: dict[str, npt.NDArray[Any]] = {}
        self._state, self._sizes, self._vectors = state, sizes, vectors
        self._node = Node(name="", op="", inputs=())
        self._num_steps = 0

    def add(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add an operation; return the name of its output."""
        self.operations[output] = Operation(op, tuple(inputs), attributes)
        return output

    def constant(self, name: str, value: Any) -> str:
        """Add a constant; return its name."""
        self.constants[name] = np.asarray(value)
        return name

    def add_node(self, node: Node, inputs: Sequence[str], output: str) -> None:
        """Add what a node computes of values, whose names are given, under the name `output`."""
        self._node, self._num_steps = node, 0
        found = _NODES[node.op](self, node, *inputs)
        self.operations[output] = self.operations.pop(found)

    def _step(self, op: str, *inputs: str, **attributes: Any) -> str:
        self._num_steps += 1
        return self.add(op, inputs, f"{self._node.name}:step{self._num_steps}", **attributes)

    def _given(self, value: Any) -> str:
        """Return the name of a constant of the node: float32, or int64 for whole numbers."""
        given = value.numpy() if isinstance(value, Tensor) else np.asarray(value)
        self._num_steps += 1
        kind = np.float32 if given.dtype.kind == "f" else np.int64
        return self.constant(f"{self._node.name}:given{self._num_steps}", given.astype(kind))

    def _entry(self, name: str) -> Tensor:
        return self._state[self._node.parameters + name]

    def _reshape(self, x: str, *shape: int) -> str:
        """Change the shape; 0 keeps a dimension, and one may be -1."""
        return self._step("Reshape", x, self._given(shape))

    def _function(self, node: Node, x: str) -> str:
        return self._step(_FUNCTIONS[node.op], x)

    def _relu6(self, node: Node, x: str) -> str:
        return self._step("Clip", x, self._given(0.0), self._given(6.0))

    def _silu(self, node: Node, x: str) -> str:
        return self._step("Mul", x, self._step("Sigmoid", x))

    def _hardsigmoid(self, node: Node, x: str) -> str:
        return self._step("HardSigmoid", x, alpha=1 / 6, beta=0.5)

    def _half(self, x: str, function: str) -> str:
        """Return x (1 + function) / 2."""
        more = self._step("Add", function, self._given(1.0))
        return self._step("Mul", self._step("Mul", x, more), self._given(0.5))

    def _gelu(self, node: Node, x: str) -> str:
        scaled = self._step("Div", x, self._given(math.sqrt(2)))
        return self._half(x, self._step("Erf", scaled))

    def _gelu_tanh(self, node: Node, x: str) -> str:
        cube = self._step("Mul", self._step("Mul", x, x), x)
        small = self._step("Mul", cube, self._given(0.044715))
        inner = self._step("Mul", self._step("Add", x, small), self._given(math.sqrt(2 / math.pi)))
        return self._half(x, self._step("Tanh", inner))

    def _sum(self, node: Node, x: str, y: str) -> str:
        return self._step("Add", x, y)

    def _mul(self, node: Node, x: str, y: str) -> str:
        both = [
            self._step("Unsqueeze", value, self._given([2, 3])) if name in self._vectors else value
            for name, value in zip(node.inputs, (x, y), strict=True)
        ]
        return self._step("Mul", *both)

    def _scale(self, node: Node, x: str) -> str:
        return self._step("Mul", x, self._given(self._entry("").reshape(-1, 1, 1)))

    def _batch_norm(self, node: Node, x: str) -> str:
        names = ("weight", "bias", "running_mean", "running_var")
        given = [self._given(self._entry(name)) for name in names]
        return self._step("BatchNormalization", x, *given, epsilon=node.eps)

    def _layer_norm(self, node: Node, x: str) -> str:
        names = (node.parameters + "weight", node.parameters + "bias")
        if names[0] not in self._state:
            return self._standardized(node, x)
        given = [self._given(self._state[name]) for name in names if name in self._state]
        if node.name in self._vectors:
            return self._step("LayerNormalization", x, *given, epsilon=node.eps)
        last = self._step("Transpose", x, perm=(0, 2, 3, 1))
        found = self._step("LayerNormalization", last, *given, epsilon=node.eps)
        return self._step("Transpose", found, perm=(0, 3, 1, 2))

    def _standardized(self, node: Node, x: str) -> str:
        """Return a LayerNorm without parameters."""
        centered = self._step("Sub", x, self._step("ReduceMean", x, axes=[1]))
        squares = self._step("ReduceMean", self._step("Mul", centered, centered), axes=[1])
        deviation = self._step("Sqrt", self._step("Add", squares, self._given(node.eps)))
        return self._step("Div", centered, deviation)

    def _max_pool(self, node: Node, x: str) -> str:
        return self._step("MaxPool", x, **window(node), ceil_mode=int(node.ceil_mode))

    def _avg_pool(self, node: Node, x: str) -> str:
        return self._step("AveragePool", x, **window(node), count_include_pad=1)

    def _adaptive_avg_pool(self, node: Node, x: str) -> str:
        size = self._sizes[node.inputs[0]]
        kernel = [s // out for s, out in zip(size, node.output, strict=True)]
        return self._step("AveragePool", x, kernel_shape=kernel, strides=kernel)

    def _mean_pool(self, node: Node, x: str) -> str:
        return self._step("Flatten", self._step("GlobalAveragePool", x))

    def _token(self, node: Node, x: str) -> str:
        return self._step("Gather", self._reshape(x, 0, 0, -1), self._given(node.index), axis=2)

    def _prepend(self, node: Node, x: str) -> str:
        first = self._entry("").reshape(1, node.tokens, -1).mT
        count = self._step("Shape", x, start=0, end=1)
        shape = self._step("Concat", count, self._given([1, 1]), axis=0)
        tokens = self._step("Expand", self._given(first), shape)
        joined = self._step("Concat", tokens, self._reshape(x, 0, 0, -1), axis=2)
        return self._step("Unsqueeze", joined, self._given([2]))

    def _embedding(self, node: Node, x: str) -> str:
        height, width = self._sizes[node.name]
        added = self._entry("").reshape(height * width, -1).T.reshape(-1, height, width)
        return self._step("Add", x, self._given(added))

    def _concat(self, node: Node, *parts: str) -> str:
        return self._step("Concat", *parts, axis=1)

    def _grouped(self, node: Node, x: str) -> str:
        return self._reshape(x, 0, node.groups, -1, *self._sizes[node.name])

    def _chunk(self, node: Node, x: str) -> str:
        return self._step("Gather", self._grouped(node, x), self._given(node.index), axis=1)

    def _shuffle(self, node: Node, x: str) -> str:
        mixed = self._step("Transpose", self._grouped(node, x), perm=(0, 2, 1, 3, 4))
        return self._reshape(mixed, 0, -1, *self._sizes[node.name])

    def _slice(self, node: Node, x: str) -> str:
        size, start, step = self._sizes[node.inputs[0]], node.start, node.stride
        end = [start[i] + step[i] * (node.output[i] - 1) + 1 for i in (0, 1)]
        beyond = [max(0, end[i] - size[i]) for i in (0, 1)]
        padded = self._step("Pad", x, self._given([0] * 6 + beyond))
        ranges = [self._given(list(numbers)) for numbers in (start, end, [2, 3], step)]
        return self._step("Slice", padded, *ranges)

    def _attention(self, node: Node, x: str) -> str:
        windows = windows_of(node, self._sizes[node.name])
        (height, width), tokens = windows.size, windows.tokens
        row, column = windows.pixels()
        pixels = (row * width + column).ravel()
        ordered = self._step("Gather", self._reshape(x, 0, 0, -1), self._given(pixels), axis=2)
        parts = self._reshape(ordered, 0, 3, node.heads, -1, len(pixels))
        # (images, heads, depth, windows, tokens) -> (images, windows, heads, ...)
        by_window = (0, 3, 1, 4, 2), (0, 3, 1, 2, 4), (0, 3, 1, 4, 2)
        query, key, value = (
            self._step("Transpose", self._reshape(part, 0, 0, 0, len(windows), tokens), perm=order)
            for part, order in zip(self._parts(parts), by_window, strict=True)
        )
        factor: Any = node.score_scale
        if node.cosine:
            query, key = self._normalized(query, 4), self._normalized(key, 3)
            factor = cosine_scale(node, self._state)[:, None, None]
        scores = self._step("Mul", self._step("MatMul", query, key), self._given(factor))
        added = position_bias(node, self._state)
        masks = windows.masks()[:, None]
        for more in (added, masks if windows.shift != (0, 0) else None):
            scores = scores if more is None else self._step("Add", scores, self._given(more))
        mixed = self._step("MatMul", self._step("Softmax", scores, axis=-1), value)
        mixed = self._step("Transpose", mixed, perm=(0, 2, 4, 1, 3))
        flat = self._reshape(mixed, 0, -1, len(pixels))
        back = self._step("Gather", flat, self._given(np.argsort(pixels)), axis=2)
        return self._reshape(back, 0, 0, height, width)

    def _parts(self, x: str) -> list[str]:
        return [self._step("Gather", x, self._given(i), axis=1) for i in range(3)]

    def _normalized(self, x: str, axis: int) -> str:
        length = self._step("ReduceL2", x, axes=[axis], keepdims=1)
        return self._step("Div", x, self._step("Max", length, self._given(1e-12)))


def window(node: Node) -> dict[str, Any]:
    """Return the attributes of a window in ONNX."""
    return {"kernel_shape": node.kernel, "strides": node.stride, "pads": node.padding * 2}


_FUNCTIONS = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "hardswish": "HardSwish"}

_NODES: Mapping[str, Callable[..., str]] = {
    **dict.fromkeys(_FUNCTIONS, FloatGraph._function),
    "relu6": FloatGraph._relu6,
    "silu": FloatGraph._silu,
    "hardsigmoid": FloatGraph._hardsigmoid,
    "gelu": FloatGraph._gelu,
    "gelu_tanh": FloatGraph._gelu_tanh,
    "add": FloatGraph._sum,
    "mul": FloatGraph._mul,
    "scale": FloatGraph._scale,
    "batch_norm": FloatGraph._batch_norm,
    "layer_norm": FloatGraph._layer_norm,
    "max_pool": FloatGraph._max_pool,
    "avg_pool": FloatGraph._avg_pool,
    "adaptive_avg_pool": FloatGraph._adaptive_avg_pool,
    "mean_pool": FloatGraph._mean_pool,
    "token": FloatGraph._token,
    "prepend": FloatGraph._prepend,
    "embedding": FloatGraph._embedding,
    "concat": FloatGraph._concat,
    "chunk": FloatGraph._chunk,
    "shuffle": FloatGraph._shuffle,
    "slice": FloatGraph._slice,
    "attention": FloatGraph._attention,
}
