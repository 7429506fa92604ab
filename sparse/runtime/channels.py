"""Remove the channels that a network does not need; what remains is dense and computes the same.

The channels of a value are its dimension 1. A channel goes in either of two cases:

- Nobody reads it: the weights for it are 0 in all layers that follow.
- It is a constant, because the weights behind it are 0, and the layers that follow can take the
  constant into their bias. A convolution that pads with zeros sees another value at the border than
  inside, so it takes only the constant 0. For any other constant the channel stays.

Some operations tie channels: those of a sum go together or not at all, as do those of BatchNorm,
activations, pooling and concatenation with those that they read. A grouped convolution loses whole
groups. A value keeps at least one channel. Operations that are not known here keep all the channels
that they read and write.
"""

import copy
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from .tracing import symbolic_trace

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
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


def compact_channels(model: nn.Module, images: Tensor) -> fx.GraphModule:
    """Return a smaller dense network with the outputs of `model` in evaluation.

    Its modules have the names that they have in `model`, and fewer channels. The model is not
    changed.

    Args:
        model: Maps images (N, C, H, W) to one tensor; on the CPU.
        images: Any images of the size that the model takes. They show the shapes of all values;
            with them the outputs are compared at the end.

    Raises:
        ValueError: The model cannot be copied, traced or run, has several inputs or outputs, or
            would compute something else.
    """
    try:
        own = copy.deepcopy(model).eval()
    except RuntimeError as error:  # such as weights that torch.nn.utils.prune computes
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{type(model).__name__} cannot be copied: {reason}") from error
    traced = symbolic_trace(own)
    recorder = _Recorder(traced)
    try:
        with torch.no_grad():
            wanted = recorder.run(images.clone())
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{type(model).__name__} cannot be run: {reason}") from error
    if not isinstance(wanted, Tensor):
        raise ValueError("a model with more than one output cannot be compacted")
    with torch.no_grad():
        _Compaction(traced, recorder.shapes).apply()
        found = traced(images.clone())
    largest = float(wanted.abs().nan_to_num(0, 0, 0).max().clamp(min=1))
    tolerance = 1e3 * torch.finfo(images.dtype).eps * largest
    if not torch.allclose(found, wanted, rtol=0, atol=tolerance, equal_nan=True):
        raise ValueError(
            f"{type(model).__name__} computes something else without its dead channels, perhaps "
            "because a value is overwritten that is read later: it cannot be compacted"
        )
    return traced


class _Recorder(fx.Interpreter):
    """Runs a traced model and notes the shape of every tensor."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = value.shape
        return value


@dataclass(frozen=True)
class _Constants:
    """Which channels of a value are the same number for all images and pixels."""

    known: Tensor
    value: Tensor
    """float64, 0 where it is not known."""


@dataclass(frozen=True)
class _Tie:
    """Channels of a source that stay or go with channels of an operation's value, in blocks."""

    source: fx.Node
    start: int = 0
    """The first tied channel of the value."""
    read: int = 1
    """Channels of a block of the source."""
    written: int = 1
    """Channels of a block of the value."""


@dataclass(frozen=True)
class _Operation:
    """What one node does with channels. Without ties and constants it mixes them all."""

    constants: Callable[..., _Constants]
    """The constants of the value from those of the sources."""
    ties: Sequence[_Tie] = ()
    mixes: "_Mixing | None" = None
    module: nn.Module | None = None
    """The module that has a weight per channel."""


@dataclass(frozen=True)
class _Mixing:
    """The weights of a convolution or a linear layer: (groups, out, in), per group."""

    weight: Tensor
    """float64, summed over the window."""
    reads: Tensor
    """Where a weight of the window is not 0."""
    bias: Tensor
    is_padded: bool

    def exact(self, sources: _Constants) -> Tensor:
        """Return which input channels add a constant, as (groups, 1, in)."""
        folds = sources.known & ((sources.value == 0) | (not self.is_padded))
        return folds.view(len(self.weight), 1, -1)

    def constants(self, sources: _Constants) -> _Constants:
        known = ~(self.reads & ~self.exact(sources)).any(2).flatten()
        inputs = sources.value.view(len(self.weight), -1, 1)
        value = (self.weight @ inputs).flatten() + self.bias
        return _Constants(known, value.where(known, 0))


def _mixing(layer: nn.Linear | nn.modules.conv._ConvNd) -> _Mixing:
    weight = layer.weight.double()
    groups = layer.groups if isinstance(layer, nn.modules.conv._ConvNd) else 1
    windows = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.double()
    return _Mixing(windows.sum(3), (windows != 0).any(3), bias, _is_padded(layer))


