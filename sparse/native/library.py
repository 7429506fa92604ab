"""Compile C++ sources with the compiler of the host on first use, and load them with ctypes.

The sources have a plain C interface instead of that of a torch extension. They compile several
times faster, and nothing of a tool chain is imported. They do not depend on the ABI of torch, so
one library serves every version of torch.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

_HERE = Path(__file__).parent
PREBUILT = _HERE / "prebuilt"

# Level -> (floats per vector, flags of GCC and Clang)
LEVELS = {
    "avx512": (16, ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma")),
    "avx2": (8, ("-mavx2", "-mfma")),
    "aarch64": (4, ()),
    "portable": (4, ()),
}
FAMILIES = {
    "x86_64": ("avx512", "avx2", "portable"),
    "AMD64": ("avx512", "avx2", "portable"),
    "aarch64": ("aarch64", "portable"),
    "arm64": ("aarch64", "portable"),
}
"""Machine -> its levels, best first; any other machine has "portable" alone."""
COMPILERS = ("c++", "g++", "clang++")
_FLAGS = "-std=c++17 -O3 -ffp-contract=fast -fPIC -shared -pthread -Wno-psabi".split()


class BuildError(RuntimeError):
    """The sources cannot be compiled on this machine, or the library cannot be loaded."""


def family() -> tuple[str, ...]:
    """Return the levels for which this machine's compiler compiles, best first."""
    return FAMILIES.get(platform.machine(), ("portable",))


def cpu_level() -> str:
    """Return the best of `LEVELS` that this processor runs; torch reads it from CPUID."""
    levels = family()
    if levels[0] == "aarch64":  # every such processor has NEON
        return "aarch64"
    level = torch.backends.cpu.get_cpu_capability().lower()
    return level if level in levels else "portable"


def num_registers(level: str) -> int:
    """Return the vector registers of a level: kRegisters of conv.h."""
    return 32 if level in ("avx512", "aarch64") or "aarch64" in family() else 16


def check_known(level: str) -> None:
    """Raise a ValueError of one line for a level that is not one of `LEVELS`."""
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")


def check_level(level: str) -> None:
    """Raise a ValueError of one line for a level that is not one of this machine's `LEVELS`."""
    check_known(level)
    if level not in family():
        raise ValueError(
            f"level {level} is not for this machine ({platform.machine()}): "
            f"take one of {', '.join(family())}"
        )


def open_library(path: Path) -> ctypes.CDLL:
    """Load a library that `Library.find` or `Library.compile` returned.

    Raises:
        BuildError: The system does not load the library, as from a directory mounted noexec.
    """
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the library cannot be loaded: {error}") from None


def _loads(path: Path) -> bool:
    try:
        return path.is_file() and bool(open_library(path))
    except (BuildError, OSError):
        return False


def default_cache() -> Path:
    """Return the directory of compiled libraries and tuning results, beside torch's own caches."""
    return Path(torch.hub.get_dir()).parent / "sparse_runtime"


@dataclass(frozen=True)
class Library:
    """A directory of sources that become one shared library.

    Attributes:
        name: The beginning of the library's file name.
        sources: The directory of *.cpp and of the headers that they include.
    """

    name: str
    sources: Path

    def find(self, level: str, cache: Path) -> Path:
        """Return the library of a level: prebuilt in the installation, cached, or compiled now.

        A library that the system does not load, because it is damaged or of another system, is
        passed over.

        Raises:
            BuildError: The library has to be compiled, and it cannot be.
        """
        prebuilt = PREBUILT / self._file_name(level, self._arguments(level))
        return prebuilt if _loads(prebuilt) else self.compile(level, cache)

    def compile(self, level: str, directory: Path, *, flags: tuple[str, ...] = ()) -> Path:
        """Return the path of the library in `directory`, where it is compiled if necessary.

        The file name has a digest of sources and flags, so an outdated library is never used.

        Args:
            level: One of `LEVELS`.
            directory: Created if it is missing.
            flags: Further flags for the compiler.

        Raises:
            BuildError: There is no compiler, or it failed; one line.
        """
        arguments = [*self._arguments(level), *flags]
        library = directory / self._file_name(level, arguments)
        if _loads(library):
            return library
        compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
        if compiler is None:
            raise BuildError(f"there is no C++ compiler ({', '.join(COMPILERS)})")
        sources = sorted(str(path) for path in self.sources.glob("*.cpp"))
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                made = Path(scratch) / library.name
                command = [compiler, *arguments, *sources, "-o", str(made)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                with made.open("rb") as file:
                    os.fsync(file.fileno())  # half a library would crash any process that loads it
                os.replace(made, library)
        except OSError as error:
            raise BuildError(f"the library cannot be written: {error}") from None
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if "error" in line] or ["?"]
            raise BuildError(f"{compiler} failed: {lines[0]}") from None
        return library

    def _arguments(self, level: str) -> list[str]:
        lanes, machine = LEVELS[level]
        return [*_FLAGS, *machine, f"-DSPARSE_LANES={lanes}"]

    def _file_name(self, level: str, arguments: list[str]) -> str:
        digest = hashlib.sha256("\0".join([platform.machine(), *arguments]).encode())
        for path in sorted(filter(Path.is_file, self.sources.rglob("*"))):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return f"{self.name}-{level}-{digest.hexdigest()[:16]}.so"


GATES = Library("gates", _HERE / "cpp")
KERNELS = Library("runtime", _HERE.parent / "runtime" / "cpp")
