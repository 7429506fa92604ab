"""Trace a model to its graph. Errors name what the runtime cannot compute.

torch.fx traces convolutional networks, for images of any size. torch.export (exported.py) traces
those which torch.fx cannot follow, or which have operations that are not known here.
"""

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from . import exported
from .check import check, check_shapes, shapes_of
from .check import in_channels as channels_of
from .graph import INPUT, Node, gelu, needed, pair, tensors
from .interpreter import SEVERAL_OUTPUTS, ExportError, UnknownOperationError

REMEDY = "; sparse.runtime.hybrid, or classify.py --fallback torch, runs such parts in torch"
"""What the refusal of a network ends with, if torch.export might trace the network."""


def trace(model: nn.Module, *, image_size: int = 224, in_channels: int | None = None) -> list[Node]:
    """Return the graph that a classifier computes in evaluation.

    docs/runtime.md lists what the runtime knows. Layers that do nothing in evaluation (dropout,
    stochastic depth, identity) are left out.

    Args:
        model: Maps images (N, C, H, W) to logits (N, K); on any device, "meta" included.
        image_size: Side of the images for which torch.export traces the model if torch.fx cannot.
        in_channels: Channels of these images; by default those of the first convolution, or 3.

    Raises:
        ValueError: The model has another operation, or one that depends on the data.
    """
    try:
        with evaluation(model):
            nodes = _nodes(model, image_size, exported.image_channels(model, in_channels))
        check(nodes)
        shapes = shapes_of(tensors(model.state_dict()))
        check_shapes(nodes, shapes, in_channels=channels_of(nodes, shapes), folded=False)
    except ExportError:
        raise
    except ValueError as error:
        raise type(error)(f"{error}{REMEDY}") from error
    return nodes


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation for a while."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _nodes(model: nn.Module, image_size: int, in_channels: int) -> list[Node]:
    try:
        traced = symbolic_trace(model)
        return _Tracer(dict(traced.named_modules())).convert(traced.graph)
    except UnknownOperationError as unknown:
        try:
            return exported.trace(model, image_size, in_channels)
        except UnknownOperationError:
            raise  # it names a module, where torch.fx stopped at a reshape, or earlier
        except ExportError:
            raise ExportError(str(unknown)) from None
        except ValueError:
            raise unknown from None


def symbolic_trace(model: nn.Module) -> fx.GraphModule:
    """Return the graph of a model as torch.fx sees it; its modules are those of the model.

    Raises:
        UnknownOperationError: The model has control flow that depends on the data, or the like; one
            line.
    """
    try:
        return fx.symbolic_trace(model)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UnknownOperationError(f"{type(model).__name__} cannot be traced: {reason}") from error


class _Form(Enum):
    """The shape of a value in torch."""

    MAP = "(N, C, H, W)"
    POOLED = "(N, C, 1, 1): averaged over the image"
    FLAT_MAP = "(N, C * H * W): a map that was flattened"
    VECTOR = "(N, C)"


