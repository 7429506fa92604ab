"""Networks of which the runtime knows a part, and torch computes the rest: `hybrid(model)`."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols
from torch.utils._pytree import tree_leaves

from ..native.library import check_level, cpu_level, default_cache
from . import bindings
from .check import shapes_of
from .exported import export, image_channels
from .graph import KERNELS, tensors
from .interpreter import LAYOUTS, is_tensor, operation, place
from .lower import lower
from .network import Engine, Images, classify, size_check
from .parts import Part, constants, cut, multiply_adds
from .tracing import evaluation
from .tune import Tuner

MAX_NAMES = 4
"""Of the operations of a module, in a report."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What torch computes of a network, and what share of the multiply-adds this is.

    Products of weights and those of two activations are counted, for one image.
    """

    parts: tuple[str, ...]
    """Modules with operations that run in torch: name, class, and the operations."""
    torch_macs: int
    """Multiply-adds of these operations. Torch multiplies by zeros, too."""
    native_macs: int
    """Multiply-adds of the operations that the runtime computes, if no weight were zero."""
    active_macs: int
    """The same without those of weights that are zero, which the runtime leaves out."""

    @property
    def share(self) -> float:
        """Share of torch in the multiply-adds of the dense network."""
        return self.torch_macs / max(1, self.torch_macs + self.native_macs)

    @property
    def active_share(self) -> float:
        """Share of torch in the multiply-adds that are computed."""
        return self.torch_macs / max(1, self.torch_macs + self.active_macs)

    def __str__(self) -> str:
        if not self.parts:
            return "torch runs no part of this network"
        head = (
            f"torch runs {self.share:.1%} of the multiply-adds ({self.active_share:.1%} of those "
            "that are left without the zero weights of the runtime's layers):"
        )
        return "\n  ".join([head, *self.parts])


class Hybrid:
    """A network that the runtime and torch compute together; made by `hybrid`.

    Several threads may call it at a time.

    Attributes:
        report: What torch computes.
        image_size: Side of the images that it takes.
    """

    def __init__(self, run: nn.Module, report: Report, *, in_channels: int, image_size: int):
        self._run, self.report = run, report
        self._in_channels, self.image_size = in_channels, image_size

    def __call__(self, images: Images) -> Any:
        """Return the logits of images (N, C, S, S) or of one image (C, S, S), as `Network` does."""
        return classify(images, self._in_channels, self._logits)

    def _logits(self, images: Tensor) -> Tensor:
        side = self.image_size
        if images.shape[2:] != (side, side):
            height, width = images.shape[2:]
            raise ValueError(
                f"images of {height}x{width} do not fit this network, which was traced for "
                f"{side}x{side}: make another with image_size="
            )
        with torch.no_grad(), torch.autocast("cpu", enabled=False):  # the kernels read float32
            logits: Tensor = self._run(images)[0].clone()
        return logits


def hybrid(
    model: nn.Module,
    *,
    image_size: int = 224,
    in_channels: int | None = None,
    threads: int = 1,
    level: str | None = None,
    tune: bool = True,
    cache: str | Path | None = None,
) -> Hybrid:
    """Return a network that runs natively as far as the runtime knows its operations.

    Torch runs the other operations, with its own threads. The zero weights of the model are left
    out where the runtime computes.

    Args:
        model: Maps images (N, C, H, W) to logits (N, K). Its weights are copied.
        image_size: Side of the images; the network takes no others.
        in_channels: Channels of the images; by default those of the first convolution, or 3.
        threads: As for `load`, like the other arguments.
        level: Instruction set of the kernels.
        tune: Measure how each layer is computed fastest.
        cache: Directory of compiled kernels and measurements.

    Raises:
        ValueError: torch.export cannot trace the model for batches of any size, the model is not on
            the CPU or not of float32, or an argument is out of range; one line.
        BuildError: The machine cannot compile the kernels.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if level is not None:
        check_level(level)
    for name, value in tensors(model.state_dict()).items():
        if value.device.type != "cpu" or value.dtype in _OTHER_DTYPES:
            raise ValueError(
                f"the model must be float32 on the CPU, {name!r} is {value.dtype} on {value.device}"
            )
    directory = default_cache() if cache is None else Path(cache)
    kernels = bindings.load(level or cpu_level(), directory)
    tuner = Tuner(directory) if tune else None
    in_channels = image_channels(model, in_channels)
    with evaluation(model):
        program = export(model, in_channels, image_size, any_batch=True)
    _check(program, type(model).__name__)
    state = {
        name: value.detach().clone()
        for name, value in {**program.constants, **program.state_dict}.items()
        if isinstance(value, Tensor)
    }
    parts = cut(program, state)
    fixed = constants(program, state)
    report = _report(program, parts, state, fixed)
    native = [_Native(part, state, threads=threads, kernels=kernels, tuner=tuner) for part in parts]
    run = _joined(program, parts, native, fixed)
    return Hybrid(run, report, in_channels=in_channels, image_size=image_size)


