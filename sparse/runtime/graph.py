"""The graph of a network as plain data: traced from a model, stored in a file, run by torch.

A graph is a list of nodes in the order of execution. It names the entries of a state dict instead
of holding tensors and does not depend on the resolution, so it can live in the header of a file.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

INPUT = "input"

OPS = ("conv", "batch_norm", "relu", "add", "max_pool", "avg_pool", "mean_pool", "linear")


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operation; its value is known by its name."""

    name: str
    op: str
    """One of `OPS`. `mean_pool` averages whole planes and gives a vector per image."""
    inputs: tuple[str, ...]
    """Names of earlier nodes, or `INPUT`."""
    parameters: str = ""
    """Prefix of the entries in the state dict: conv, batch_norm and linear."""
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    eps: float = 0.0
    ceil_mode: bool = False
    """max_pool: the last window may reach beyond the image."""


def to_json(nodes: Sequence[Node]) -> list[dict[str, Any]]:
    """Return the nodes as mappings, without what has its default."""
    defaults = {f.name: f.default for f in fields(Node)}
    return [{k: v for k, v in asdict(n).items() if defaults[k] != v} for n in nodes]


def from_json(rows: Any) -> list[Node]:
    """Return the nodes of `to_json`.

    Raises:
        ValueError: Not a graph, an unknown operation, or a value used before it is computed.
    """
    known = {INPUT}
    nodes = []
    for row in rows:
        try:
            values: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in row.items()
            }
            node = Node(**values)
        except TypeError as error:
            raise ValueError(f"the graph has a node that is none: {error}") from None
        if node.op not in OPS or not known.issuperset(node.inputs):
            raise ValueError(f"the graph cannot be run: node {node.name!r} ({node.op!r})")
        known.add(node.name)
        nodes.append(node)
    if not nodes:
        raise ValueError("the graph is empty")
    return nodes


def trace(model: nn.Module) -> list[Node]:
    """Return the graph of a convolutional classifier, as it is evaluated.

    Known are convolutions, BatchNorm, ReLU, sums, max- and average-pooling, linear layers, and what
    does nothing in evaluation (dropout, identity).

    Args:
        model: Maps images (N, C, H, W) to logits (N, K); on any device, "meta" included.

    Raises:
        ValueError: The model does something else, or something that depends on the data.
    """
    try:
        traced = fx.symbolic_trace(model)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{type(model).__name__} cannot be traced: {reason}") from error
    return _Tracer(dict(traced.named_modules())).convert(traced.graph)


