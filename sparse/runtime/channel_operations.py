"""What the operations of a traced model do with channels.

Of each operation this says which channels of its value are constants, which stay or go with those
that it reads, and by which weights it mixes them. `channels` decides by this which channels go.
"""

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_POINTWISE_MODULES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Mish, nn.Tanh,
                      nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Softplus,
                      nn.Identity, nn.Dropout, nn.Dropout2d)  # fmt: skip
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_POINTWISE = {
    *(operator.add, operator.iadd, torch.add, "add", "add_"),
    *(operator.sub, operator.isub, torch.sub, "sub", "sub_", *_PRODUCTS),
    *(F.relu, torch.relu, "relu", "relu_", F.relu6, F.leaky_relu, F.elu, F.silu, F.gelu, F.mish),
    *(F.hardswish, F.hardsigmoid, F.hardtanh, F.softplus, F.dropout, "contiguous", "clone"),
    *(torch.sigmoid, F.sigmoid, "sigmoid", torch.tanh, F.tanh, "tanh"),
}
_POOL_MODULES = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_POOLS = {F.max_pool2d, torch.max_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d}


@dataclass(frozen=True)
class Constants:
    """Which channels of a value are the same number for all images and pixels."""

    known: Tensor
    value: Tensor
    """float64, 0 where it is not known."""


@dataclass(frozen=True)
class Tie:
    """Channels of a source that stay or go with channels of an operation's value, in blocks."""

    source: fx.Node
    start: int = 0
    """The first tied channel of the value."""
    read: int = 1
    """Channels of a block of the source."""
    written: int = 1
    """Channels of a block of the value."""


@dataclass(frozen=True)
class Operation:
    """What one node does with channels. Without ties and constants it mixes them all."""

    constants: Callable[..., Constants]
    """The constants of the value from those of the sources."""
    ties: Sequence[Tie] = ()
    mixes: "Mixing | None" = None
    module: nn.Module | None = None
    """The module that has a weight per channel."""


@dataclass(frozen=True)
class Mixing:
    """The weights of a convolution or a linear layer: (groups, out, in), per group."""

    weight: Tensor
    """float64, summed over the window."""
    reads: Tensor
    """Where a weight of the window is not 0."""
    bias: Tensor
    is_padded: bool

    def exact(self, sources: Constants) -> Tensor:
        """Return which input channels add a constant, as (groups, 1, in)."""
        folds = sources.known & ((sources.value == 0) | (not self.is_padded))
        return folds.view(len(self.weight), 1, -1)

    def constants(self, sources: Constants) -> Constants:
        known = ~(self.reads & ~self.exact(sources)).any(2).flatten()
        inputs = sources.value.view(len(self.weight), -1, 1)
        value = (self.weight @ inputs).flatten() + self.bias
        return Constants(known, value.where(known, 0))


def _mixing(layer: nn.Linear | nn.modules.conv._ConvNd) -> Mixing:
    weight = layer.weight.double()
    groups = layer.groups if isinstance(layer, nn.modules.conv._ConvNd) else 1
    windows = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.double()
    return Mixing(windows.sum(3), (windows != 0).any(3), bias, _is_padded(layer))


def _is_padded(layer: nn.Module) -> bool:
    """Tell whether a layer sees zeros at the border."""
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return False
    return getattr(layer, "padding", 0) not in (0, "valid", (0,), (0, 0), (0, 0, 0))


