"""Cut a program of torch.export into parts that the runtime computes; the rest stays torch's.

A part reads one value and gives one, as the graphs of the runtime do. From every value the largest
such part is taken that multiplies by weights. A part without weights has little to compute, and its
values would have to be copied to the runtime and back.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from .aten import OPERATIONS
from .check import check, shapes_of
from .graph import KERNELS, Node
from .interpreter import BATCH_SIZE, LAYOUTS, Interpreter, is_tensor
from .network import size_check
from .views import View


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a program that the runtime computes."""

    entry: fx.Node
    """Whose value it reads."""
    exit: fx.Node
    """Whose value it gives."""
    inside: frozenset[fx.Node]
    """The operations that it replaces, the exit among them."""
    entry_layout: str
    exit_layout: str
    nodes: tuple[Node, ...]
    """The graph of the part."""


def cut(program: ExportedProgram, state: Mapping[str, Tensor]) -> list[Part]:
    """Return the parts of a program, in order; none of them overlap.

    Args:
        program: Exported for batches of any size. Its values become those of `BATCH_SIZE` images.
        state: Parameters, buffers and constants of the program.
    """
    layouts = _fix_batch(program)
    made = Interpreter(program, OPERATIONS)
    parts: list[Part] = []
    taken = set[fx.Node]()
    for entry in program.graph.nodes:
        while not taken.issuperset(entry.users):
            inner = taken - {part.exit for part in parts}
            found = None if entry in inner else _largest(made, state, entry, layouts, taken)
            if found is None:
                break
            parts.append(found)
            taken |= found.inside
    return parts


def _fix_batch(program: ExportedProgram) -> dict[fx.Node, list[str]]:
    """Let all values be those of `BATCH_SIZE` images; return the layouts that each may have."""
    (name,) = program.graph_signature.user_inputs
    (images,) = (node for node in program.graph.nodes if node.name == name)
    batch = str(images.meta["val"].shape[0])
    layouts: dict[fx.Node, list[str]] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            sizes = [str(size) for size in value.shape]
            free = [axis for axis, size in enumerate(sizes) if not size.isdigit()]
            layouts[node] = [
                layout
                for layout, axes in LAYOUTS.items()
                if len(axes) == len(sizes) and free == [axes[0]] and sizes[axes[0]] == batch
            ]
    for node in program.graph.nodes:
        node.meta["val"] = tree_map(_fixed, node.meta.get("val"))
    return layouts


def _fixed(value: Any) -> Any:
    """Return a value that depends on the size of the batch as one of a known size."""
    if isinstance(value, torch.SymInt):
        return value.node.hint
    if isinstance(value, Tensor):
        shape = [_fixed(size) for size in value.shape]
        return torch.empty(shape, dtype=value.dtype, device="meta")
    return value


def _largest(
    made: Interpreter,
    state: Mapping[str, Tensor],
    entry: fx.Node,
    layouts: Mapping[fx.Node, list[str]],
    taken: Collection[fx.Node],
) -> Part | None:
    """Return the largest part that reads a value; None if there is none."""
    candidates = [
        part for layout in layouts.get(entry, ()) for part in _parts(made, entry, layout, taken)
    ]
    candidates.sort(key=lambda part: len(part.nodes), reverse=True)  # the first of equals
    shape = entry.meta["val"].shape if candidates else ()
    return next((part for part in candidates if _runs(part, state, shape)), None)


def _parts(
    made: Interpreter, entry: fx.Node, layout: str, taken: Collection[fx.Node]
) -> Iterator[Part]:
    """Return the parts that read a value in a layout, with one for every value that they can give.

    Nobody else reads the other values of a part.
    """
    reached = made.reach(entry, layout, taken)
    inside: dict[fx.Node, frozenset[fx.Node]] = {entry: frozenset()}
    for node, value in reached.items():
        inside[node] = frozenset({node}).union(
            *(inside[source] for source in node.all_input_nodes if source in inside)
        )
        shown = made.layout(node, value) if isinstance(value, View) else None
        others = inside[node] - {node}
        if shown is None or not all(inside[node].issuperset(other.users) for other in others):
            continue
        nodes = made.graph(made.whole(node, value).name)
        if any(n.op in KERNELS for n in nodes):
            yield Part(
                entry=entry,
                exit=node,
                inside=inside[node],
                entry_layout=layout,
                exit_layout=shown,
                nodes=tuple(nodes),
            )


def _runs(part: Part, state: Mapping[str, Tensor], shape: tuple[int, ...]) -> bool:
    """Tell whether a part is a graph that obeys all rules of the runtime."""
    _, channels, *pixels = (shape[axis] for axis in LAYOUTS[part.entry_layout])
    height, width = (1, 1, *pixels)[-2:]
    try:
        check(part.nodes)
        size_check(part.nodes, shapes_of(state), channels)(height, width)
    except ValueError:
        return False
    return True


def constants(program: ExportedProgram, state: Mapping[str, Tensor]) -> dict[fx.Node, Any]:
    """Return the values that do not depend on the images: weights, masks of attention."""
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    found: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            found[node] = state[names[node.name]]
        elif _is_computed(node) and found.keys() >= set(node.all_input_nodes):
            found[node] = _call(node, found.__getitem__)
    return found


def _is_computed(node: fx.Node) -> bool:
    """Tell whether a node gives the same value for the same inputs."""
    is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.op == "call_function" and not is_random


@torch.no_grad()
def _call(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    arguments, keywords = fx.map_arg((node.args, node.kwargs), value_of)
    function: Any = node.target
    return function(*arguments, **keywords)


def multiply_adds(program: ExportedProgram) -> dict[fx.Node, int]:
    """Return the multiply-adds of each operation for one image, after `cut`.

    Those of weights and of products of two activations are counted; sums, normalization and the
    like are not.
    """
    found = dict[fx.Node, int]()
    with FlopCounterMode(display=False) as counter:
        for node in program.graph.nodes:
            if node.op == "call_function" and "device" not in node.kwargs and is_tensor(node):
                before = counter.get_total_flops()
                _call(node, lambda source: source.meta["val"])
                found[node] = (counter.get_total_flops() - before) // 2 // BATCH_SIZE
    return found
