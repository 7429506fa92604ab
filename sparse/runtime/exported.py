"""Trace a model to its graph with torch.export, where torch.fx cannot follow: transformers.

torch.export records what the model computes for images of one size. Reshapes and transpositions
are followed as views (views.py), so that nn.MultiheadAttention and the attention of timm become
the same node.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from .aten import OPERATIONS
from .graph import INPUT, Node
from .interpreter import BATCH_SIZE, ExportError, Interpreter

ODD = 33  # pixels that other images have more, to see what depends on their size


def export(
    model: nn.Module, in_channels: int, image_size: int, *, any_batch: bool = False
) -> ExportedProgram:
    """Return what a model, which is in evaluation mode, computes for images of a size.

    Args:
        model: The model.
        in_channels: Channels of the images.
        image_size: Side of the images.
        any_batch: For batches of any size, and not only of `BATCH_SIZE`.

    Raises:
        ExportError: torch.export cannot trace the model.
    """
    like = next(model.parameters(), torch.zeros(()))
    images = like.new_zeros(BATCH_SIZE, in_channels, image_size, image_size)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    with warnings.catch_warnings(), default_precision():
        warnings.simplefilter("ignore")  # of the exporter's own dependencies
        try:
            program: ExportedProgram = torch.export.export(
                model, (images,), dynamic_shapes=shapes if any_batch else None
            )
            program = program.run_decompositions({})  # without operations that work in place
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            batches = " for batches of any size" if any_batch else ""
            raise ExportError(
                f"{type(model).__name__} cannot be exported{batches}: {reason} (with images of "
                f"{in_channels} x {image_size} x {image_size}: in_channels= and image_size= give "
                "others)"
            ) from error
    return program


@contextlib.contextmanager
def default_precision() -> Iterator[None]:
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


def image_channels(model: nn.Module, given: int | None = None) -> int:
    """Return the channels of the images: those given, or those of the first convolution, or 3.

    Raises:
        ValueError: The given number is below 1.
    """
    if given is not None:
        if given < 1:
            raise ValueError(f"in_channels must be at least 1, got {given}")
        return given
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return 3 if first is None else first.in_channels


def trace(model: nn.Module, image_size: int, in_channels: int) -> list[Node]:
    """Return the graph that a model computes for images of a size.

    If the model does something else with images of an odd size, or cannot take them, the graph
    takes images of the given size only.

    Raises:
        UnknownOperationError: Names the operation that the runtime does not have, and its module.
        ValueError: torch.export cannot trace the model, or the operation is outside of any module.
    """

    def graph(size: int) -> list[Node]:
        return Interpreter(export(model, in_channels, size), OPERATIONS).nodes()

    nodes = graph(image_size)
    if any(node.size != (0, 0) for node in nodes):
        return nodes
    try:
        is_free = nodes == graph(image_size + ODD)
    except ValueError:
        is_free = False
    if is_free:
        return nodes
    size = (image_size, image_size)
    return [replace(node, size=size) if INPUT in node.inputs else node for node in nodes]