class Operations:
    """The operations of a traced model.

    Args:
        traced: The model.
        shapes: The shapes of the values that have channels.
    """

    def __init__(self, traced: fx.GraphModule, shapes: Mapping[fx.Node, torch.Size]) -> None:
        self._modules = dict(traced.named_modules())
        self._uses = Counter(_used_module(node) for node in traced.graph.nodes)
        self._shapes = shapes

    def of(self, node: fx.Node) -> Operation | None:
        """Return what a node does with channels; None if that is not known."""
        sources = node.all_input_nodes
        if not sources or node not in self._shapes or any(s not in self._shapes for s in sources):
            return None
        if node.op == "call_module":
            return self._of_module(node, self._modules[str(node.target)])
        target: Any = node.target
        rest, options = node.args[1:], node.kwargs
        if target in _POINTWISE:
            return self._pointwise(node)
        if target in _POOLS or (target in (torch.mean, "mean") and self._keeps_channels(node)):
            return self._tied(node, lambda source: source)
        if target in (torch.flatten, "flatten") and rest in ((1,), (1, -1)):
            return self._flatten(node)
        if target in (torch.cat, torch.concat) and (*rest, *options.values()) == (1,):
            return self._concatenation(node)
        return None

    def _of_module(self, node: fx.Node, module: nn.Module) -> Operation | None:
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        if isinstance(module, _POINTWISE_MODULES):
            return self._pointwise(node)
        if isinstance(module, nn.AvgPool2d):
            return self._tied(node, _only_zeros if _is_unlike_average(module) else lambda x: x)
        if isinstance(module, _POOL_MODULES):
            return self._tied(node, lambda source: source)
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return self._flatten(node)
        if self._uses[str(node.target)] > 1 or not _is_alone(module, self._modules):
            return None
        if isinstance(module, BATCH_NORM) and module.running_mean is not None:
            return self._tied(node, lambda source: _normalized(module, source), module)
        if isinstance(module, _CONVOLUTIONS) or (
            isinstance(module, nn.Linear) and len(self._shapes[node]) == 2
        ):
            return self._layer(node, module)
        return None

    def _layer(self, node: fx.Node, module: nn.Linear | nn.modules.conv._ConvNd) -> Operation:
        mixing, (source,) = _mixing(module), node.all_input_nodes
        groups, written, read = mixing.weight.shape
        ties = [Tie(source, read=read, written=written)] if groups > 1 else []
        return Operation(mixing.constants, ties, mixing, module)

    def _tied(
        self,
        node: fx.Node,
        constants: Callable[..., Constants],
        module: nn.Module | None = None,
    ) -> Operation | None:
        """Return an operation on each channel by itself; None if the channels do not agree."""
        sources = node.all_input_nodes
        shapes = [self._shapes[s] for s in sources]
        if {shape[1] for shape in shapes} != {self._shapes[node][1]} or (
            len({len(shape) for shape in shapes}) > 1
        ):
            return None
        return Operation(constants, [Tie(source) for source in sources], module=module)

    def _pointwise(self, node: fx.Node) -> Operation | None:
        def constants(*sources: Constants) -> Constants:
            shape = (1, -1, *[1] * (len(self._shapes[node]) - 2))
            given = zip(node.all_input_nodes, sources, strict=True)
            values = {n: source.value.reshape(shape).clone() for n, source in given}
            known = torch.stack([source.known for source in sources]).all(0)
            if node.target in _PRODUCTS:
                known |= torch.stack([s.known & (s.value == 0) for s in sources]).any(0)
            value = self._call(node, values).flatten()
            return Constants(known, value.where(known, 0))

        return self._tied(node, constants)

    def _call(self, node: fx.Node, values: dict[fx.Node, Tensor]) -> Tensor:
        """Return what a node computes from other values."""
        arguments: Any = map_arg(node.args, values.__getitem__)
        options: Any = map_arg(node.kwargs, values.__getitem__)
        target: Any = node.target
        if node.op == "call_module":
            target = self._modules[target]
        elif node.op == "call_method":
            target = getattr(Tensor, target)
        found: Tensor = target(*arguments, **options)
        return found

    def _keeps_channels(self, node: fx.Node) -> bool:
        """Tell whether a mean is one over height and width."""
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if not isinstance(dims, Sequence) or len(self._shapes[node.all_input_nodes[0]]) != 4:
            return False
        return {int(d) % 4 for d in dims} == {2, 3}  # type: ignore[arg-type]

    def _flatten(self, node: fx.Node) -> Operation:
        (source,) = node.all_input_nodes
        pixels = self._shapes[node][1] // self._shapes[source][1]

        def constants(read: Constants) -> Constants:
            repeated = (tensor.repeat_interleave(pixels) for tensor in (read.known, read.value))
            return Constants(*repeated)

        return Operation(constants, [Tie(source, written=pixels)])

    def _concatenation(self, node: fx.Node) -> Operation | None:
        sources: Any = node.args[0]
        if len(set(sources)) < len(sources):
            return None
        ties, start = [], 0
        for source in sources:
            ties.append(Tie(source, start))
            start += self._shapes[source][1]

        def constants(*read: Constants) -> Constants:
            return Constants(
                torch.cat([source.known for source in read]),
                torch.cat([source.value for source in read]),
            )

        return Operation(constants, ties)


def _used_module(node: fx.Node) -> str:
    """Return the name of the module that a node calls or whose parameter it reads, or ''."""
    name = str(node.target)
    if node.op == "get_attr":
        return name.rpartition(".")[0]
    return name if node.op == "call_module" else ""


def _is_alone(module: nn.Module, modules: dict[str, nn.Module]) -> bool:
    """Tell whether no other module has a module's parameters, as parametrizations have."""
    own = {id(parameter) for parameter in module.parameters()}
    others = (other for other in modules.values() if other is not module)
    return not any(id(p) in own for other in others for p in other.parameters(recurse=False))


def _is_unlike_average(pool: nn.AvgPool2d) -> bool:
    """Tell whether an average of equal numbers may be another number."""
    return bool(pool.divisor_override) or (_is_padded(pool) and pool.count_include_pad)


def _only_zeros(source: Constants) -> Constants:
    known = source.known & (source.value == 0)
    return Constants(known, source.value.where(known, 0))


def norm_entries(norm: nn.Module) -> dict[str, Tensor]:
    names = ("weight", "bias", "running_mean", "running_var")
    return {name: getattr(norm, name) for name in names if getattr(norm, name) is not None}


def _normalized(norm: Any, source: Constants) -> Constants:
    entries = {name: tensor.double() for name, tensor in norm_entries(norm).items()}
    mean, var = entries["running_mean"], entries["running_var"]
    weight = entries.get("weight", torch.ones_like(mean))
    value = (source.value - mean) / torch.sqrt(var + norm.eps) * weight
    known = source.known | (weight == 0)
    return Constants(known, (value + entries.get("bias", 0)).where(known, 0))
