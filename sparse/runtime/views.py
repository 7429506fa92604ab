"""What reshapes and transpositions do with the channels and pixels of a value.

A traced transformer spends most of its operations on views. A view is followed here by saying, for
every dimension, which part of the batch, the channels and the pixels it counts. Only operations
that compute something then become nodes of the graph.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .arrays import Array

BATCH, CHANNELS, PIXELS = "batch", "channels", "pixels"
WEIGHT = "weight"  # the only axis of an entry of the state dict
REPEATED = "repeated"  # an axis of copies


@dataclass(frozen=True)
class Part:
    """A factor of a dimension: `size` steps of `stride` along an axis of the value."""

    axis: str
    size: int
    stride: int


Dim = tuple[Part, ...]
"""The outermost part first. A dimension of size 1 has no part."""


@dataclass(frozen=True)
class View:
    """A tensor that shows channels and pixels of a value, or numbers of an entry."""

    name: str
    """Of the value or of the entry."""
    dims: tuple[Dim, ...]
    channel: int = 0
    """The first channel that is shown."""
    pixel: int = 0
    """The first pixel that is shown, counted row by row."""
    shift: tuple[int, int] = (0, 0)
    """Rows and columns by which the pixels have moved up and left, in a circle."""
    scale: float = 1.0
    """What all numbers have been multiplied by."""
    unit: Dim | None = None
    """The dimension by whose length the numbers have been divided, if they have."""
    is_weight: bool = False
    """Whether the numbers are those of an entry, or computed from entries alone."""
    steps: tuple[tuple[Any, ...], ...] = ()
    """What was computed from an entry. The numbers of the result are the axis `WEIGHT`."""

    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(part.size for part in dim) for dim in self.dims)

    def parts(self, axis: str) -> Dim:
        """Return the parts of an axis, merged, from the largest stride to the smallest."""
        found = [part for dim in self.dims for part in dim if part.axis == axis]
        return merged(sorted(found, key=lambda part: -part.stride))

    def reshaped(self, sizes: Sequence[int]) -> "View":
        """Return the view with other dimensions and the same order of numbers.

        Raises:
            ValueError: A dimension would cut an axis at no multiple of its parts.
        """
        left = list(merged([part for dim in self.dims for part in dim]))[::-1]
        dims = []
        for size in sizes:
            dim = []
            while size > 1:
                part = left.pop()
                if size % part.size:
                    inner = part.size // size
                    if part.size % size:
                        raise ValueError("it cuts channels or pixels unevenly")
                    left.append(replace(part, size=inner))
                    part = replace(part, size=size, stride=part.stride * inner)
                dim.append(part)
                size //= part.size
            dims.append(merged(dim))
        return replace(self, dims=tuple(dims))

    def permuted(self, order: Sequence[int]) -> "View":
        return replace(self, dims=tuple(self.dims[i] for i in order))

    def taken(self, dim: int, begin: int, end: int, step: int = 1) -> "View":
        """Return every `step`-th index of begin .. end - 1 of a dimension.

        Raises:
            ValueError: They do not lie on one axis of channels or pixels.
        """
        if (begin, end, step) == (0, self.sizes()[dim], 1):
            return self
        parts = self.dims[dim]
        is_one = len(parts) == 1 and parts[0].axis in (CHANNELS, PIXELS)
        if not is_one or (parts[0].axis == PIXELS and self.shift != (0, 0)):
            raise ValueError("it takes other parts than ranges of channels or pixels")
        (part,) = parts
        dims = list(self.dims)
        taken = replace(part, size=len(range(begin, end, step)), stride=part.stride * step)
        dims[dim] = merged([taken])
        start = begin * part.stride
        if part.axis == CHANNELS:
            return replace(self, dims=tuple(dims), channel=self.channel + start)
        return replace(self, dims=tuple(dims), pixel=self.pixel + start)

    def expanded(self, sizes: Sequence[int]) -> "View":
        """Return the view with dimensions of size 1 repeated."""
        new = len(sizes) - len(self.dims)
        dims = [()] * new + list(self.dims)
        own = (1,) * new + self.sizes()
        for i, (size, old) in enumerate(zip(sizes, own, strict=True)):
            if size not in (-1, old):
                dims[i] = (Part(REPEATED, size, 0),)
        return replace(self, dims=tuple(dims))


def places(parts: Sequence[Part]) -> Array:
    """Return the places on an axis that parts count, the outermost part first."""
    found = np.zeros(1, np.int64)
    for part in parts:
        found = (found[:, None] + np.arange(part.size) * part.stride).ravel()
    return found


def merged(parts: Sequence[Part]) -> Dim:
    """Return parts without those of size 1, and with neighbors in one where they count on."""
    found: list[Part] = []
    for part in parts:
        if part.size == 1:
            continue
        last = found[-1] if found else None
        if last and last.axis == part.axis and last.stride == part.stride * part.size:
            found[-1] = replace(part, size=last.size * part.size)
        else:
            found.append(part)
    return tuple(found)


def axis_of(axis: str, size: int) -> Dim:
    """Return a dimension that counts a whole axis."""
    return merged([Part(axis, size, 1)])
