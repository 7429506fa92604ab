"""The compiled kernels: built with the host's compiler on first use, called through ctypes.

A plain C interface instead of a torch extension: it compiles in seconds instead of half a minute,
does not depend on torch's ABI, so that one library serves every version of torch, and starts
without importing a compiler's tool chain.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parent / "cpp"
PREBUILT = Path(__file__).parent / "prebuilt"

# Level -> (floats per vector, flags of GCC and Clang)
LEVELS = {
    "avx512": (16, ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma")),
    "avx2": (8, ("-mavx2", "-mfma")),
    "portable": (4, ()),
}
COMPILERS = ("c++", "g++", "clang++")
_FLAGS = "-std=c++17 -O3 -ffp-contract=fast -fPIC -shared -pthread -Wno-psabi".split()
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


Function = Callable[..., Any]


class Op(ctypes.Structure):
    """Mirror of `Op` in op.h, which explains the members."""

    _fields_ = [
        *((name, _INT) for name in "kind in_ out res in_row in_plane out_row out_plane".split()),
        *((name, _INT) for name in "res_row res_plane rows vectors channels halo".split()),
        *((name, _INT) for name in "stride_y stride_x relu tile_rows tile_vectors group".split()),
        *((name, _INT) for name in "num_parts num_blocks depth width height".split()),
        *((name, _INT) for name in "in_channels pad pad_top pad_bottom mask_row".split()),
        *(
            (name, _POINTER)
            for name in "mask moves row_begin row_channel counts part_begin part_stream".split()
        ),
        *((name, _POINTER) for name in "connections weights offsets bias".split()),
    ]


INPUT, SPARSE_CONV, DENSE_CONV, MAX_POOL, MEAN_POOL, SPARSE_LINEAR, DENSE_LINEAR, REPACK = range(8)
OUTPUT = 8


class BuildError(RuntimeError):
    """The kernels cannot be compiled on this machine."""


def cpu_level() -> str:
    """Return the best of `LEVELS` that this processor runs, as CPUID tells torch."""
    level = torch.backends.cpu.get_cpu_capability().lower()
    return level if level in LEVELS else "portable"


def default_cache() -> Path:
    """Return the directory of compiled kernels and tuning results, beside torch's own caches."""
    return Path(torch.hub.get_dir()).parent / "sparse_runtime"


def build(level: str, directory: Path, *, flags: tuple[str, ...] = ()) -> Path:
    """Compile the kernels into `directory`, unless they are there; return the library.

    The file name carries a digest of the sources and flags, so a stale library is never used.

    Args:
        level: One of `LEVELS`.
        directory: Made when it is missing.
        flags: Added to the compiler's.

    Raises:
        BuildError: No compiler, or it failed; one line.
    """
    lanes, machine = LEVELS[level]
    arguments = [*_FLAGS, *machine, f"-DSPARSE_LANES={lanes}", *flags]
    library = directory / f"{level}-{_digest(arguments)}.so"
    if library.is_file():
        return library
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise BuildError(f"there is no C++ compiler ({', '.join(COMPILERS)})")
    sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            made = Path(scratch) / library.name
            command = [compiler, *arguments, *sources, "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(made, library)
    except OSError as error:
        raise BuildError(f"the kernels cannot be written: {error}") from None
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or ["?"]
        raise BuildError(f"{compiler} failed: {lines[0]}") from None
    return library


def _digest(arguments: list[str]) -> str:
    digest = hashlib.sha256("\0".join([platform.machine(), *arguments]).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def load(level: str, cache: Path) -> "Kernels":
    """Return the kernels of a level: prebuilt with the installation, cached, or compiled now.

    Raises:
        BuildError: They have to be compiled and cannot be.
    """
    lanes, machine = LEVELS[level]
    name = f"{level}-{_digest([*_FLAGS, *machine, f'-DSPARSE_LANES={lanes}'])}.so"
    prebuilt = PREBUILT / name
    return Kernels(prebuilt if prebuilt.is_file() else build(level, cache))


class Kernels:
    """The functions of a compiled library; network.cpp explains them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        library = ctypes.CDLL(str(path))

        def function(name: str, result: type[Any] | None, *arguments: type[Any]) -> Function:
            found = library[f"sparse_runtime_{name}"]
            found.restype, found.argtypes = result, arguments
            return found

        self.num_lanes = int(function("lanes", _INT)())
        """Floats per vector."""
        max_tile = function("max_tile", _INT, _INT)
        self.max_tiles = {group: int(max_tile(group)) for group in (1, 2, 4)}
        """Output channels computed together -> most vectors of a tile."""
        size = int(function("op_size", _INT)())
        assert size == ctypes.sizeof(Op), f"Op has {size} bytes in {path}"
        self.create = function("create", _POINTER, _POINTER, _INT, _POINTER, _INT, _INT, _INT)
        self.destroy = function("destroy", None, _POINTER)
        self.run = function("run", _INT, _POINTER, _POINTER, _INT, _POINTER, _INT, _INT)
        self.time = function("time", ctypes.c_double, _POINTER, _POINTER, _INT)
        self.profile = function("profile", None, _POINTER, _POINTER, _POINTER, _POINTER)