class _Tracer:
    """Turns the nodes of torch.fx into ours."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._names: dict[fx.Node, str] = {}
        self._nodes: list[Node] = []

    def convert(self, graph: fx.Graph) -> list[Node]:
        for node in graph.nodes:
            if node.op == "placeholder":
                if self._names:
                    raise ValueError("a model with more than one input cannot be exported")
                self._names[node] = INPUT
            elif node.op == "output":
                if self._names.get(node.args[0]) != self._nodes[-1].name:
                    raise ValueError("a model with more than one output cannot be exported")
            elif node.op == "call_module":
                self._module(node, self._modules[str(node.target)])
            else:
                self._call(node)
        return self._nodes

    def _add(self, node: fx.Node, op: str, inputs: Sequence[Any], **values: Any) -> None:
        names = tuple(self._names[source] for source in inputs)
        self._nodes.append(Node(name=node.name, op=op, inputs=names, **values))
        self._names[node] = node.name

    def _skip(self, node: fx.Node) -> None:
        self._names[node] = self._names[node.args[0]]  # type: ignore[index]

    def _flatten(self, node: fx.Node) -> None:
        source = self._names[node.args[0]]  # type: ignore[index]
        if source not in {n.name for n in self._nodes if n.op == "mean_pool"}:
            raise ValueError("the runtime flattens only what has been averaged over the image")
        self._skip(node)

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        prefix, inputs = f"{node.target}.", node.args[:1]
        if isinstance(module, nn.Conv2d):
            self._add(node, "conv", inputs, parameters=prefix, **_convolution(module))
        elif isinstance(module, nn.BatchNorm2d):
            if not (module.affine and module.track_running_stats):
                raise ValueError(f"{node.target}: BatchNorm without scale or statistics")
            self._add(node, "batch_norm", inputs, parameters=prefix, eps=module.eps)
        elif isinstance(module, nn.Linear):
            self._add(node, "linear", inputs, parameters=prefix)
        elif isinstance(module, nn.ReLU):
            self._add(node, "relu", inputs)
        elif isinstance(module, nn.MaxPool2d):
            if module.dilation not in (1, (1, 1)):
                raise ValueError(f"{node.target}: max-pooling with dilation")
            self._add(node, "max_pool", inputs, **_window(module), ceil_mode=module.ceil_mode)
        elif isinstance(module, nn.AvgPool2d):
            if module.ceil_mode or not module.count_include_pad or module.divisor_override:
                raise ValueError(f"{node.target}: average-pooling with options")
            self._add(node, "avg_pool", inputs, **_window(module))
        elif isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            self._add(node, "mean_pool", inputs)
        elif isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            self._flatten(node)
        elif isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d):
            self._skip(node)
        else:
            raise ValueError(f"the runtime does not know {node.target}: {module}")

    def _call(self, node: fx.Node) -> None:
        function = node.target
        if function in (operator.add, operator.iadd, torch.add, "add", "add_"):
            if len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
                raise ValueError(f"the runtime does not know the sum {node.format_node()}")
            self._add(node, "add", node.args)
        elif function in (F.relu, torch.relu, "relu", "relu_"):
            self._add(node, "relu", node.args[:1])
        elif function in (torch.flatten, "flatten") and node.args[1:] in ((1,), (1, -1)):
            self._flatten(node)
        elif function in (torch.mean, "mean") and tuple(node.args[1:]) in (([2, 3],), ((2, 3),)):
            self._add(node, "mean_pool", node.args[:1])
        else:
            raise ValueError(f"the runtime does not know {node.format_node()}")


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


def run(nodes: Sequence[Node], state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Return the logits (N, K) of images (N, C, H, W), computed by torch.

    Results of intermediate nodes are kept only as long as they are needed.
    """
    last_use = {name: i for i, node in enumerate(nodes) for name in node.inputs}
    values = {INPUT: images}
    for i, node in enumerate(nodes):
        values[node.name] = _TORCH[node.op](node, state, *(values[name] for name in node.inputs))
        for name in set(node.inputs):
            if last_use[name] == i:
                del values[name]
    return values[nodes[-1].name]


def _run_conv(node: Node, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    weight, bias = state[node.parameters + "weight"], state.get(node.parameters + "bias")
    return F.conv2d(x, weight, bias, node.stride, node.padding, node.dilation, node.groups)


def _run_batch_norm(node: Node, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    names = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (state[node.parameters + name] for name in names)
    return F.batch_norm(x, mean, var, weight, bias, eps=node.eps)


def _run_linear(node: Node, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(x, state[node.parameters + "weight"], state.get(node.parameters + "bias"))


_TORCH: dict[str, Callable[..., Tensor]] = {
    "conv": _run_conv,
    "batch_norm": _run_batch_norm,
    "linear": _run_linear,
    "relu": lambda node, state, x: F.relu(x),
    "add": lambda node, state, x, y: x + y,
    "max_pool": lambda node, state, x: F.max_pool2d(
        x, node.kernel, node.stride, node.padding, ceil_mode=node.ceil_mode
    ),
    "avg_pool": lambda node, state, x: F.avg_pool2d(x, node.kernel, node.stride, node.padding),
    "mean_pool": lambda node, state, x: x.mean((2, 3)),
}
