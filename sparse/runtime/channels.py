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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .channel_operations import BATCH_NORM, Constants, Operation, Operations, norm_entries
from .tracing import symbolic_trace


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


class _Compaction:
    """Finds the channels that a traced model needs, and cuts the others off its modules."""

    def __init__(self, traced: fx.GraphModule, shapes: dict[fx.Node, torch.Size]) -> None:
        self._graph = traced.graph
        self._modules = dict(traced.named_modules())
        self._shapes = {node: s for node, s in shapes.items() if len(s) >= 2}
        known = Operations(traced, self._shapes)
        self._operations: dict[fx.Node, Operation | None] = {}
        self._constants: dict[fx.Node, Constants] = {}
        self._keep = {
            node: torch.zeros(shape[1], dtype=torch.bool, device="cpu")
            for node, shape in self._shapes.items()
        }
        self._find_constants(known)

    def apply(self) -> None:
        self._settle()
        for keep in self._keep.values():
            if not keep.any():
                keep[0] = True  # torch and ONNX have no convolution without channels
                self._settle()
        for node, operation in self._operations.items():
            if operation is not None and operation.mixes is not None:
                self._cut(node, operation)
            elif operation is not None and isinstance(operation.module, BATCH_NORM):
                _cut_norm(operation.module, self._keep[node])

    def _find_constants(self, known: Operations) -> None:
        for node in self._graph.nodes:
            self._follow_overwritten(node)
            operation = self._operations[node] = known.of(node)
            if operation is not None:
                sources = [self._constants[source] for source in node.all_input_nodes]
                self._constants[node] = operation.constants(*sources)
            elif node in self._shapes:
                channels = self._shapes[node][1]
                nothing = torch.zeros(channels, dtype=torch.bool, device="cpu")
                self._constants[node] = Constants(nothing, nothing.double())

    def _follow_overwritten(self, node: fx.Node) -> None:
        """Let those who read a value after it was overwritten read what overwrote it."""
        if not _works_in_place(node, self._modules) or not node.all_input_nodes:
            return
        old = node.all_input_nodes[0]
        for user in list(old.users):
            if user is not node and node < user:
                user.replace_input_with(old, node)

    def _settle(self) -> None:
        """Let every node keep what it needs of its sources, until nothing changes."""
        before = -1
        while before < (now := sum(int(keep.sum()) for keep in self._keep.values())):
            before = now
            for node in reversed(self._graph.nodes):
                self._demand(node, self._operations[node])

    def _demand(self, node: fx.Node, operation: Operation | None) -> None:
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

    def _cut(self, node: fx.Node, operation: Operation) -> None:
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


def _works_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.target in (operator.iadd, operator.isub, operator.imul):
        return True
    by_position = node.target in (F.relu, F.relu6) and node.args[1:] == (True,)
    name = str(getattr(node.target, "__name__", node.target))
    is_named_so = name.endswith("_") and not name.endswith("__")  # relu_, but not __getitem__
    return bool(node.kwargs.get("inplace", by_position)) or is_named_so


def _cut_norm(norm: Any, keep: Tensor) -> None:
    for name, tensor in norm_entries(norm).items():
        cut = tensor[keep].clone()
        setattr(norm, name, nn.Parameter(cut) if isinstance(tensor, nn.Parameter) else cut)
    norm.num_features = int(keep.sum())
