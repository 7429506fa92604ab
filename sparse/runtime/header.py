"""The header of a compact file, and the check of the file's tensors against it.

A file may come from anybody, so nothing that it says is trusted. Types, names, shapes and numbers
are checked here and in check.py before any tensor is used.
"""

import base64
import json
import lzma
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..topology.bits import unpack
from ..topology.blocks import ONE, Block, divides, shape_in_blocks, spread_blocks
from . import graph, integers, memory
from .check import MAX_CHANNELS, Shape, check, check_shapes
from .graph import Node
from .integers import Parameters
from .units import Quantization, check_activations, units

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
"""Types of stored values. BatchNorm and biases are always float32."""

_OTHER_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)
"""Types of entries that the graph does not use, such as counters."""

MAX_IMAGE_SIZE = 2**14
MAX_DIMENSIONS = 8
MAX_JSON = 2**22
"""Bytes of JSON that a packed header may hold: a few bytes must not ask for much memory."""
_MAX_MEMORY = 2**24
"""Bytes that unpacking may take beside them."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says about its network."""

    arch: str
    model: Mapping[str, Any]
    """Further arguments of the architecture, such as num_classes."""
    in_channels: int
    image_size: int
    """Side of the square images that the network was trained on."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Images are normalized per channel by (x - mean) / std, with x in [0, 1]."""
    interpolation: str
    """How the images were resized."""
    dtype: str
    folded: bool
    """Whether BatchNorm is folded into the convolutions."""
    names: tuple[str, ...]
    """Names of the entries of the state dict, in order."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of the entries that are stored as mask and values."""
    nodes: list[Node]
    blocks: Mapping[str, Block] = field(default_factory=dict)
    """Outputs and inputs of the blocks of the masks that are stored at a bit per block."""
    activations: Mapping[str, Quantization] = field(default_factory=dict)
    """Scale and zero point of each value that int8 reads; empty if the network is not quantized."""

    def bits(self, name: str) -> tuple[int, ...]:
        """Return the shape of the mask of an entry as it is stored."""
        return shape_in_blocks(self.shapes[name], self.blocks.get(name, ONE))

    def mask(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the mask (True = active) of an entry that is stored as mask and values."""
        stored = unpack(tensors[name + ".mask"], self.bits(name))
        return spread_blocks(stored, self.blocks.get(name, ONE))

    def masks(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the masks (True = active) of the entries that have one."""
        return {name: self.mask(name, tensors) for name in self.shapes}


_OPTIONAL = {"activations", "blocks"}
"""Fields that the files of earlier versions do not have."""


def packed(text: str) -> str:
    """Return the JSON of a header in base64 of xz."""
    return base64.b64encode(lzma.compress(text.encode(), check=lzma.CHECK_NONE)).decode()


def unpacked(text: str) -> str:
    """Return the JSON that `packed` was given.

    Raises:
        ValueError: It is none, or takes too much memory.
    """
    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_MEMORY)
    try:
        found = stream.decompress(base64.b64decode(text, validate=True), MAX_JSON).decode()
    except (ValueError, lzma.LZMAError) as error:
        raise ValueError(f"its header is no base64 of xz: {error}") from None
    if not stream.eof or stream.unused_data:
        raise ValueError(f"its header is not one whole xz stream of at most {MAX_JSON} bytes")
    return found