def _is_padded(layer: nn.Module) -> bool:
    """Tell whether a layer sees zeros at the border."""
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return False
    return getattr(layer, "padding", 0) not in (0, "valid", (0,), (0, 0), (0, 0, 0))


class _Compaction:
    """Finds the channels that a traced model needs, and cuts the others off its modules."""

    def __init__(self, traced: fx.GraphModule, shapes: dict[fx.Node, torch.Size]) -> None:
        self._graph = traced.graph
        self._modules = dict(traced.named_modules())
        self._uses = Counter(_used_module(node) for node in self._graph.nodes)
        self._shapes = {node: s for node, s in shapes.items() if len(s) >= 2}
        self._operations: dict[fx.Node, _Operation | None] = {}
        self._constants: dict[fx.Node, _Constants] = {}
        self._keep = {
            node: torch.zeros(shape[1], dtype=torch.bool, device="cpu")
            for node, shape in self._shapes.items()
        }
        self._find_constants()

    def apply(self) -> None:
        self._settle()
        for keep in self._keep.values():
            if not keep.any():
                keep[0] = True  # torch and ONNX have no convolution without channels
                self._settle()
        for node, operation in self._operations.items():
            if operation is not None and operation.mixes is not None:
                self._cut(node, operation)
            elif operation is not None and isinstance(operation.module, _BATCH_NORM):
                _cut_norm(operation.module, self._keep[node])

    def _find_constants(self) -> None:
        for node in self._graph.nodes:
            self._follow_overwritten(node)
            operation = self._operations[node] = self._operation(node)
            if operation is not None:
                sources = [self._constants[source] for source in node.all_input_nodes]
                self._constants[node] = operation.constants(*sources)
            elif node in self._shapes:
                channels = self._shapes[node][1]
                nothing = torch.zeros(channels, dtype=torch.bool, device="cpu")
                self._constants[node] = _Constants(nothing, nothing.double())

    def _follow_overwritten(self, node: fx.Node) -> None:
        """Let those who read a value after it was overwritten read what overwrote it."""
        if not _works_in_place(node, self._modules) or not node.all_input_nodes:
            return
        old = node.all_input_nodes[0]
        for user in list(old.users):
            if user is not node and node < user:
                user.replace_input_with(old, node)

    def _operation(self, node: fx.Node) -> _Operation | None:
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

    def _of_module(self, node: fx.Node, module: nn.Module) -> _Operation | None:
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
        if isinstance(module, _BATCH_NORM) and module.running_mean is not None:
            return self._tied(node, lambda source: _normalized(module, source), module)
        if isinstance(module, _CONVOLUTIONS) or (
            isinstance(module, nn.Linear) and len(self._shapes[node]) == 2
        ):
            return self._layer(node, module)
        return None

    def _layer(self, node: fx.Node, module: nn.Linear | nn.modules.conv._ConvNd) -> _Operation:
        mixing, (source,) = _mixing(module), node.all_input_nodes
        groups, written, read = mixing.weight.shape
        ties = [_Tie(source, read=read, written=written)] if groups > 1 else []
        return _Operation(mixing.constants, ties, mixing, module)

    def _tied(
        self,
        node: fx.Node,
        constants: Callable[..., _Constants],
        module: nn.Module | None = None,
    ) -> _Operation | None:
        """Return an operation on each channel by itself; None if the channels do not agree."""
        sources = node.all_input_nodes
        shapes = [self._shapes[s] for s in sources]
        if {shape[1] for shape in shapes} != {self._shapes[node][1]} or (
            len({len(shape) for shape in shapes}) > 1
        ):
            return None
        return _Operation(constants, [_Tie(source) for source in sources], module=module)

    def _pointwise(self, node: fx.Node) -> _Operation | None:
        def constants(*sources: _Constants) -> _Constants:
            shape = (1, -1, *[1] * (len(self._shapes[node]) - 2))
            given = zip(node.all_input_nodes, sources, strict=True)
            values = {n: source.value.reshape(shape).clone() for n, source in given}
            known = torch.stack([source.known for source in sources]).all(0)
            if node.target in _PRODUCTS:
                known |= torch.stack([s.known & (s.value == 0) for s in sources]).any(0)
            value = self._call(node, values).flatten()
            return _Constants(known, value.where(known, 0))

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

    def _flatten(self, node: fx.Node) -> _Operation:
        (source,) = node.all_input_nodes
        pixels = self._shapes[node][1] // self._shapes[source][1]

        def constants(read: _Constants) -> _Constants:
            repeated = (tensor.repeat_interleave(pixels) for tensor in (read.known, read.value))
            return _Constants(*repeated)

        return _Operation(constants, [_Tie(source, written=pixels)])

    def _concatenation(self, node: fx.Node) -> _Operation | None:
        sources: Any = node.args[0]
        if len(set(sources)) < len(sources):
            return None
        ties, start = [], 0
        for source in sources:
            ties.append(_Tie(source, start))
            start += self._shapes[source][1]

        def constants(*read: _Constants) -> _Constants:
            return _Constants(
                torch.cat([source.known for source in read]),
                torch.cat([source.value for source in read]),
            )

        return _Operation(constants, ties)

    def _settle(self) -> None:
        """Let every node keep what it needs of its sources, until nothing changes."""
        before = -1
        while before < (now := sum(int(keep.sum()) for keep in self._keep.values())):
            before = now
            for node in reversed(self._graph.nodes):
                self._demand(node, self._operations[node])

    def _demand(self, node: fx.Node, operation: _Operation | None) -> None:
        if operation is None:
            for value in (node, *node.all_input_nodes):
                if value in self._keep:
                    self._keep[value].fill_(True)
            return
        for tie in operation.ties:
            read = self._keep[tie.source].view(-1, tie.read)
            end = tie.start + len(read) * tie.written
            written = self._keep[node][tie.start : end].view(-1, tie.written)
            stays = (read.any(1) | written.any(1))[:, None]
            read |= stays
            written |= stays
        if operation.mixes is not None and not operation.ties:
            (source,) = node.all_input_nodes
            needs = operation.mixes.reads & ~operation.mixes.exact(self._constants[source])
            self._keep[source] |= needs[0, self._keep[node]].any(0)

    def _cut(self, node: fx.Node, operation: _Operation) -> None:
        """Cut the channels of a convolution or a linear layer, and add constants to its bias."""
        layer: Any = operation.module
        assert operation.mixes is not None
        (source,) = node.all_input_nodes
        rows, columns = self._keep[node], self._keep[source]
        weight, bias = layer.weight[rows], operation.mixes.bias[rows]
        if not operation.ties:
            gone = operation.mixes.weight[0, rows][:, ~columns]
            bias = bias + gone @ self._constants[source].value[~columns]
            weight = weight[:, columns]
        if layer.bias is not None or bias.any():
            layer.bias = nn.Parameter(bias.to(weight.dtype))
        layer.weight = nn.Parameter(weight.clone())
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = weight.shape
        else:
            layer.out_channels, layer.in_channels = len(weight), int(columns.sum())
            layer.groups = layer.in_channels // weight.shape[1]


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


