"""Trace a model to its graph. Errors name what the runtime cannot compute.

torch.fx traces convolutional networks, for images of any size. torch.export (exported.py) traces
those which torch.fx cannot follow, or which have operations that are not known here.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from . import exported
from .check import check, check_shapes, in_channels
from .exported import UnknownOperation
from .graph import INPUT, Node


def trace(model: nn.Module, *, image_size: int = 224) -> list[Node]:
    """Return the graph that a classifier computes in evaluation.

    The runtime knows convolutions, BatchNorm, activations, sums, max- and average-pooling, linear
    layers, LayerNorm, attention, and layers that do nothing in evaluation (dropout, identity).

    Args:
        model: Maps images (N, C, H, W) to logits (N, K); on any device, "meta" included.
        image_size: Side of the images for which torch.export traces the model if torch.fx cannot.

    Raises:
        ValueError: The model has another operation, or one that depends on the data.
    """
    nodes = _nodes(model, image_size)
    check(nodes)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_shapes(nodes, shapes, in_channels=in_channels(nodes, shapes), folded=False)
    return nodes


def _nodes(model: nn.Module, image_size: int) -> list[Node]:
    try:
        traced = symbolic_trace(model)
        return _Tracer(dict(traced.named_modules())).convert(traced.graph)
    except UnknownOperation as unknown:
        try:
            return exported.trace(model, image_size)
        except UnknownOperation:
            raise  # it names the operation where torch.fx stopped at a reshape, or earlier
        except ValueError:
            raise unknown from None


def symbolic_trace(model: nn.Module) -> fx.GraphModule:
    """Return the graph of a model as torch.fx sees it; its modules are those of the model.

    Raises:
        UnknownOperation: The model has control flow that depends on the data, or the like; one
            line.
    """
    try:
        return fx.symbolic_trace(model)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UnknownOperation(f"{type(model).__name__} cannot be traced: {reason}") from error


class _Tracer:
    """Turns the nodes of torch.fx into nodes of graph.py."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._names: dict[fx.Node, str] = {}
        self._pooled: set[fx.Node] = set()  # values (N, C, 1, 1): averaged, but not yet flattened
        self._nodes: list[Node] = []

    def convert(self, graph: fx.Graph) -> list[Node]:
        for node in graph.nodes:
            if node.op == "placeholder":
                if self._names:
                    raise ValueError("a model with more than one input cannot be exported")
                self._names[node] = INPUT
            elif node.op == "output":
                return self._computed(node.args[0])
            elif node.op == "call_module":
                self._module(node, self._modules[str(node.target)])
            else:
                self._call(node)
        raise ValueError("a model without output cannot be exported")

    def _computed(self, output: Any) -> list[Node]:
        """Return the nodes on which the output depends; the last one computes the output."""
        if not isinstance(output, fx.Node):
            raise ValueError("a model with more than one output cannot be exported")
        needed = {self._names[self._flat(output)]}
        for node in reversed(self._nodes):
            if node.name in needed:
                needed.update(node.inputs)
        return [node for node in self._nodes if node.name in needed]

    def _flat(self, node: fx.Node) -> fx.Node:
        if node in self._pooled:
            raise ValueError(
                f"{node.name} keeps a height and a width of 1: flatten it, because the runtime "
                "computes nothing else with maps that were averaged over the image"
            )
        return node

    def _operands(self, node: fx.Node, count: int = 1) -> list[fx.Node]:
        """Return a node's first arguments, which are values; its only keyword may be `inplace`."""
        operands = node.args[:count]
        found = [operand for operand in operands if isinstance(operand, fx.Node)]
        if len(found) < count or not {"inplace"}.issuperset(node.kwargs):
            raise UnknownOperation(f"the runtime does not know {node.format_node()}")
        return found

    def _add(self, node: fx.Node, op: str, inputs: Sequence[fx.Node], **values: Any) -> None:
        names = tuple(self._names[self._flat(source)] for source in inputs)
        self._nodes.append(Node(name=node.name, op=op, inputs=names, **values))
        self._names[node] = node.name

    def _overwrite(self, node: fx.Node) -> None:
        """Let later readers of a node's first operand find the node's value: it works in place."""
        old, new = self._names[self._operands(node)[0]], self._names[node]
        self._names = {key: new if name == old else name for key, name in self._names.items()}

    def _skip(self, node: fx.Node) -> None:
        (source,) = self._operands(node)
        self._names[node] = self._names[source]
        if source in self._pooled:
            self._pooled.add(node)

    def _flatten(self, node: fx.Node) -> None:
        (source,) = self._operands(node)
        makers = {n.name: n.op for n in self._nodes}
        if makers.get(self._names[source]) not in ("mean_pool", "linear"):
            raise ValueError("the runtime flattens only what has been averaged over the image")
        self._names[node] = self._names[source]

    def _relu(self, node: fx.Node, inplace: object) -> None:
        self._add(node, "relu", self._operands(node))
        if inplace:
            self._overwrite(node)

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        prefix, inputs = f"{node.target}.", self._operands(node)
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{node.target} is parametrized: torch.nn.utils.parametrize."
                "remove_parametrizations gives it plain weights"
            )
        if isinstance(module, nn.Conv2d):
            self._add(node, "conv", inputs, parameters=prefix, **_convolution(module))
        elif isinstance(module, nn.BatchNorm2d):
            if not (module.affine and module.track_running_stats):
                raise ValueError(f"{node.target}: BatchNorm without scale or statistics")
            self._add(node, "batch_norm", inputs, parameters=prefix, eps=module.eps)
        elif isinstance(module, nn.Linear):
            self._add(node, "linear", inputs, parameters=prefix)
        elif isinstance(module, nn.ReLU):
            self._relu(node, module.inplace)
        elif isinstance(module, nn.MaxPool2d):
            if module.dilation not in (1, (1, 1)) or module.return_indices:
                raise ValueError(f"{node.target}: max-pooling with dilation or return_indices")
            self._add(node, "max_pool", inputs, **_window(module), ceil_mode=module.ceil_mode)
        elif isinstance(module, nn.AvgPool2d):
            if module.ceil_mode or not module.count_include_pad or module.divisor_override:
                raise ValueError(f"{node.target}: average-pooling with options")
            self._add(node, "avg_pool", inputs, **_window(module))
        elif isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            self._add(node, "mean_pool", inputs)
            self._pooled.add(node)
        elif isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            self._flatten(node)
        elif isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d):
            self._skip(node)
        else:
            raise UnknownOperation(f"the runtime does not know {node.target}: {module}")

    def _call(self, node: fx.Node) -> None:
        function, rest = node.target, node.args[1:]
        if function in (operator.add, operator.iadd, torch.add, "add", "add_") and len(rest) == 1:
            self._add(node, "add", self._operands(node, 2))
            if function in (operator.iadd, "add_"):
                self._overwrite(node)
        elif function in (F.relu, torch.relu, "relu", "relu_"):
            self._relu(node, function == "relu_" or node.kwargs.get("inplace", rest[:1] == (True,)))
        elif function in (torch.flatten, "flatten") and rest in ((1,), (1, -1)):
            self._flatten(node)
        elif function in (torch.mean, "mean") and tuple(rest) in (([2, 3],), ((2, 3),)):
            self._add(node, "mean_pool", self._operands(node))
        else:
            raise UnknownOperation(f"the runtime does not know {node.format_node()}")


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _window(module: nn.MaxPool2d | nn.AvgPool2d) -> dict[str, Any]:
    return {name: _pair(getattr(module, name + end)) for name, end in _WINDOW}


_WINDOW = (("kernel", "_size"), ("stride", ""), ("padding", ""))


def _convolution(module: nn.Conv2d) -> dict[str, Any]:
    padding = module.padding
    if isinstance(padding, str) or module.padding_mode != "zeros":
        raise ValueError(f"the runtime pads with numbers of zeros, not as in {module}")
    return {
        "kernel": _pair(module.kernel_size),
        "stride": _pair(module.stride),
        "padding": _pair(padding),
        "dilation": _pair(module.dilation),
        "groups": module.groups,
    }
