"""Trace a model to its graph with torch.export, where torch.fx cannot follow: transformers.

torch.export records what the model computes for images of one size. Reshapes and transpositions
are followed as views (views.py), so that nn.MultiheadAttention and the attention of timm become
the same node.
"""

import contextlib
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from .graph import INPUT, Node
from .layout import out_size
from .views import BATCH, CHANNELS, PIXELS, REPEATED, WEIGHT, Dim, Part, View, axis_of, merged

BATCH_SIZE = 2
ODD = 33  # pixels that other images have more, to see what depends on their size
aten = torch.ops.aten


class UnknownOperationError(ValueError):
    """The runtime does not know an operation. The message is one line that names it.

    Of torch.export it names the module, too.
    """


def export(model: nn.Module, in_channels: int, image_size: int) -> ExportedProgram:
    """Return what a model, which is in evaluation mode, computes for images of a size.

    Raises:
        ValueError: torch.export cannot trace the model; one line.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    images = torch.zeros(BATCH_SIZE, in_channels, image_size, image_size, device=device)
    with warnings.catch_warnings(), _default_precision():
        warnings.simplefilter("ignore")  # of the exporter's own dependencies
        try:
            program: ExportedProgram = torch.export.export(model, (images,))
            program = program.run_decompositions({})  # without operations that work in place
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{type(model).__name__} cannot be exported: {reason}") from error
    return program


@contextlib.contextmanager
def _default_precision() -> Iterator[None]:
    """Set what float32 means in cuDNN as in a new process.

    torch's exporter fails where a training has set it to "ieee". It computes nothing, so the
    setting does not matter to it.
    """
    cudnn: Any = torch.backends.cudnn
    parts = (cudnn.conv, cudnn.rnn)
    before = [part.fp32_precision for part in parts]
    for part in parts:
        part.fp32_precision = "tf32"
    try:
        yield
    finally:
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


def trace(model: nn.Module, image_size: int) -> list[Node]:
    """Return the graph that a model computes for images of a size.

    If the model does something else with images of an odd size, or cannot take them, the graph
    takes images of the given size only.

    Raises:
        UnknownOperationError: Names the operation that the runtime does not have, and its module.
        ValueError: torch.export cannot trace the model, or the operation is outside of any module.
    """
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    in_channels = 3 if first is None else first.in_channels
    nodes = _Interpreter(export(model, in_channels, image_size)).nodes()
    if any(node.size != (0, 0) for node in nodes):
        return nodes
    try:
        is_free = nodes == _Interpreter(export(model, in_channels, image_size + ODD)).nodes()
    except ValueError:
        is_free = False
    if is_free:
        return nodes
    size = (image_size, image_size)
    return [replace(node, size=size) if INPUT in node.inputs else node for node in nodes]


class _Interpreter:
    """Turns the operations of an exported program into nodes of graph.py."""

    def __init__(self, program: ExportedProgram) -> None:
        self._graph = program.graph
        signature = program.graph_signature
        self._entries: Mapping[str, str] = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
        }
        self._nodes: list[Node] = []
        self._values: dict[fx.Node, Any] = {}
        self._channels: dict[str, int] = {}
        self._sizes: dict[str, tuple[int, int] | None] = {}
        """Height and width of each value; None for a vector."""

    def nodes(self) -> list[Node]:
        for node in self._graph.nodes:
            if node.op == "placeholder":
                self._values[node] = self._placeholder(node)
            elif node.op == "output":
                return self._computed(node)
            else:
                self._values[node] = self._call(node)
        raise AssertionError("a graph has an output")

    def _placeholder(self, node: fx.Node) -> View | None:
        shape = tuple(node.meta["val"].shape) if "val" in node.meta else ()
        if node.name in self._entries:
            whole = View(self._entries[node.name], (axis_of(WEIGHT, math.prod(shape)),))
            return whole.reshaped(shape)
        if len(shape) != 4:
            return None  # a constant: whoever reads it is unknown
        return self._value(INPUT, shape[1], shape[2:])

    def _value(self, name: str, channels: int, size: Sequence[int] | None) -> View:
        """Return the plain view (N, C, H, W) or (N, C) of a new value."""
        self._channels[name] = channels
        self._sizes[name] = None if size is None else (size[0], size[1])
        dims = [axis_of(BATCH, BATCH_SIZE), axis_of(CHANNELS, channels)]
        if size is not None:
            dims += [merged([Part(PIXELS, size[0], size[1])]), axis_of(PIXELS, size[1])]
        return View(name, tuple(dims))

    def _computed(self, node: fx.Node) -> list[Node]:
        outputs: Any = node.args[0]
        if not isinstance(outputs, Sequence) or len(outputs) != 1:
            raise ValueError("a model with more than one output cannot be exported")
        found = self._read(node, self._values.get(outputs[0]))
        size = self._sizes[found.name]
        if found.dims != self._value(found.name, self._channels[found.name], size).dims:
            raise ValueError("the runtime gives logits (N, K) or maps (N, C, H, W) only")
        needed = {found.name}
        for made in reversed(self._nodes):
            if made.name in needed:
                needed.update(made.inputs)
        return [made for made in self._nodes if made.name in needed]

    def _call(self, node: fx.Node) -> Any:
        known = _OPERATIONS.get(node.target)
        try:
            if known is None:
                raise _unknown(node)
            return known(self, node)
        except ValueError as error:
            if not any(self._depends(source) for source in node.all_input_nodes):
                return None  # a constant: whoever reads it is unknown
            if isinstance(error, UnknownOperationError):
                raise
            raise _unknown(node, str(error)) from error

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

    def view_of(self, node: fx.Node, source: Any) -> View:
        found = self._values.get(source)
        if isinstance(found, View):
            return found
        raise _unknown(node)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(node.meta["val"].shape)

    def read(self, node: fx.Node, index: int = 0) -> View:
        """Return a view that an operation reads, of a whole value."""
        return self._read(node, self.view(node, index))

    def _read(self, node: fx.Node, view: Any) -> View:
        if not isinstance(view, View) or view.is_weight:
            raise _unknown(node)
        found: View = view
        size = self._sizes[found.name]
        if size is not None and not found.parts(PIXELS) and size != (1, 1):
            found = self._pixel(found)
            size = None
        wanted = {BATCH: BATCH_SIZE, CHANNELS: self._channels[found.name]}
        wanted[PIXELS] = 1 if size is None else size[0] * size[1]
        is_whole = all(found.parts(axis) == axis_of(axis, n) for axis, n in wanted.items())
        if not is_whole or found.channel or found.pixel or found.parts(REPEATED):
            raise _unknown(node, "it reads a part of the channels or pixels of a layer")
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

    def size_of(self, view: View) -> tuple[int, int] | None:
        return self._sizes[view.name]

    def channels_of(self, view: View) -> int:
        return self._channels[view.name]

    def is_plain(self, view: View) -> bool:
        """Tell whether a view is (N, C, H, W); a vector is one with height and width 1."""
        size = self._sizes[view.name] or (1, 1)
        channels = self._channels[view.name]
        plain = [axis_of(BATCH, BATCH_SIZE), axis_of(CHANNELS, channels)]
        plain += [merged([Part(PIXELS, size[0], size[1])]), axis_of(PIXELS, size[1])]
        return view.dims == tuple(plain)

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
        **values: Any,
    ) -> View:
        """Add a node to the graph; return its value as (N, C, H, W), or (N, C) without pixels."""
        inputs = tuple(view.name for view in sources)
        made = Node(name=node.name, op=op, inputs=inputs, **values)
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
        return replace(made, dims=sources[0].dims if dims is None else dims)

    def entry(self, node: fx.Node, index: int) -> str | None:
        """Return the name of the entry that an operation reads whole; None if it reads none."""
        if self.argument(node, index) is None:
            return None
        found = self.view(node, index)
        sizes = found.sizes()
        if (
            not found.is_weight
            or found.dims
            != replace(found, dims=(axis_of(WEIGHT, math.prod(sizes)),)).reshaped(sizes).dims
        ):
            raise _unknown(node)
        return found.name

    def prefix(self, node: fx.Node, entries: Mapping[int, str]) -> str:
        """Return what the names of the entries have before the given ends.

        Args:
            entries: Positions of arguments -> ends of the names; the first one is needed.
        """
        found = {end: name for i, end in entries.items() if (name := self.entry(node, i))}
        prefixes = {name.removesuffix(end) for end, name in found.items()}
        first = next(iter(entries.values()))
        if first not in found or len(prefixes) != 1:
            raise _unknown(node, f"its weights are not named {', '.join(entries.values())}")
        prefix = prefixes.pop()
        if any(name != prefix + end for end, name in found.items()):
            raise _unknown(node, f"its weights are not named {', '.join(entries.values())}")
        return prefix


def _unknown(node: fx.Node, reason: str = "") -> ValueError:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path, kind = stack[-1] if stack else ("", "")
    name = str(node.target).rpartition(".")[0] or str(node.target)
    what = f"({name}{': ' + reason if reason else ''})"
    if not path:
        return ValueError(f"the runtime does not know {what}")
    kind = getattr(kind, "__name__", str(kind).rpartition(".")[2])
    return UnknownOperationError(f"the runtime does not know {path}: {kind} {what}")


_WEIGHTS = {1: "weight", 2: "bias"}
Handler = Callable[[_Interpreter, fx.Node], Any]


def _same(made: _Interpreter, node: fx.Node) -> View:
    return made.view(node)


def _reshape(made: _Interpreter, node: fx.Node) -> View:
    return made.view(node).reshaped(made.shape(node))


def _permute(made: _Interpreter, node: fx.Node) -> View:
    view, order = made.view(node), made.argument(node, 1, "dims")
    return view.permuted([i % len(view.dims) for i in order])


def _transpose(made: _Interpreter, node: fx.Node) -> View:
    view = made.view(node)
    order = list(range(len(view.dims)))
    a, b = (made.argument(node, i) % len(order) for i in (1, 2))
    order[a], order[b] = b, a
    return view.permuted(order)


def _expand(made: _Interpreter, node: fx.Node) -> View:
    return made.view(node).expanded(made.shape(node))


def _select(made: _Interpreter, node: fx.Node) -> View:
    view = made.view(node)
    dim = made.argument(node, 1, "dim") % len(view.dims)
    index = made.argument(node, 2, "index") % view.sizes()[dim]
    return view.taken(dim, index, index + 1).reshaped(made.shape(node))


def _slice(made: _Interpreter, node: fx.Node) -> View:
    view = made.view(node)
    dim = made.argument(node, 1, "dim", 0) % len(view.dims)
    size = view.sizes()[dim]
    if made.argument(node, 4, "step", 1) != 1:
        raise ValueError("it takes other parts than ranges of channels or pixels")
    begin, end, _ = slice(made.argument(node, 2, "start"), made.argument(node, 3, "end")).indices(
        size
    )
    return view.taken(dim, begin, end)


def _cut(made: _Interpreter, node: fx.Node) -> list[View]:
    """Return the views of split, chunk and unbind."""
    view = made.view(node)
    shapes = [tuple(value.shape) for value in node.meta["val"]]
    is_unbound = len(shapes[0]) < len(view.dims)
    dim = made.argument(node, 1 if is_unbound else 2, "dim", 0) % len(view.dims)
    found, begin = [], 0
    for shape in shapes:
        end = begin + (1 if is_unbound else shape[dim])
        found.append(view.taken(dim, begin, end).reshaped(shape))
        begin = end
    return found


def _item(made: _Interpreter, node: fx.Node) -> Any:
    views: Any = made._values.get(made.argument(node, 0))
    if not isinstance(views, list):
        raise _unknown(node)
    return views[made.argument(node, 1)]


def _linear(made: _Interpreter, node: fx.Node) -> View:
    view = made.read(node)
    pixels = made.size_of(view)
    channels = made.shape(node)[-1]
    prefix = made.prefix(node, _WEIGHTS)
    if made.ends_with_channels(view):
        dims = (*view.dims[:-1], axis_of(CHANNELS, channels))
        op = "linear" if pixels is None else "pixel_linear"
        return made.add_alike(node, op, view, channels=channels, dims=dims, parameters=prefix)
    if pixels is None or view.dims != made.flat(view):
        raise ValueError("it mixes pixels")
    return made.add(node, "linear", view, channels=channels, parameters=prefix)


def _layer_norm(made: _Interpreter, node: fx.Node) -> View:
    view = made.read(node)
    if len(made.argument(node, 1)) != 1 or not made.ends_with_channels(view):
        raise ValueError("it normalizes other numbers than the channels of a pixel")
    weights = {2: "weight", 3: "bias"}
    eps = made.argument(node, 4, "eps", 1e-5)
    return made.add_alike(node, "layer_norm", view, parameters=made.prefix(node, weights), eps=eps)


def _attention(made: _Interpreter, node: fx.Node) -> View:
    views = [made.view(node, i) for i in range(3)]
    query = views[0]
    heads, width = query.sizes()[1], query.sizes()[3]
    size, channels = made.size_of(query), heads * width
    options = [made.argument(node, i, name) for i, name in enumerate(_ATTENTION, 3)]
    if any(options[:3]) or options[4]:
        raise ValueError("it has a mask, dropout, an order of tokens or groups of heads")
    dims = None
    if size is not None:
        tokens = axis_of(PIXELS, size[0] * size[1])
        split = merged([Part(CHANNELS, heads, width)]), tokens, axis_of(CHANNELS, width)
        dims = (axis_of(BATCH, BATCH_SIZE), *split)
    wanted = [View(query.name, dims or (), i * channels) for i in range(3)]
    if dims is None or views != wanted or made.channels_of(query) != 3 * channels:
        raise ValueError("its queries, keys and values are not the thirds of one layer")
    scale = options[3]
    values = {"heads": heads, "score_scale": width**-0.5 if scale is None else float(scale)}
    found = made.add(node, "attention", query, channels=channels, pixels=size, **values)
    return replace(found, dims=dims)


_ATTENTION = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def _multiply(made: _Interpreter, node: fx.Node) -> View:
    views = [made.view(node, i) for i in (0, 1)]
    if not any(view.is_weight for view in views):
        return _excite(made, node)
    weight, value = sorted(views, key=lambda view: not view.is_weight)
    value = made._read(node, value)
    _expect(weight, value, {CHANNELS: Part(WEIGHT, made.channels_of(value), 1)})
    if made.size_of(value) is None:
        raise ValueError("it scales a vector")
    return made.add_alike(node, "scale", value, parameters=weight.name)


def _excite(made: _Interpreter, node: fx.Node) -> View:
    """Multiply each channel of a map by an element of a vector, as in squeeze-and-excitation."""
    views = [made.read(node, i) for i in (0, 1)]
    factor, value = sorted(views, key=lambda view: made.size_of(view) is not None)
    if made.size_of(factor) is not None or made.size_of(value) is None:
        raise ValueError("it multiplies two maps or two vectors")
    if not made.is_plain(value) or not made.is_plain(factor):
        raise ValueError("it reads no map (N, C, H, W)")
    return made.add_alike(node, "mul", value, factor)


def _sum(made: _Interpreter, node: fx.Node) -> View:
    views = [made.view(node, i) for i in (0, 1)]
    if made.argument(node, 2, "alpha", 1) != 1:
        raise ValueError("it has an alpha")
    if any(view.is_weight for view in views):
        weight, value = sorted(views, key=lambda view: not view.is_weight)
        value = made._read(node, value)
        size, channels = made.size_of(value), made.channels_of(value)
        if size is None:
            raise ValueError("it adds weights to a vector")
        wanted = Part(PIXELS, size[0] * size[1], 1)
        by_axis = {CHANNELS: Part(WEIGHT, channels, 1)}
        by_axis[PIXELS] = Part(WEIGHT, wanted.size, channels)
        _expect(weight, value, by_axis)
        return made.add_alike(node, "embedding", value, parameters=weight.name, size=size)
    first, second = (made.read(node, i) for i in (0, 1))
    if first.dims != second.dims or made.size_of(first) != made.size_of(second):
        raise ValueError("it adds values of different shapes")
    return made.add_alike(node, "add", first, second)


def _expect(weight: View, value: View, by_axis: Mapping[str, Part]) -> None:
    """Check that a weight has numbers for whole axes of a value, and is the same along others."""
    missing = len(value.dims) - len(weight.dims)
    own = [*[()] * missing, *weight.dims]
    for dim, numbers in zip(value.dims, own, strict=True):
        wanted: Dim = ()
        if len(dim) == 1 and dim[0].axis in by_axis:
            wanted = merged([by_axis[dim[0].axis]])
        if numbers != wanted:
            raise ValueError("the order of its weights is not known")


def _join(made: _Interpreter, node: fx.Node, views: Sequence[View]) -> View:
    """Return maps with their channels joined."""
    maps = [made._read(node, view) for view in views]
    sizes = {made.size_of(view) for view in maps}
    are_maps = all(made.is_plain(view) for view in maps) and None not in sizes
    if not are_maps or len(sizes) > 1 or made.argument(node, 1, "dim", 0) not in (1, -3):
        raise ValueError("it joins other values than the channels of maps")
    shape = made.shape(node)
    return made.add(node, "concat", *maps, channels=shape[1], pixels=shape[2:])


def _concatenate(made: _Interpreter, node: fx.Node) -> View:
    sources: Any = node.args[0]
    *tokens, last = views = [made.view_of(node, source) for source in sources]
    if not tokens:
        return last
    if not any(view.is_weight for view in views):
        return _join(made, node, views)
    if not all(view.is_weight for view in tokens) or last.is_weight:
        raise ValueError("it concatenates other values than tokens before a map")
    value = made._read(node, last)
    channels = made.channels_of(value)
    order = (axis_of(BATCH, BATCH_SIZE), (), axis_of(CHANNELS, channels))
    for i, weight in reversed(list(enumerate(tokens))):
        size = made.size_of(value)
        pixels = () if size is None else axis_of(PIXELS, size[0] * size[1])
        if size is None or value.dims != (order[0], pixels, order[2]):
            raise ValueError("it concatenates other values than tokens before a map")
        count = weight.sizes()[1]
        repeated = (Part(REPEATED, BATCH_SIZE, 0),)
        rows = merged([Part(WEIGHT, count, channels)]), merged([Part(WEIGHT, channels, 1)])
        if weight.dims != (repeated, *rows) or made.argument(node, 1, "dim", 0) not in (1, -2):
            raise ValueError("it concatenates other values than tokens before a map")
        total = count + size[0] * size[1]
        made._nodes.append(
            Node(
                name=node.name if i == 0 else f"{node.name}_{i}",
                op="prepend",
                inputs=(value.name,),
                parameters=weight.name,
                size=size,
                tokens=count,
            )
        )
        value = made._value(made._nodes[-1].name, channels, (1, total))
        value = value.permuted([0, 3, 1, 2]).reshaped([BATCH_SIZE, total, channels])
    return value


def _convolve(made: _Interpreter, node: fx.Node) -> View:
    view = made.read(node)
    if not made.is_plain(view):
        raise ValueError("it reads no map (N, C, H, W)")
    stride, padding, dilation, groups = (made.argument(node, i, n, d) for i, n, d in _CONVOLUTION)
    kernel: Any = made.argument(node, 1)
    shape = made.shape(node)
    is_map = made.size_of(view) is not None
    found = made.add(
        node,
        "conv",
        view,
        channels=shape[1],
        pixels=shape[2:] if is_map else None,
        parameters=made.prefix(node, _WEIGHTS),
        kernel=tuple(made.shape(kernel)[2:]),
        stride=_pair(stride),
        padding=_pair(padding),
        dilation=_pair(dilation),
        groups=groups,
    )
    return found if is_map else replace(found, dims=(*found.dims, (), ()))


_CONVOLUTION = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1), (6, "groups", 1))


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    pair = [value] if isinstance(value, int) else list(value)
    return pair[0], pair[-1]


def _batch_norm(made: _Interpreter, node: fx.Node) -> View:
    view = made.read(node)
    if not made.is_plain(view):
        raise ValueError("it reads no map (N, C, H, W)")
    entries = {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"}
    eps = node.args[_EPS[node.target]]
    return made.add_alike(node, "batch_norm", view, parameters=made.prefix(node, entries), eps=eps)


_EPS: dict[Any, int] = {
    aten.batch_norm.default: 7,
    aten._native_batch_norm_legit_no_training.default: 6,
}


def _first_of(handler: Handler) -> Handler:
    """Return the handler of an operation that returns several values, of which one is used."""
    return lambda made, node: [handler(made, node)]


def _mean(made: _Interpreter, node: fx.Node) -> View:
    view = made.read(node)
    size = made.size_of(view)
    axes = {i % len(view.dims) for i in made.argument(node, 1, "dim")}
    left = [dim for i, dim in enumerate(view.dims) if i not in axes]
    seen = [part.axis for i in axes for part in view.dims[i]]
    if (
        size is None
        or any(axis != PIXELS for axis in seen)
        or any(part.axis == PIXELS for dim in left for part in dim)
    ):
        raise ValueError("it averages other numbers than the pixels of a map")
    made.add(node, "mean_pool", view)
    dims = [() if i in axes else dim for i, dim in enumerate(view.dims)]
    if not made.argument(node, 2, "keepdim", False):
        dims = left
    return View(node.name, tuple(dims))


def _adaptive_pool(made: _Interpreter, node: fx.Node) -> View:
    view, size = made.read(node), made.shape(node)[2:]
    if not made.is_plain(view) or made.size_of(view) is None:
        raise ValueError("it reads no map (N, C, H, W)")
    if size != (1, 1):
        return made.add(node, "adaptive_avg_pool", view, pixels=size, output=size)
    made.add(node, "mean_pool", view)
    return View(node.name, (*view.dims[:2], (), ()))


def _pool(made: _Interpreter, node: fx.Node) -> View:
    view = made.read(node)
    if not made.is_plain(view) or made.size_of(view) is None:
        raise ValueError("it reads no map (N, C, H, W)")
    kernel = _pair(made.argument(node, 1))
    stride, padding = (made.argument(node, i, n) for i, n in ((2, "stride"), (3, "padding")))
    values: dict[str, Any] = {"kernel": kernel, "stride": _pair(stride) if stride else kernel}
    values["padding"] = _pair(padding) if padding else (0, 0)
    op = "max_pool"
    if node.target is aten.max_pool2d.default:
        if set(_pair(made.argument(node, 4, "dilation", 1))) != {1}:
            raise ValueError("it has a dilation")
        values["ceil_mode"] = bool(made.argument(node, 5, "ceil_mode", False))
    else:
        op = "avg_pool"
        ceil_mode, counts_pad, divisor = (
            made.argument(node, i, n, d) for i, n, d in _AVERAGE_OPTIONS
        )
        if divisor or (not counts_pad and values["padding"] != (0, 0)):
            raise ValueError("average-pooling with options")
        sides = zip(
            made.size_of(view) or (), kernel, values["stride"], values["padding"], strict=True
        )
        if ceil_mode and tuple(out_size(*side, 1) for side in sides) != made.shape(node)[2:]:
            raise ValueError("its last window reaches beyond the image")
    return made.add(node, op, view, pixels=made.shape(node)[2:], **values)


_AVERAGE_OPTIONS = (
    (4, "ceil_mode", False),
    (5, "count_include_pad", True),
    (6, "divisor_override", None),
)


def _activation(op: str) -> Handler:
    return lambda made, node: made.add_alike(node, op, made.read(node))


def _clamp(made: _Interpreter, node: fx.Node) -> View:
    """Add a ReLU6, which torch.export writes so."""
    if [made.argument(node, i, n, d) for i, n, d in _CLAMP] != [0, 6]:
        raise ValueError("its limits are others than 0 and 6")
    return made.add_alike(node, "relu6", made.read(node))


_CLAMP = ((1, "min_val", -1), (2, "max_val", 1))


def _gelu(made: _Interpreter, node: fx.Node) -> View:
    is_tanh = node.kwargs.get("approximate", "none") == "tanh"
    return made.add_alike(node, "gelu_tanh" if is_tanh else "gelu", made.read(node))


def _operations() -> dict[Any, Handler]:
    known: dict[Any, Handler] = dict.fromkeys(_SAME, _same)
    known |= dict.fromkeys(_RESHAPES, _reshape)
    known |= dict.fromkeys(_CUTS, _cut)
    known |= {function: _activation(name) for name, function in _ACTIVATIONS.items()}
    return known | {
        aten.permute.default: _permute,
        aten.transpose.int: _transpose,
        aten.expand.default: _expand,
        aten.select.int: _select,
        aten.slice.Tensor: _slice,
        operator.getitem: _item,
        aten.linear.default: _linear,
        aten.layer_norm.default: _layer_norm,
        aten.scaled_dot_product_attention.default: _attention,
        aten.mul.Tensor: _multiply,
        aten.add.Tensor: _sum,
        aten.cat.default: _concatenate,
        aten.conv2d.default: _convolve,
        aten.batch_norm.default: _batch_norm,
        aten._native_batch_norm_legit_no_training.default: _first_of(_batch_norm),
        aten.mean.dim: _mean,
        aten.adaptive_avg_pool2d.default: _adaptive_pool,
        aten.max_pool2d.default: _pool,
        aten.avg_pool2d.default: _pool,
        aten.gelu.default: _gelu,
        aten.hardtanh.default: _clamp,
    }


_SAME = (
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
)
_RESHAPES = (
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.view.default,
    aten._unsafe_view.default,
)
_CUTS = (
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
)
_ACTIVATIONS: dict[str, Any] = {
    "relu": aten.relu.default,
    "relu6": aten.relu6.default,
    "silu": aten.silu.default,
    "hardswish": aten.hardswish.default,
    "hardsigmoid": aten.hardsigmoid.default,
    "sigmoid": aten.sigmoid.default,
}
_OPERATIONS = _operations()