def parse(text: str) -> Header:
    """Return the header that JSON describes. Every field has its type and is in its range.

    Raises:
        ValueError: Names the field that is missing, unknown or out of range, in one line.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is no JSON: {error}") from None
    names = {field.name for field in fields(Header)}
    if not isinstance(found, dict) or not names - _OPTIONAL <= found.keys() <= names:
        known = isinstance(found, dict)
        differing = sorted((names ^ found.keys()) - _OPTIONAL) if known else [found]
        raise ValueError(f"its header lacks or adds {', '.join(map(repr, differing[:3]))}")
    for name in _OPTIONAL:
        found.setdefault(name, {})
    for name, (wanted, is_valid) in _FIELDS.items():
        if not is_valid(found[name]):
            raise ValueError(f"its header has a {name} that is not {wanted}")
    for name in ("mean", "std"):
        if len(found[name]) != found["in_channels"]:
            raise ValueError(f"its header has a {name} that is not of in_channels numbers")
        found[name] = tuple(float(value) for value in found[name])
    found["names"] = tuple(found["names"])
    for name in "shapes", "blocks":
        found[name] = {key: tuple(numbers) for key, numbers in found[name].items()}
    for name, block in found["blocks"].items():
        if not divides(block, found["shapes"].get(name, ())):
            raise ValueError(f"its blocks of {block} do not divide the shape of {name!r}")
    found["nodes"] = graph.from_json(found["nodes"])
    check(found["nodes"])
    found["activations"] = {k: (float(s), z) for k, (s, z) in found["activations"].items()}
    header = Header(**found)
    if header.activations:
        if header.dtype != "int8" or not header.folded:
            raise ValueError("its header has activations, and no weights in int8 or no folding")
        check_activations(units(header.nodes), header.activations)
    return header


def _is_number(value: Any) -> bool:
    # Larger integers cannot be converted to floats.
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)


def _are_plain(value: Any) -> bool:
    return isinstance(value, dict) and all(
        v is None or type(v) is bool or graph.is_text(v) or _is_number(v) for v in value.values()
    )


def _are_shapes(value: Any, least: int = 1, most: int = MAX_DIMENSIONS) -> bool:
    return isinstance(value, dict) and all(
        _is_list(shape, lambda n: type(n) is int and n >= 1) and least <= len(shape) <= most
        for shape in value.values()
    )


def _are_quantizations(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(pair, list) and len(pair) == 2 and _is_number(pair[0]) and type(pair[1]) is int
        for pair in value.values()
    )


def _is_list(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(is_valid, value))


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "arch": ("a string", graph.is_text),
    "model": ("a mapping of numbers and strings", _are_plain),
    "in_channels": (f"1 to {MAX_CHANNELS}", lambda n: type(n) is int and 1 <= n <= MAX_CHANNELS),
    "image_size": (f"1 to {MAX_IMAGE_SIZE}", lambda n: type(n) is int and 1 <= n <= MAX_IMAGE_SIZE),
    "mean": ("numbers", lambda value: _is_list(value, _is_number)),
    "std": ("numbers above 0", lambda value: _is_list(value, lambda v: _is_number(v) and v > 0)),
    "interpolation": ("a string", graph.is_text),
    "dtype": (
        f"one of {', '.join(DTYPES)}",
        lambda value: graph.is_text(value) and value in DTYPES,
    ),
    "folded": ("true or false", lambda value: type(value) is bool),
    "names": ("a list of strings", lambda value: _is_list(value, graph.is_text)),
    "shapes": ("a mapping of shapes", _are_shapes),
    "blocks": ("a mapping of two numbers each", lambda value: _are_shapes(value, 2, 2)),
    "activations": ("a mapping of pairs: scale and zero point", _are_quantizations),
}


def check_tensors(
    header: Header, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Shape], dict[str, Parameters] | None]:
    """Check that the tensors of a file are those that its header names, and fit its graph.

    Return the shapes of all entries, and the integers of a quantized network.

    Raises:
        ValueError: Names the tensor that is missing, unknown or does not fit.
    """
    shapes: dict[str, Shape] = {}
    known: list[str] = []
    masked = {name for name in header.names if name in header.shapes}
    if len(masked) < len(header.shapes):
        raise ValueError(f"there is no {min(header.shapes.keys() - masked)!r} for its shape")
    for name in header.names:
        if name in masked:
            shapes[name], stored = header.shapes[name], name + ".values"
            known += [name + ".mask", stored]
            _check_masked(name, header, tensors)
        else:
            stored = name
            known.append(stored)
            shapes[name] = tuple(_find(tensors, stored).shape)
        if tensors[stored].dtype == torch.int8 and (name in masked or name + ".scale" in tensors):
            known.append(name + ".scale")
            _expect(tensors, name + ".scale", torch.float32, shapes[name][:1])
    if sorted(known) != sorted(tensors):
        raise ValueError(f"it holds {_surplus(known, tensors)!r} twice, or without need")
    num_bytes = 4 * sum(math.prod(shape) for shape in shapes.values())
    if num_bytes > memory.limit():
        raise ValueError(f"its weights would take {num_bytes / 2**30:.1f} GiB")
    check_shapes(header.nodes, shapes, in_channels=header.in_channels, folded=header.folded)
    _check_types(header, tensors)
    _check_indices(header, shapes, tensors)
    if not header.activations:
        return shapes, None
    found, masks = units(header.nodes), header.masks(tensors)
    return shapes, integers.read_parameters(found, header.activations, masks, tensors)


def _surplus(known: Iterable[str], tensors: Mapping[str, Tensor]) -> str:
    seen: set[str] = set()
    for name in known:
        if name in seen:
            return name
        seen.add(name)
    return min(tensors.keys() - seen)


def _check_masked(name: str, header: Header, tensors: Mapping[str, Tensor]) -> None:
    bits = header.bits(name)
    _expect(tensors, name + ".mask", torch.uint8, ((math.prod(bits) + 7) // 8,))
    values = _find(tensors, name + ".values")
    num_set = int(unpack(tensors[name + ".mask"], bits).sum())
    num_active = num_set * math.prod(header.blocks.get(name, ONE))
    if values.dtype not in DTYPES.values() or values.shape != (num_active,):
        raise ValueError(
            f"{name + '.values'!r} is {values.dtype} of {tuple(values.shape)}, "
            f"the mask has {num_active} active weights"
        )


def _check_types(header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Check that entries of the graph have one of `DTYPES`, and others one of `_OTHER_DTYPES`."""
    read = {name for node in header.nodes for name in graph.entries(node)}
    indices = {graph.index_entry(node) for node in header.nodes}
    for name in header.names:
        if name in header.shapes:
            continue
        dtype = tensors[name].dtype
        if name in indices:
            continue
        if dtype in DTYPES.values() and (dtype != torch.int8 or name + ".scale" in tensors):
            continue
        if name in read or dtype not in _OTHER_DTYPES:
            raise ValueError(f"{name!r} is {dtype}, which is none of {', '.join(DTYPES)}")


def _check_indices(
    header: Header, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]
) -> None:
    """Check that indices of relative positions are rows of their tables."""
    for node in header.nodes:
        index = graph.index_entry(node)
        if index is None:
            continue
        rows = math.prod(shapes[graph.entries(node)[0]][:-1])
        if index in header.shapes or tensors[index].dtype != torch.int64:
            raise ValueError(f"{index!r} is not int64, as indices are")
        if not 0 <= int(tensors[index].min()) <= int(tensors[index].max()) < rows:
            raise ValueError(f"{index!r} has numbers that are no row of the {rows} of its table")


def _find(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"there is no {name!r}")
    return tensors[name]


def _expect(
    tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    found = _find(tensors, name)
    if found.dtype != dtype or found.shape != shape:
        raise ValueError(
            f"{name!r} is {found.dtype} of {tuple(found.shape)}, not {dtype} of {shape}"
        )