def _check(program: ExportedProgram, name: str) -> None:
    """Check that a program can be cut.

    Raises:
        ValueError: It has several inputs or outputs, or branches or sizes that depend on the data.
    """
    outputs: Any = program.graph.output_node().args[0]
    is_one = len(outputs) == 1 and isinstance(outputs[0], fx.Node) and is_tensor(outputs[0])
    if len(program.graph_signature.user_inputs) != 1 or not is_one:
        raise ValueError(f"{name} must take images and return one tensor, and change no buffers")
    for node in program.graph.nodes:
        values = tree_leaves(node.meta.get("val"))
        if node.op == "get_attr" or any(has_free_unbacked_symbols(value) for value in values):
            path, kind = place(node)
            where = f"{path}: {kind}" if path else kind or name
            raise ValueError(f"{where} has branches or sizes that depend on the data ({node.name})")


_OTHER_DTYPES = (torch.float16, torch.bfloat16, torch.float64)


class _Native(nn.Module):
    """A part that the runtime computes, for tensors as torch has them there."""

    def __init__(self, part: Part, state: Mapping[str, Tensor], **options: Any) -> None:
        super().__init__()
        self._axes = LAYOUTS[part.entry_layout]
        self._out_axes = LAYOUTS[part.exit_layout]
        shape = part.entry.meta["val"].shape
        channels = shape[self._axes[1]]
        check_size = size_check(part.nodes, shapes_of(state), channels)
        layers = lower(part.nodes, dict(state), in_channels=channels)
        self._engine = Engine(layers, check_size, in_channels=channels, **options)
        self._out_pixels = [part.exit.meta["val"].shape[axis] for axis in self._out_axes[2:]]

    def forward(self, value: Tensor) -> Tensor:
        value = value.permute(self._axes)
        height, width = (1, 1, *value.shape[2:])[-2:]
        images = value.reshape(*value.shape[:2], height, width).contiguous()
        made = self._engine.program(height, width).run(images)
        made = made.reshape(*made.shape[:2], *self._out_pixels)
        order = [self._out_axes.index(axis) for axis in range(made.dim())]
        return made.permute(order).contiguous()


def _joined(
    program: ExportedProgram,
    parts: Sequence[Part],
    native: Sequence[_Native],
    fixed: Mapping[fx.Node, Any],
) -> fx.GraphModule:
    """Return the program with its parts replaced, as a module without inputs but the images.

    Args:
        program: It is changed.
        parts: Of the program.
        native: What computes them.
        fixed: The values that do not depend on the images.
    """
    module: fx.GraphModule = program.graph_module
    graph = program.graph
    ends = dict[fx.Node, fx.Node]()
    for i, (part, own) in enumerate(zip(parts, native, strict=True)):
        module.add_submodule(f"native_{i}", own)
        with graph.inserting_after(part.exit):
            made = graph.call_module(f"native_{i}", (ends.get(part.entry, part.entry),))
        part.exit.replace_all_uses_with(made)
        ends[part.exit] = made
    for node in reversed([node for node in graph.nodes if any(node in p.inside for p in parts)]):
        graph.erase_node(node)
    for i, (node, value) in enumerate(fixed.items()):
        if not fixed.keys() >= node.users.keys():
            module.register_buffer(f"fixed_{i}", value)
            with graph.inserting_before(node):
                made = graph.get_attr(f"fixed_{i}")
            node.replace_all_uses_with(made, delete_user_cb=lambda user: user not in fixed)
    for node in reversed(list(fixed)):
        graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()
    return module


def _report(
    program: ExportedProgram,
    parts: Sequence[Part],
    state: Mapping[str, Tensor],
    fixed: Mapping[fx.Node, Any],
) -> Report:
    macs = {node: count for node, count in multiply_adds(program).items() if node not in fixed}
    native = frozenset[fx.Node]().union(*(part.inside for part in parts))
    density = {
        node.name: float((state[node.parameters + "weight"] != 0).float().mean())
        for part in parts
        for node in part.nodes
        if node.op in KERNELS
    }
    modules: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        if node in macs and node not in native and not _moves_nothing(node):
            path, kind = place(node)
            names = modules.setdefault(f"{path}: {kind}" if path else kind, [])
            if operation(node) not in names:
                names.append(operation(node))
    return Report(
        parts=tuple(f"{module} ({_brief(names)})" for module, names in modules.items()),
        torch_macs=sum(count for node, count in macs.items() if node not in native),
        native_macs=sum(macs[node] for node in native if node in macs),
        active_macs=round(
            sum(macs[node] * density.get(node.name, 1.0) for node in native if node in macs)
        ),
    )


def _moves_nothing(node: fx.Node) -> bool:
    return node.target is operator.getitem or getattr(node.target, "is_view", False)


def _brief(names: Sequence[str]) -> str:
    more = f", {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