def _works_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.target in (operator.iadd, operator.isub, operator.imul):
        return True
    by_position = node.target in (F.relu, F.relu6) and node.args[1:] == (True,)
    name = str(getattr(node.target, "__name__", node.target))
    is_named_so = name.endswith("_") and not name.endswith("__")  # relu_, but not __getitem__
    return bool(node.kwargs.get("inplace", by_position)) or is_named_so


def _is_unlike_average(pool: nn.AvgPool2d) -> bool:
    """Tell whether an average of equal numbers may be another number."""
    return bool(pool.divisor_override) or (_is_padded(pool) and pool.count_include_pad)


def _only_zeros(source: _Constants) -> _Constants:
    known = source.known & (source.value == 0)
    return _Constants(known, source.value.where(known, 0))


def _norm_entries(norm: nn.Module) -> dict[str, Tensor]:
    names = ("weight", "bias", "running_mean", "running_var")
    return {name: getattr(norm, name) for name in names if getattr(norm, name) is not None}


def _normalized(norm: Any, source: _Constants) -> _Constants:
    entries = {name: tensor.double() for name, tensor in _norm_entries(norm).items()}
    mean, var = entries["running_mean"], entries["running_var"]
    weight = entries.get("weight", torch.ones_like(mean))
    value = (source.value - mean) / torch.sqrt(var + norm.eps) * weight
    known = source.known | (weight == 0)
    return _Constants(known, (value + entries.get("bias", 0)).where(known, 0))


def _cut_norm(norm: Any, keep: Tensor) -> None:
    for name, tensor in _norm_entries(norm).items():
        cut = tensor[keep].clone()
        setattr(norm, name, nn.Parameter(cut) if isinstance(tensor, nn.Parameter) else cut)
    norm.num_features = int(keep.sum())
