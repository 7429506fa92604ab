"""Units of the int8 network: what is computed in one pass, in int8 or float32, and what is bytes.

A unit is a convolution, a linear layer or a sum with the BatchNorm and the activation that follow
it, a pool, an activation on its own, or any other operation. This rule says what is int8:

- Convolutions and linear layers multiply in int8. They read bytes.
- A sum, a max_pool, a mean_pool, or a ReLU or ReLU6 on its own computes in int8 if all that it
  reads is bytes, and if its value is.
- All other units compute in float32.
- A value is bytes if a unit of int8 gives it and only units of int8 read it, or if it is the images
  and only these read them. Any other value is float32, as that of the last unit is. Where a unit of
  int8 reads a float32 value, it is quantized before.

Bytes are uint8: x ~ (q - zero_point) * scale.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from . import graph
from .graph import KERNELS, Node

CLAMPS = ("relu", "relu6")
"""The activations that int8 computes."""

MAX_SCALE = 2.0**40
"""Scales are 1 / MAX_SCALE to MAX_SCALE: products and quotients of two are normal in float32."""

Quantization = tuple[float, int]
"""Scale, a float32, and zero point, 0 to 255, of a value."""

_OF_BYTES = ("add", "max_pool", "mean_pool", *CLAMPS)
"""Operations that compute in int8 if they read and give bytes."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """An operation and what is computed in the same pass. The unit's value has the unit's name."""

    name: str
    """Name of the last node of the unit."""
    node: Node
    """Its first node."""
    norm: Node | None = None
    """A BatchNorm that is folded into the convolution."""
    activation: str | None = None
    """Of a unit of int8: one of `CLAMPS`, that of a lone activation included."""
    is_int8: bool = True
    """Whether the unit computes in int8. It then reads bytes."""
    gives_bytes: bool = True
    """Whether its value is bytes. Otherwise it is float32."""

    @property
    def is_weighted(self) -> bool:
        """Whether the unit has weights: it is a convolution or a linear layer."""
        return self.node.op in KERNELS


def units(nodes: Sequence[Node]) -> list[Unit]:
    """Return the units of a graph that `check` accepts, in the order of execution.

    Raises:
        ValueError: There is nothing to compute in int8.
    """
    merged = _merged(nodes)
    if not any(unit.is_weighted for unit in merged):
        raise ValueError(
            "int8 needs a convolution or a linear layer, this network has none: export float32 "
            "instead"
        )
    floats = _float_values(merged)
    by_name = {node.name: node for node in nodes}
    found: list[Unit] = []
    for unit in merged:
        gives_bytes = unit.name not in floats
        if gives_bytes or unit.is_weighted:
            found.append(replace(unit, gives_bytes=gives_bytes))
        else:
            parts = dict.fromkeys((unit.node.name, unit.name))
            found += [_float_unit(by_name[name]) for name in parts]
    return found


def _merged(nodes: Sequence[Node]) -> list[Unit]:
    """Return the units as if all values were bytes."""
    readers = Counter(name for node in nodes for name in node.inputs)
    reader = {name: node for node in nodes for name in node.inputs if readers[name] == 1}
    norms = {conv.name: norm for conv, norm in graph.folds(nodes)}
    found: list[Unit] = []
    taken = set[str]()
    for node in nodes:
        if node.name in taken:
            continue
        norm = norms.get(node.name)
        last = norm or node
        after = reader.get(last.name)
        activation = node.op if node.op in CLAMPS else None
        if after is not None and after.op in CLAMPS and node.op in (*KERNELS, "add"):
            last, activation = after, after.op
        taken |= {part.name for part in (norm, last) if part is not None}
        found.append(Unit(name=last.name, node=node, norm=norm, activation=activation))
    return found


def _float_values(merged: Sequence[Unit]) -> set[str]:
    """Return the names of the values that are not bytes."""
    makers = {unit.name: unit for unit in merged}
    readers = defaultdict[str, list[Unit]](list)
    for unit in merged:
        for name in unit.node.inputs:
            readers[name].append(unit)
    floats = set[str]()
    left = [unit.name for unit in merged if unit.node.op not in (*KERNELS, *_OF_BYTES)]
    left.append(merged[-1].name)
    while left:
        name = left.pop()
        if name in floats:
            continue
        floats.add(name)
        if name in makers and not makers[name].is_weighted:
            left += makers[name].node.inputs
        left += [unit.name for unit in readers[name] if not unit.is_weighted]
    return floats


def _float_unit(node: Node) -> Unit:
    return Unit(name=node.name, node=node, is_int8=False, gives_bytes=False)


def quantized_values(found: Sequence[Unit]) -> list[str]:
    """Return the names of the values that have a scale: those which units of int8 read."""
    return list(dict.fromkeys(n for unit in found if unit.is_int8 for n in unit.node.inputs))


def check_activations(found: Sequence[Unit], activations: Mapping[str, Quantization]) -> None:
    """Check that exactly the values that int8 reads have a scale and a zero point that suit them.

    Raises:
        ValueError: Names the value that has none, or one that is out of range.
    """
    wanted = quantized_values(found)
    for name in wanted:
        if name not in activations:
            raise ValueError(f"the value {name!r} has no scale")
    for name, (scale, zero_point) in activations.items():
        if name not in wanted:
            raise ValueError(f"{name!r} has a scale and is no value between units that int8 reads")
        in_range = math.isfinite(scale) and 1 / MAX_SCALE <= scale <= MAX_SCALE
        if not in_range or float(np.float32(scale)) != scale:
            raise ValueError(
                f"the scale of {name!r} is {scale}: it must be a float32 from {1 / MAX_SCALE:g} "
                f"to {MAX_SCALE:g}"
            )
        if not 0 <= zero_point <= 255:
            raise ValueError(f"the zero point of {name!r} is {zero_point}: it must be 0 to 255")
    for unit in found:
        if not unit.gives_bytes:
            continue
        own, source = activations[unit.name], activations[unit.node.inputs[0]]
        if unit.activation is not None and own[1] != 0:
            raise ValueError(f"the zero point of {unit.name!r} is {own[1]}: after a ReLU it is 0")
        if unit.node.op == "max_pool" and own != source:
            raise ValueError(
                f"the max_pool {unit.name!r} has another scale or zero point than what it reads"
            )