class _Tracer:
    """Turns the nodes of torch.fx into nodes of graph.py.

    A graph has maps and vectors only. Whether what was pooled has been flattened, and where a map
    is, is known here alone: the graph's linear layers read either.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._names: dict[fx.Node, str] = {}
        self._forms: dict[fx.Node, _Form] = {}
        # The nodes whose values may share memory have the same node here, the first of them.
        self._memory: dict[fx.Node, fx.Node] = {}
        self._nodes: list[Node] = []
        # Sizes, groups of channels and the like: values of torch that are none of the runtime's
        self._parts: dict[fx.Node, tuple[Any, ...]] = {}

    def convert(self, graph: fx.Graph) -> list[Node]:
        for node in graph.nodes:
            if node.op == "placeholder":
                if self._names:  # torch.export leaves out those that have a default
                    raise UnknownOperationError(
                        "a model with more than one input cannot be exported"
                    )
                self._names[node], self._forms[node] = INPUT, _Form.MAP
                self._memory[node] = node
            elif node.op == "output":
                return self._computed(node.args[0])
            elif node.op == "call_module":
                self._module(node, self._modules[str(node.target)])
            else:
                self._call(node)
        raise ExportError("a model without output cannot be exported")

    def _computed(self, output: Any) -> list[Node]:
        """Return the nodes on which the output depends; the last one computes the output."""
        if not isinstance(output, fx.Node) or output not in self._forms:
            raise ExportError(SEVERAL_OUTPUTS)
        self._require(output, "the output of the network", _Form.MAP, _Form.VECTOR)
        return needed(self._nodes, self._names[output])

    def _require(self, source: fx.Node, reader: str, *forms: _Form) -> _Form:
        form = self._forms[source]
        if form in forms:
            return form
        if form is _Form.POOLED:
            raise ValueError(
                f"{source.name} keeps a height and a width of 1: flatten it, because {reader} "
                "cannot be computed with it"
            )
        raise ValueError(
            f"{reader} needs {' or '.join(f.value for f in forms)}, but {source.name} is "
            f"{form.value}"
        )

    def _operands(
        self, node: fx.Node, count: int = 1, keywords: Collection[str] = ()
    ) -> list[fx.Node]:
        """Return a node's first arguments, which are values; only some keywords are known."""
        operands = [*node.args[:count], *(node.kwargs[k] for k in ("input",) if k in node.kwargs)]
        found = [x for x in operands if isinstance(x, fx.Node) and x in self._forms]
        if len(found) != count or not {"input", "inplace", *keywords}.issuperset(node.kwargs):
            raise _unknown(node)
        return found

    def _add(
        self, node: fx.Node, op: str, inputs: Sequence[fx.Node], form: _Form, **values: Any
    ) -> None:
        names = tuple(self._names[source] for source in inputs)
        self._nodes.append(Node(name=node.name, op=op, inputs=names, **values))
        self._names[node], self._forms[node] = node.name, form
        self._memory[node] = node

    def _overwrite(self, node: fx.Node) -> None:
        """Let later readers of a node's first operand find the node's value: it works in place."""
        first = self._operands(node, len(node.all_input_nodes), node.kwargs)[0]
        memory, old, new = self._memory[first], self._names[first], self._names[node]
        for other in [key for key, value in self._memory.items() if value is memory]:
            if self._names[other] != old:
                raise ValueError(
                    f"{_place(node)} overwrites channels of which {other.name} consists, too"
                )
            self._names[other] = new
        self._memory[node] = memory

    def _skip(self, node: fx.Node, keywords: Collection[str] = ()) -> None:
        (source,) = self._operands(node, keywords=keywords)
        self._names[node], self._forms[node] = self._names[source], self._forms[source]
        self._memory[node] = self._memory[source]

    def _flatten(self, node: fx.Node) -> None:
        self._skip(node, ("start_dim", "end_dim"))
        if self._forms[node] is not _Form.FLAT_MAP:
            is_map = self._forms[node] is _Form.MAP
            self._forms[node] = _Form.FLAT_MAP if is_map else _Form.VECTOR

    def _activation(self, node: fx.Node, op: str, inplace: object = False) -> None:
        (source,) = self._operands(node, keywords=("approximate",))
        self._add(node, op, [source], self._forms[source])
        if inplace:
            self._overwrite(node)

    def _weighted(self, node: fx.Node, op: str, *forms: _Form, **values: Any) -> None:
        """Add an operation of a module with weights; its value has the form of what it reads."""
        (source,) = self._operands(node)
        form = self._require(source, str(node.target), *forms)
        self._add(node, op, [source], form, parameters=f"{node.target}.", **values)

    def _pool(self, node: fx.Node, op: str, window: Mapping[str, Any]) -> None:
        (source,) = self._operands(node, keywords=_POOL_ARGUMENTS)
        self._add(node, op, [source], self._require(source, node.name, _Form.MAP), **window)

    def _max_pool(self, node: fx.Node, pool: Mapping[str, Any]) -> None:
        if pair(pool["dilation"]) != (1, 1) or pool["return_indices"]:
            raise ValueError(f"{_place(node)}: max-pooling with dilation or return_indices")
        self._pool(node, "max_pool", {**_window(pool), "ceil_mode": bool(pool["ceil_mode"])})

    def _avg_pool(self, node: fx.Node, pool: Mapping[str, Any]) -> None:
        message = f"{_place(node)}: average-pooling with options"
        if pool["divisor_override"] or (pool["ceil_mode"] and pool["count_include_pad"]):
            raise ValueError(message)
        if not pool["count_include_pad"]:  # it may be a plain one for images of one size
            raise UnknownOperationError(message)
        self._pool(node, "avg_pool", _window(pool))

    def _adaptive_pool(self, node: fx.Node, size: Any) -> None:
        sizes = _integers(size)
        if len(sizes) == 1:
            sizes *= 2
        if len(sizes) != 2:
            raise _unknown(node)
        if sizes == (1, 1):
            self._mean(node, _Form.POOLED)
            return
        (source,) = self._operands(node, keywords=node.kwargs)
        self._require(source, node.name, _Form.MAP)
        self._add(node, "adaptive_avg_pool", [source], _Form.MAP, output=(sizes[0], sizes[1]))

    def _mean(self, node: fx.Node, form: _Form) -> None:
        (source,) = self._operands(node, keywords=node.kwargs)
        self._require(source, node.name, _Form.MAP)
        self._add(node, "mean_pool", [source], form)

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{node.target} is parametrized: torch.nn.utils.parametrize."
                "remove_parametrizations gives it plain weights"
            )
        if isinstance(module, nn.Conv2d):
            self._weighted(node, "conv", _Form.MAP, _Form.POOLED, **_convolution(module))
        elif isinstance(module, nn.BatchNorm2d):
            if not (module.affine and module.track_running_stats):
                raise ValueError(f"{node.target}: BatchNorm without scale or statistics")
            self._weighted(node, "batch_norm", _Form.MAP, _Form.POOLED, eps=module.eps)
        elif isinstance(module, nn.Linear):
            self._linear(node)
        elif isinstance(module, nn.GELU):
            self._activation(node, gelu(module.approximate))
        elif type(module) in _ACTIVATION_MODULES:
            inplace = getattr(module, "inplace", False)
            self._activation(node, _ACTIVATION_MODULES[type(module)], inplace)
        elif isinstance(module, nn.MaxPool2d):
            self._max_pool(node, vars(module))
        elif isinstance(module, nn.AvgPool2d):
            self._avg_pool(node, vars(module))
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            self._adaptive_pool(node, module.output_size)
        elif isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            self._flatten(node)
        elif isinstance(module, nn.ChannelShuffle):
            self._shuffle(node, module.groups)
        elif isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d):
            self._skip(node)
        else:
            raise UnknownOperationError(f"the runtime does not know {node.target}: {module}")

    def _linear(self, node: fx.Node) -> None:
        (source,) = self._operands(node)
        if self._forms[source] not in (_Form.VECTOR, _Form.FLAT_MAP):
            raise ValueError(
                f"the runtime has no linear layer of images that are not flattened ({node.target})"
            )
        self._weighted(node, "linear", _Form.VECTOR, _Form.FLAT_MAP)
        self._forms[node] = _Form.VECTOR

    def _call(self, node: fx.Node) -> None:
        function, rest = node.target, node.args[1:]
        if function in _SUMS and len(rest) == 1:
            self._sum(node)
        elif function in _PRODUCTS and len(rest) == 1:
            self._product(node)
        elif function in _ACTIVATION_FUNCTIONS:
            self._activation_function(node, _ACTIVATION_FUNCTIONS[function])
        elif function in (torch.cat, torch.concat):
            self._concat(node)
        elif function in (torch.flatten, "flatten"):
            if (*rest, *node.kwargs.values()) not in ((1,), (1, -1)):
                raise _unknown(node)
            self._flatten(node)
        elif function in (torch.mean, "mean"):
            self._mean_function(node)
        elif function in _POOL_FUNCTIONS:
            parameters, add = _POOL_FUNCTIONS[function]
            add(self, node, _arguments(node, parameters))
        elif function is F.adaptive_avg_pool2d:
            self._adaptive_pool(node, _arguments(node, {"output_size": None})["output_size"])
        elif function in (torch.channel_shuffle, F.channel_shuffle):
            self._shuffle(node, _arguments(node, {"groups": None})["groups"])
        elif _is_identity(node, self._forms):
            self._skip(node, node.kwargs)
        elif function in _REGROUPING and isinstance(next(iter(node.args), None), fx.Node):
            self._regroup(node)
        else:
            raise _unknown(node)

    def _sum(self, node: fx.Node) -> None:
        first, second = self._operands(node, 2)
        form = self._forms[first]
        self._require(second, node.name, form)
        self._add(node, "add", [first, second], form)
        if node.target in (operator.iadd, "add_"):
            self._overwrite(node)

    def _product(self, node: fx.Node) -> None:
        operands = self._operands(node, 2)
        if {self._forms[operand] for operand in operands} != {_Form.MAP, _Form.POOLED}:
            raise ValueError(
                f"the runtime multiplies maps only by what was averaged over the image, and not "
                f"as in {node.format_node()}{_inside(node)}"
            )
        self._add(node, "mul", operands, _Form.MAP)
        if node.target in (operator.imul, "mul_"):
            self._overwrite(node)

    def _concat(self, node: fx.Node) -> None:
        parts: Any = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if not isinstance(parts, list | tuple) or dim not in (1, -3) or not parts:
            raise _unknown(node)
        if not all(isinstance(part, fx.Node) and part in self._forms for part in parts):
            raise _unknown(node)
        for part in parts:
            self._require(part, node.name, _Form.MAP)
        if len(parts) == 1:
            self._names[node], self._forms[node] = self._names[parts[0]], _Form.MAP
            self._memory[node] = node
        else:
            self._add(node, "concat", parts, _Form.MAP)

    def _shuffle(self, node: fx.Node, groups: int) -> None:
        (source,) = self._operands(node, keywords=node.kwargs)
        form = self._require(source, node.name, _Form.MAP)
        if not _integers(groups):
            raise _unknown(node)
        self._add(node, "shuffle", [source], form, groups=groups)
        self._memory[node] = self._memory[source]  # if it moves nothing, torch does not copy

    def _regroup(self, node: fx.Node) -> None:
        """Follow what only regroups channels, step by step: chunks, and shuffles that use views."""
        source: Any = node.args[0]
        part = self._parts.get(source, ())
        arguments = (*node.args[1:], *node.kwargs.values())
        rest = tuple(self._parts.get(a, a) if isinstance(a, fx.Node) else a for a in arguments)
        function, kind = _REGROUPING[node.target], part[0] if part else ""
        if kind == "" and self._forms.get(source) is _Form.MAP:
            found = _part_of_map(function, source, rest)
        elif (function, kind) == ("getitem", "sizes"):
            found = ("size", rest[0], 1)
        elif (function, kind) == ("floordiv", "size"):
            found = ("size", part[1], rest[0])
        elif (function, kind, rest) == ("transpose", "groups", (1, 2)):
            found = ("shuffled", *part[1:])
        elif (function, kind) == ("contiguous", "shuffled"):
            found = part
        elif (function, kind) == ("getitem", "chunks") and _integers(rest[0]):
            found = ()
            self._add(node, "chunk", part[1:2], _Form.MAP, groups=part[2], index=rest[0])
            self._memory[node] = self._memory[part[1]]
        elif (function, kind) == ("view", "shuffled") and rest in (_SIZES, _SIZES_BUT_CHANNELS):
            found = ()
            self._add(node, "shuffle", part[1:2], _Form.MAP, groups=part[2])
            self._memory[node] = self._memory[part[1]]
        else:
            raise _unknown(node)
        if node not in self._forms and (not found or node.kwargs.keys() - {"dim"}):
            raise _unknown(node)
        self._parts[node] = found

    def _activation_function(self, node: fx.Node, op: str) -> None:
        arguments = _arguments(node, {"inplace": False, "approximate": "none"})
        inplace = arguments["inplace"] or str(node.target).endswith("_")
        self._activation(node, gelu(arguments["approximate"]) if op == "gelu" else op, inplace)

    def _mean_function(self, node: fx.Node) -> None:
        arguments = _arguments(node, {"dim": (), "keepdim": False})
        if sorted(_integers(arguments["dim"])) not in ([2, 3], [-2, -1]):
            raise _unknown(node)
        self._mean(node, _Form.POOLED if arguments["keepdim"] else _Form.VECTOR)


