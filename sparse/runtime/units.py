"""Units of the int8 network: which operations are computed in one pass, and which values are bytes.

A unit is a convolution, a linear layer or a sum with the BatchNorm and the activation that follow
it, a pool, or an activation on its own. Between units values are uint8: x ~ (q - zero_point) *
scale. The last unit gives the logits, float32.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import graph
from .graph import INPUT, Node

CLAMPS = ("relu", "relu6")
"""The activations that int8 computes."""

MAX_SCALE = 2.0**40
"""Scales are 1 / MAX_SCALE to MAX_SCALE: products and quotients of two are normal in float32."""

Quantization = tuple[float, int]
"""Scale, a float32, and zero point, 0 to 255, of a value."""

_STARTS = ("conv", "linear", "add", "max_pool", "mean_pool", *CLAMPS)
_WEIGHTED = ("conv", "linear")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """An operation and what is computed in the same pass. The unit's value has the unit's name."""

    name: str
    """Name of the last node of the unit."""
    node: Node
    """Its first node: conv, linear, add, max_pool, mean_pool, relu or relu6."""
    norm: Node | None = None
    """A BatchNorm that is folded into the convolution."""
    activation: str | None = None
    """One of `CLAMPS`, that of a lone activation included."""

    @property
    def is_weighted(self) -> bool:
        """Whether the unit has weights: it is a convolution or a linear layer."""
        return self.node.op in _WEIGHTED


def units(nodes: Sequence[Node]) -> list[Unit]:
    """Return the units of a graph that `check` accepts, in the order of execution.

    Raises:
        ValueError: int8 cannot compute an operation; one line that names it.
    """
    readers = Counter(name for node in nodes for name in node.inputs)
    reader = {name: node for node in nodes for name in node.inputs if readers[name] == 1}
    norms = {conv.name: norm for conv, norm in graph.folds(nodes)}
    found: list[Unit] = []
    taken = set[str]()
    for node in nodes:
        if node.name in taken:
            continue
        if node.op not in _STARTS:
            raise cannot(node)
        norm = norms.get(node.name)
        last = norm or node
        after = reader.get(last.name)
        activation = node.op if node.op in CLAMPS else None
        if after is not None and after.op in CLAMPS and node.op in (*_WEIGHTED, "add"):
            last, activation = after, after.op
        taken |= {part.name for part in (norm, last) if part is not None}
        found.append(Unit(name=last.name, node=node, norm=norm, activation=activation))
    if not found[-1].is_weighted or found[-1].activation is not None:
        raise ValueError(
            "int8 needs a convolution or a linear layer at the end, this network ends with the "
            f"{nodes[-1].op} {nodes[-1].name!r}: export float32 instead"
        )
    return found


def cannot(node: Node) -> ValueError:
    """Return the error for an operation that int8 cannot compute."""
    alone = " that follows no convolution of its own" if node.op == "batch_norm" else ""
    return ValueError(
        f"int8 cannot compute the {node.op} {node.name!r}{alone}: export float32 instead"
    )


def check_activations(found: Sequence[Unit], activations: Mapping[str, Quantization]) -> None:
    """Check that exactly the values between units have a scale and a zero point that suit them.

    Raises:
        ValueError: Names the value that has none, or one that is out of range.
    """
    wanted = [INPUT, *(unit.name for unit in found[:-1])]
    for name in wanted:
        if name not in activations:
            raise ValueError(f"the value {name!r} has no scale")
    for name, (scale, zero_point) in activations.items():
        if name not in wanted:
            raise ValueError(f"{name!r} has a scale and is no value between units of int8")
        in_range = math.isfinite(scale) and 1 / MAX_SCALE <= scale <= MAX_SCALE
        if not in_range or float(np.float32(scale)) != scale:
            raise ValueError(
                f"the scale of {name!r} is {scale}: it must be a float32 from {1 / MAX_SCALE:g} "
                f"to {MAX_SCALE:g}"
            )
        if not 0 <= zero_point <= 255:
            raise ValueError(f"the zero point of {name!r} is {zero_point}: it must be 0 to 255")
    for unit in found[:-1]:
        own, source = activations[unit.name], activations[unit.node.inputs[0]]
        if unit.activation is not None and own[1] != 0:
            raise ValueError(f"the zero point of {unit.name!r} is {own[1]}: after a ReLU it is 0")
        if unit.node.op == "max_pool" and own != source:
            raise ValueError(
                f"the max_pool {unit.name!r} has another scale or zero point than what it reads"
            )
