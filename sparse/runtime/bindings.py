"""The compiled kernels of the runtime, called through ctypes."""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..native.library import KERNELS, open_library

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64

Function = Callable[..., Any]


class Op(ctypes.Structure):
    """Mirrors `Op` of op.h, which explains the members."""

    _fields_ = [
        *((name, _INT) for name in "kind in_ out res in_row in_plane out_row out_plane".split()),
        *((name, _INT) for name in "res_row res_plane rows vectors channels halo".split()),
        *(
            (name, _INT)
            for name in "stride_y stride_x activation tile_rows tile_vectors group".split()
        ),
        *((name, _INT) for name in "num_parts num_blocks depth width height".split()),
        *((name, _INT) for name in "in_channels window_y window_x".split()),
        *((name, _INT) for name in "pad_y pad_x pad_top pad_bottom mask_row".split()),
        *(
            (name, _INT)
            for name in "fill fill_top fill_bottom heads num_windows num_tokens".split()
        ),
        *((name, ctypes.c_double) for name in "eps score_scale".split()),
        *(
            (name, _POINTER)
            for name in "mask moves row_begin row_channel counts part_begin part_stream".split()
        ),
        *((name, _POINTER) for name in "connections weights offsets bias scales rescale".split()),
    ]


NUMBERS = sum(field[1] is not _POINTER for field in Op._fields_)
"""Members of `Op` that are no pointers. They come first."""

INPUT, SPARSE_CONV, DENSE_CONV, MAX_POOL, MEAN_POOL, SPARSE_LINEAR, DENSE_LINEAR, REPACK = range(8)
OUTPUT, SCALE, LAYER_NORM, VECTOR_NORM, TOKENS, TOKEN, ATTENTION = range(8, 15)
QUANT_INPUT, QUANT_CONV, QUANT_MAX_POOL, QUANT_MEAN_POOL, QUANT_LINEAR = range(15, 20)
QUANT_LOOKUP, QUANTIZE, QUANTIZE_VECTOR = range(20, 23)


@functools.cache
def load(level: str, cache: Path) -> "Kernels":
    """Return the kernels of a level; see `Library.find` for where they come from, and errors."""
    return Kernels(KERNELS.find(level, cache))


class Kernels:
    """The functions of a compiled library, which network.cpp explains."""

    def __init__(self, path: Path) -> None:
        self.path = path
        library = open_library(path)

        def function(name: str, result: type[Any] | None, *arguments: type[Any]) -> Function:
            found = library[f"sparse_runtime_{name}"]
            found.restype, found.argtypes = result, arguments
            return found

        self.num_lanes = int(function("lanes", _INT)())
        """Floats per vector."""
        self.num_registers = int(function("registers", _INT)())
        """Vector registers of the processor."""
        self.plan_version = int(function("plan_version", _INT)())
        """The version of plan files (plan_file.py)."""
        max_tile = function("max_tile", _INT, _INT)
        self.max_tiles = {group: int(max_tile(group)) for group in (1, 2, 4)}
        """Output channels computed together -> most vectors of a tile."""
        self.fast_int8 = function("fast_int8", _INT, _INT)
        """Tells whether int8 has an instruction of its own here. A test forbids its use with 0."""
        size = int(function("op_size", _INT)())
        assert size == ctypes.sizeof(Op), f"Op has {size} bytes in {path}"
        self.create = function("create", _POINTER, _POINTER, _INT, _POINTER, _INT, _INT, _INT)
        self.threads = function("threads", _INT, _POINTER)
        self.destroy = function("destroy", None, _POINTER)
        self.run = function("run", _INT, _POINTER, _POINTER, _INT, _POINTER, _INT, _INT)
        self.time = function("time", ctypes.c_double, _POINTER, _POINTER, _INT)
        self.profile = function("profile", None, _POINTER, _POINTER, _POINTER, _POINTER)