_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")

_SIZES = tuple(("size", axis, 1) for axis in range(4))
_SIZES_BUT_CHANNELS = (_SIZES[0], -1, *_SIZES[2:])
_REGROUPING: dict[Any, str] = {
    **dict.fromkeys((torch.chunk, "chunk"), "chunk"),
    **dict.fromkeys((torch.transpose, "transpose"), "transpose"),
    **dict.fromkeys(("view", "reshape"), "view"),
    "size": "size",
    getattr: "size",
    operator.getitem: "getitem",
    operator.floordiv: "floordiv",
    "contiguous": "contiguous",
}


def _part_of_map(function: str, source: fx.Node, rest: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what a regrouping function of a map gives; () if it is not known."""
    if function == "size" and rest in ((), ("shape",)):
        return ("sizes",)
    if function == "size" and len(rest) == 1 and _integers(rest[0]):
        return ("size", rest[0], 1)
    if function == "chunk" and len(rest) == 2 and rest[1] in (1, -3) and _integers(rest[0]):
        return ("chunks", source, rest[0])
    if function == "view" and len(rest) == 5:
        groups = rest[1]
        if _integers(groups) and rest == (_SIZES[0], groups, ("size", 1, groups), *_SIZES[2:]):
            return ("groups", source, groups)
    return ()


_ACTIVATION_MODULES = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}

_ACTIVATION_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, torch.relu, "relu", "relu_"), "relu"),
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.hardsigmoid: "hardsigmoid",
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_"), "sigmoid"),
    **dict.fromkeys((F.tanh, torch.tanh, "tanh", "tanh_"), "tanh"),
    F.gelu: "gelu",
}

_MAX_POOL: dict[str, Any] = {
    "kernel_size": None,
    "stride": None,
    "padding": 0,
    "dilation": 1,
    "ceil_mode": False,
    "return_indices": False,
}
_AVG_POOL: dict[str, Any] = {
    "kernel_size": None,
    "stride": None,
    "padding": 0,
    "ceil_mode": False,
    "count_include_pad": True,
    "divisor_override": None,
}
_POOL_ARGUMENTS = {*_MAX_POOL, *_AVG_POOL}
_POOL_FUNCTIONS: dict[Any, tuple[dict[str, Any], Callable[..., None]]] = {
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), (_MAX_POOL, _Tracer._max_pool)),
    F.avg_pool2d: (_AVG_POOL, _Tracer._avg_pool),
}


def _unknown(node: fx.Node) -> UnknownOperationError:
    return UnknownOperationError(f"the runtime does not know {node.format_node()}{_inside(node)}")


def _inside(node: fx.Node) -> str:
    """Return in which module a function is called, as text; '' for the model itself."""
    stack = node.meta.get("nn_module_stack")
    name = next(reversed(stack), "") if stack else ""
    return f" in module {name}" if name else ""


def _place(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else f"{node.name}{_inside(node)}"


def _arguments(node: fx.Node, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return a function's arguments after the first, by name; unknown ones are refused."""
    given = dict(zip(parameters, node.args[1:], strict=False))
    keywords = {name: value for name, value in node.kwargs.items() if name != "input"}
    if len(node.all_input_nodes) > 1:  # as of a window that depends on the size of the image
        raise _unknown(node)
    if len(node.args) > 1 + len(parameters) or not parameters.keys() >= keywords.keys():
        raise _unknown(node)
    return {**parameters, **given, **keywords}


def _is_identity(node: fx.Node, forms: Collection[fx.Node]) -> bool:
    """Tell whether a function does nothing in evaluation: dropout, or stochastic depth."""
    if node.target in (F.dropout, F.dropout2d):
        arguments = _arguments(node, {"p": 0.5, "training": True, "inplace": False})
        return arguments["training"] is False
    if node.target == "contiguous":
        return len(node.args) == 1 and not node.kwargs and node.args[0] in forms
    # torchvision is not imported here. Its stochastic_depth(input, p, mode, training) is opaque to
    # torch.fx.
    name = getattr(node.target, "__name__", "")
    arguments = (
        _arguments(node, {"p": 0, "mode": "", "training": True})
        if (name == "stochastic_depth")
        else {}
    )
    return arguments.get("training") is False


def _integers(value: Any) -> tuple[int, ...]:
    """Return an integer or a sequence of integers as a tuple; () for anything else."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values if all(type(v) is int for v in values) else ()


def _window(pool: Mapping[str, Any]) -> dict[str, Any]:
    stride = pool["kernel_size"] if pool["stride"] in (None, [], ()) else pool["stride"]
    return {
        "kernel": pair(pool["kernel_size"]),
        "stride": pair(stride),
        "padding": pair(pool["padding"]),
    }


def _convolution(module: nn.Conv2d) -> dict[str, Any]:
    padding = module.padding
    if isinstance(padding, str) or module.padding_mode != "zeros":
        raise ValueError(f"the runtime pads with numbers of zeros, not as in {module}")
    return {
        "kernel": pair(module.kernel_size),
        "stride": pair(module.stride),
        "padding": pair(padding),
        "dilation": pair(module.dilation),
        "groups": module.groups,
    }
