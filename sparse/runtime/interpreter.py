"""Turn a program of torch.export into a graph: which view every operation of it reads and gives."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from .graph import INPUT, Node, needed
from .views import (
    BATCH,
    CHANNELS,
    PIXELS,
    REPEATED,
    WEIGHT,
    Dim,
    Part,
    View,
    axis_of,
    merged,
    places,
)

BATCH_SIZE = 2

_Size = tuple[int, int]

LAYOUTS = {
    "map": (0, 1, 2, 3),
    "channels_last": (0, 3, 1, 2),
    "tokens": (0, 2, 1),
    "tokens_first": (1, 2, 0),
    "vector": (0, 1),
}
"""How tensors of torch show a whole value: which dimensions are the batch, the channels, and the
pixels."""

_NO_MAP = "it reads no map (N, C, H, W)"


class UnknownOperationError(ValueError):
    """The runtime does not know an operation. The message is one line that names it.

    Of torch.export it names the module, too.
    """


class ExportError(ValueError):
    """A model cannot be traced, or is not a classifier. The message is one line."""


SEVERAL_OUTPUTS = (
    "a model with more than one output, or with one in a tuple or dict, cannot be exported: wrap "
    "it in a module that returns one tensor"
)


class Interpreter:
    """Turns the operations of an exported program into nodes of graph.py.

    Args:
        program: What a model computes for a batch of `BATCH_SIZE` images.
        operations: What each operation of torch becomes.
    """

    def __init__(self, program: ExportedProgram, operations: Mapping[Any, "Handler"]) -> None:
        self._graph, self._operations = program.graph, operations
        signature = program.graph_signature
        self._entries: Mapping[str, str] = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
        }
        self._constants: Mapping[str, Tensor] = {
            node: program.constants[name]
            for node, name in signature.inputs_to_lifted_tensor_constants.items()
        }
        self._images = signature.user_inputs
        self._begin()

    def _begin(self) -> None:
        """Forget what has been interpreted."""
        self._nodes: list[Node] = []
        self._values: dict[fx.Node, Any] = {}
        self._channels: dict[str, int] = {}
        self._sizes: dict[str, tuple[int, int] | None] = {}
        """Height and width of each value; None for a vector."""
        self._slices: dict[tuple[Any, ...], Node] = {}
        self.pending: dict[str, Any] = {}
        """What views stand for whose values no node of the graph computes."""

    def nodes(self) -> list[Node]:
        for node in self._graph.nodes:
            if node.op == "placeholder":
                self._values[node] = self._placeholder(node)
            elif node.op == "output":
                return self._computed(node)
            else:
                self._values[node] = self._call(node)
        raise AssertionError("a graph has an output")

    def reach(
        self, entry: fx.Node, layout: str, without: Collection[fx.Node]
    ) -> dict[fx.Node, View | list[View]]:
        """Follow a value as if it were the images: interpret what depends on it alone.

        Operations that the runtime does not know are passed over, with all that depends on them.

        Args:
            entry: The value.
            layout: One of `LAYOUTS`, which its dimensions have.
            without: Further operations to pass over.

        Returns:
            The values that depend on it, in the order of the program.
        """
        weights = self._weights_alone
        self._begin()
        self._values |= weights
        self._values[entry] = self._entry(entry, layout)
        found: dict[fx.Node, View | list[View]] = {}
        waiting, node = set(entry.users), entry
        while waiting:
            node = node.next
            if node not in waiting:
                continue
            waiting.remove(node)
            value = None if node in without else self._known(node)
            if value is not None:
                self._values[node] = found[node] = value
                waiting.update(node.users)
        return found

    @cached_property
    def _weights_alone(self) -> dict[fx.Node, Any]:
        """The values that do not depend on the images: weights, and views of them."""
        self._begin()
        for node in self._graph.nodes:
            is_fixed = node.op == "placeholder" and node.name not in self._images
            self._values[node] = self._placeholder(node) if is_fixed else self._known(node)
        return self._values

    def _known(self, node: fx.Node) -> Any:
        """Return the value of an operation; None if it is not known."""
        sources = [source for source in node.all_input_nodes if is_tensor(source)]
        if node.op != "call_function" or any(self._values.get(s) is None for s in sources):
            return None
        try:
            return self._call(node)
        except ValueError:
            return None

    def _entry(self, node: fx.Node, layout: str) -> View:
        shape = self.shape(node)
        _, channels, *pixels = (shape[axis] for axis in LAYOUTS[layout])
        size = (1, *pixels)[-2:] if pixels else None
        return replace(self._value(INPUT, channels, size), dims=self._laid_out(INPUT)[layout])

    def layout(self, node: fx.Node, view: View) -> str | None:
        """Return the layout in which a view shows a whole value; None if it does not.

        Args:
            node: Whose value it is.
            view: The view.
        """
        try:
            whole = self.whole(node, view)
        except ValueError:
            return None
        alike = (name for name, dims in self._laid_out(whole.name).items() if dims == whole.dims)
        return next(alike, None) if whole.shift == (0, 0) else None

    def _laid_out(self, name: str) -> dict[str, tuple[Dim, ...]]:
        """Return the dimensions of a whole value in every layout."""
        batch, channels, rows, columns = self._plain(name)
        pixels = merged([*rows, *columns])
        return {
            "map": (batch, channels, rows, columns),
            "channels_last": (batch, rows, columns, channels),
            "tokens": (batch, pixels, channels),
            "tokens_first": (pixels, batch, channels),
            "vector": (batch, channels),
        }

    def graph(self, name: str) -> list[Node]:
        """Return the nodes on which a value depends."""
        return needed(self._nodes, name)

    def _placeholder(self, node: fx.Node) -> View | Tensor | None:
        shape = tuple(node.meta["val"].shape) if "val" in node.meta else ()
        if node.name in self._entries:
            return self.weights(self._entries[node.name], shape)
        if node.name in self._constants:
            return self._constants[node.name]
        if node.name not in self._images or len(shape) != 4:
            return None  # a constant: whoever reads it is unknown
        return self._value(INPUT, shape[1], shape[2:])

    def weights(self, name: str, shape: Sequence[int], *steps: tuple[Any, ...]) -> View:
        """Return the numbers of an entry, or of what was computed from it, in their order."""
        dims = (axis_of(WEIGHT, math.prod(shape)),)
        return View(name, dims, is_weight=True, steps=steps).reshaped(shape)

    def _value(self, name: str, channels: int, size: Sequence[int] | None) -> View:
        """Return the plain view (N, C, H, W) or (N, C) of a new value."""
        self._channels[name] = channels
        self._sizes[name] = None if size is None else (size[0], size[1])
        return View(name, self._plain(name)[: 2 if size is None else 4])

    def _plain(self, name: str) -> tuple[Dim, ...]:
        """Return the dimensions (N, C, H, W) of a value; a vector has height and width 1."""
        height, width = self._sizes[name] or (1, 1)
        pixels = merged([Part(PIXELS, height, width)]), axis_of(PIXELS, width)
        return axis_of(BATCH, BATCH_SIZE), axis_of(CHANNELS, self._channels[name]), *pixels

    def _computed(self, node: fx.Node) -> list[Node]:
        outputs: Any = node.args[0]
        if not isinstance(outputs, Sequence) or len(outputs) != 1:
            raise ExportError(SEVERAL_OUTPUTS)
        found = self.whole(node, self._values.get(outputs[0]))
        is_map = self.size_of(found) is not None
        if found.dims != self._plain(found.name)[: 4 if is_map else 2] or found.shift != (0, 0):
            raise ValueError("the runtime gives logits (N, K) or maps (N, C, H, W) only")
        return needed(self._nodes, found.name)

    def _call(self, node: fx.Node) -> Any:
        known = self._operations.get(node.target)
        read = [self._values[source] for source in node.all_input_nodes]
        if read and all(isinstance(value, Tensor) for value in read):
            return _evaluated(node, self._values)
        try:
            if known is None:
                raise unknown(node)
            return known(self, node)
        except ValueError as error:
            if not any(self._depends(source) for source in node.all_input_nodes):
                return None  # a constant: whoever reads it is unknown
            if isinstance(error, UnknownOperationError):
                raise
            raise unknown(node, str(error)) from error

    def _depends(self, source: fx.Node) -> bool:
        """Tell whether a value depends on the images."""
        value = self._values[source]
        views = value if isinstance(value, list) else [value]
        return any(isinstance(view, View) and not view.is_weight for view in views)

    def argument(self, node: fx.Node, index: int, name: str = "", default: Any = None) -> Any:
        """Return an argument of an operation, by position or keyword."""
        if index < len(node.args):
            return node.args[index]
        return node.kwargs.get(name, default)

    def view(self, node: fx.Node, index: int = 0) -> View:
        """Return the view that an operation reads as an argument."""
        return self.view_of(node, self.argument(node, index))

    def constant(self, node: fx.Node, index: int) -> Tensor | None:
        """Return an argument whose numbers depend on neither images nor weights."""
        found = self._values.get(self.argument(node, index))
        return found if isinstance(found, Tensor) else None

    def view_of(self, node: fx.Node, source: Any) -> View:
        found = self._values.get(source)
        if isinstance(found, View):
            return found
        raise unknown(node)

    def views_of(self, node: fx.Node, source: Any) -> list[View]:
        """Return the views of an operation that returns several."""
        found = self._values.get(source)
        if isinstance(found, list):
            return found
        raise unknown(node)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(node.meta["val"].shape)

    def read(self, node: fx.Node, index: int = 0) -> View:
        """Return a view that an operation reads, of a whole value."""
        return self.whole(node, self.view(node, index))

    def read_plain(self, node: fx.Node) -> View:
        """Return the view that an operation reads, which is (N, C, H, W).

        Raises:
            ValueError: It is viewed otherwise.
        """
        found = self.read(node)
        if not self.is_plain(found):
            raise ValueError(_NO_MAP)
        return found

    def read_map(self, node: fx.Node) -> tuple[View, tuple[int, int]]:
        """Return the map (N, C, H, W) that an operation reads, with height and width.

        Raises:
            ValueError: It is a vector, or viewed otherwise.
        """
        found = self.read_plain(node)
        size = self.size_of(found)
        if size is None:
            raise ValueError(_NO_MAP)
        return found, size

    def whole(self, node: fx.Node, view: Any) -> View:
        """Return a view, which shows all channels and pixels of a value."""
        if not isinstance(view, View) or view.is_weight or view.name not in self._sizes:
            raise unknown(node)
        if view.unit is not None or view.scale != 1:
            raise unknown(node, "it reads what was multiplied by a number, or normalized")
        found: View = view
        size = self._sizes[found.name]
        if size is not None and size != (1, 1):
            if not found.parts(PIXELS):
                found = self._pixel(found)
            elif found.parts(PIXELS) != axis_of(PIXELS, size[0] * size[1]):
                found = self._rectangle(found, size)
            size = self._sizes[found.name]
        wanted = {BATCH: BATCH_SIZE, CHANNELS: self._channels[found.name]}
        wanted[PIXELS] = 1 if size is None else size[0] * size[1]
        is_whole = all(found.parts(axis) == axis_of(axis, n) for axis, n in wanted.items())
        if not is_whole or found.channel or found.pixel or found.parts(REPEATED):
            raise unknown(node, "it reads a part of the channels or pixels of a layer")
        return found

    def _pixel(self, view: View) -> View:
        """Return the vector of the one pixel that a view shows."""
        whole = replace(view, name=f"{view.name}_token{view.pixel}", pixel=0)
        if whole.name not in self._channels:
            channels = self._channels[view.name]
            made = Node(name=whole.name, op="token", inputs=(view.name,), index=view.pixel)
            self._nodes.append(made)
            self._value(made.name, channels, None)
        return whole

    def _rectangle(self, view: View, size: tuple[int, int]) -> View:
        """Return the whole of the map that a view shows; the view itself if it shows none."""
        parts = [part for dim in view.dims for part in dim if part.axis == PIXELS]
        row, column = np.divmod(view.pixel + places(parts), size[1])
        rows, columns = np.unique(row), np.unique(column)
        start = int(row[0]), int(column[0])
        stride = int(np.diff(rows[:2]).sum()) or 1, int(np.diff(columns[:2]).sum()) or 1
        output = len(rows), len(columns)
        y, x = (start[i] + np.arange(output[i]) * stride[i] for i in (0, 1))
        wanted = (y[:, None] * size[1] + x).ravel()
        if not np.array_equal(wanted, row * size[1] + column):
            return view
        return self.sliced(view, start, stride, output)

    def sliced(self, view: View, start: _Size, stride: _Size, output: _Size) -> View:
        """Add the slice of a map; return it with the dimensions of a view of its pixels in order.

        The view has as many pixels, or its dimensions are replaced by those of another one.
        """
        key = view.name, start, stride, output
        if key not in self._slices:
            name = f"{view.name}_slice_{len(self._slices)}"
            options: dict[str, Any] = {"start": start, "stride": stride, "output": output}
            made = Node(name=name, op="slice", inputs=(view.name,), **options)
            self._slices[key] = made
            self._nodes.append(made)
            self._value(name, self._channels[view.name], output)
        dims, inner = [], output[0] * output[1]
        for dim in view.dims:
            counted = []
            for part in dim:
                if part.axis == PIXELS:
                    inner //= part.size
                    part = replace(part, stride=inner)
                counted.append(part)
            dims.append(merged(counted))
        return replace(view, name=self._slices[key].name, dims=tuple(dims), pixel=0)

    def size_of(self, view: View) -> _Size | None:
        """Return height and width of a map; None for a vector, and for what is no value."""
        return self._sizes.get(view.name)

    def pixel_dims(self, view: View) -> tuple[Dim, ...]:
        """Return the dimensions H and W of a value."""
        return self._plain(view.name)[2:]

    def are_alike(self, first: View, second: View) -> bool:
        """Tell whether two whole values have the same shape, and the same order of pixels."""
        same_order = (first.dims, first.shift) == (second.dims, second.shift)
        return same_order and self.size_of(first) == self.size_of(second)

    def channels_of(self, view: View) -> int:
        return self._channels[view.name]

    def is_plain(self, view: View) -> bool:
        """Tell whether a view is (N, C, H, W); a vector is one with height and width 1."""
        return view.dims == self._plain(view.name) and view.shift == (0, 0)

    def flat(self, view: View) -> tuple[Dim, ...]:
        """Return the dimensions (N, C * H * W) of a map."""
        size = self._sizes[view.name] or (1, 1)
        channels = axis_of(CHANNELS, self._channels[view.name])
        return axis_of(BATCH, BATCH_SIZE), (*channels, *axis_of(PIXELS, size[0] * size[1]))

    def ends_with_channels(self, view: View) -> bool:
        return bool(view.dims) and view.dims[-1] == axis_of(CHANNELS, self._channels[view.name])

    def add(
        self,
        node: fx.Node,
        op: str,
        *sources: View,
        channels: int | None = None,
        pixels: Sequence[int] | None = None,
        suffix: str = "",
        **values: Any,
    ) -> View:
        """Add a node to the graph; return its value as (N, C, H, W), or (N, C) without pixels."""
        inputs = tuple(view.name for view in sources)
        made = Node(name=node.name + suffix, op=op, inputs=inputs, **values)
        self._nodes.append(made)
        count = self._channels[inputs[0]] if channels is None else channels
        return self._value(made.name, count, pixels)

    def add_alike(
        self,
        node: fx.Node,
        op: str,
        *sources: View,
        channels: int | None = None,
        dims: tuple[Dim, ...] | None = None,
        **values: Any,
    ) -> View:
        """Add a node whose value has the pixels of its first source; return it as that is viewed.

        Args:
            dims: Of the view, where the number of channels changes.
        """
        pixels = self._sizes[sources[0].name]
        made = self.add(node, op, *sources, channels=channels, pixels=pixels, **values)
        viewed = sources[0].dims if dims is None else dims
        return replace(made, dims=viewed, shift=sources[0].shift)

    def entry(self, node: fx.Node, index: int, *steps: tuple[Any, ...]) -> str | None:
        """Return the name of the entry that an operation reads whole; None if it reads none.

        Args:
            steps: What was computed from it.
        """
        if self.argument(node, index) is None:
            return None
        found = self.view(node, index)
        if found != self.weights(found.name, found.sizes(), *steps):
            raise unknown(node)
        return found.name

    def prefix(
        self, node: fx.Node, entries: Mapping[int, str], *bias_steps: tuple[Any, ...]
    ) -> str:
        """Return what the names of the entries have before the given ends.

        Args:
            entries: Positions of arguments -> ends of the names; the first one is needed.
            bias_steps: What was computed from the bias before.
        """
        found = {}
        for i, end in entries.items():
            name = self.entry(node, i, *(bias_steps if end == "bias" else ()))
            if name is not None:
                found[end] = name
        prefixes = {name.removesuffix(end) for end, name in found.items()}
        first = next(iter(entries.values()))
        if first not in found or len(prefixes) != 1:
            raise unknown(node, f"its weights are not named {', '.join(entries.values())}")
        prefix = prefixes.pop()
        if any(name != prefix + end for end, name in found.items()):
            raise unknown(node, f"its weights are not named {', '.join(entries.values())}")
        return prefix


def _evaluated(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Return what an operation computes from constants, on the CPU; None if it has no result."""
    arguments, options = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    if "device" in options:
        options = {**options, "device": torch.device("cpu")}
    target: Any = node.target
    return target(*arguments, **options)


def unknown(node: fx.Node, reason: str = "") -> ValueError:
    path, kind = place(node)
    what = f"({operation(node)}{': ' + reason if reason else ''})"
    if not path:
        return ValueError(f"the runtime does not know {what}")
    return UnknownOperationError(f"the runtime does not know {path}: {kind} {what}")


def operation(node: fx.Node) -> str:
    """Return the name of what a node calls, such as "aten.relu"."""
    return str(node.target).rpartition(".")[0] or str(node.target)


def place(node: fx.Node) -> tuple[str, str]:
    """Return the path of the module in which an operation is, and the name of its class."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path, kind = stack[-1] if stack else ("", "")
    return path, getattr(kind, "__name__", str(kind).rpartition(".")[2])


def is_tensor(node: fx.Node) -> bool:
    """Tell whether the value of an operation consists of tensors; otherwise it is a size."""
    return not isinstance(node.meta.get("val"), int | torch.SymInt)


Handler = Callable[[Interpreter, fx.Node], Any]
"""Adds what an operation of torch computes to the graph, and returns its value: a view or more."""
