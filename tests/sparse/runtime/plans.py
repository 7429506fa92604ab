"""Plans of random networks, and the C interface through ctypes and as CMake builds it."""

import ctypes
import hashlib
import os
import platform
import random
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse import runtime
from sparse.native import library
from sparse.runtime import bindings, plan_file
from sparse.runtime.execution_plan import ExecutionPlan
from sparse.runtime.lower import lower
from tests.sparse.runtime.conftest import LEVELS
from tests.sparse.runtime.random_networks import RandomChoices, RandomNetwork, another_plan

ROOT = Path(library.__file__).parents[2]
SOURCES = library.KERNELS.sources
RUN_PLANS = ROOT / "benchmarks" / "run_plans.c"
FEW = {1: 14, 2: 6, 4: 3}
MAX_TILES = {"avx512": {1: 14, 2: 8, 4: 7}, "avx2": FEW, "portable": FEW}
MAX_TILES["aarch64"] = {1: 14, 2: 8, 4: 6}
"""Level -> most vectors of a tile by group, of tiles that every machine with the level has."""


HEADER = {
    name: 40 + 8 * i
    for i, name in enumerate(
        "version bytes lanes registers op_bytes threads arena channels height width "
        "outputs out_height out_width num_ops num_pieces num_tables".split()
    )
}
"""Member of the header -> its place."""


@dataclass
class Case:
    """A plan with images and what torch computes for them, in float64."""

    plan: ExecutionPlan
    data: bytes
    images: Tensor
    wanted: Tensor

    def check(self, found: Tensor) -> None:
        """Compare outputs with torch's."""
        assert found.shape == self.wanted.shape
        assert torch.isfinite(found).all()
        error = float((found - self.wanted).abs().max())
        assert error <= 1e-4 * max(1e-3, float(self.wanted.abs().max())), error


def draw(seed: int, level: str) -> Case:
    """Draw a random network, its size of images and how it is computed."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    sizes = [1, 2, 3, 5, 7, 8, 13, 16, 17, 28, 31, 33, 40, 56]
    size = channels, height, width = rng.randint(1, 4), rng.choice(sizes), rng.choice(sizes)
    model = RandomNetwork(rng, channels, height, width)
    layers = lower(runtime.trace(model), model.state_dict(), in_channels=channels)
    lanes, threads = library.LEVELS[level][0], rng.choice([1, 3])
    with another_plan(rng, height, width, lanes):
        plan = ExecutionPlan(layers, size, lanes=lanes, num_parts=threads)
    if rng.random() < 0.7:
        RandomChoices(rng).tune(plan, SimpleNamespace(max_tiles=MAX_TILES[level]))
    images = torch.randn(rng.choice([1, 2, 4]), *size)
    with torch.no_grad():
        wanted = RandomNetwork.double(model)(images.double())
    data = plan_file.to_bytes(
        plan, level=level, size=size, threads=threads, mean=(0.0,) * channels, std=(1.0,) * channels
    )
    return Case(plan, data, images, wanted)


def draw_for(seed: int, kernels: bindings.Kernels) -> Case:
    """Draw a plan that these kernels open, if they only lend a layout, too."""
    case = draw(seed, LEVELS[kernels.num_lanes])
    case.data = replaced(case.data, {HEADER["registers"]: kernels.num_registers})
    return case


def signed(data: bytes) -> bytes:
    """Return a plan with the digest of its content."""
    return data[:8] + hashlib.sha256(data[40:]).digest() + data[40:]


class Api:
    """The C interface of a library that Python has compiled."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        for name in ("error", "status_name", "level"):
            getattr(self._library, f"sparse_{name}").restype = ctypes.c_char_p
        for name in ("mean", "std"):
            getattr(self._library, f"sparse_{name}").restype = ctypes.POINTER(ctypes.c_float)

    def call(self, name: str, *arguments: object) -> str:
        """Return the name of the status of a call."""
        status = getattr(self._library, f"sparse_{name}")(*arguments)
        return str(self._library.sparse_status_name(status).decode())

    def error(self) -> str:
        return str(self._library.sparse_error().decode())

    def open(self, plan: bytes | Path, threads: int = 0) -> "Network | str":
        """Return the network of a plan, or the status and the reason of the refusal."""
        handle = ctypes.c_void_p()
        if isinstance(plan, Path):
            arguments: tuple[object, ...] = ("open", str(plan).encode())
        else:
            arguments = ("open_memory", plan, ctypes.c_size_t(len(plan)))
        status = self.call(*arguments, threads, ctypes.byref(handle))
        assert (status == "SPARSE_OK") == bool(handle)
        return Network(self, handle) if handle else f"{status}: {self.error()}"


class Network:
    """A network that the C interface has opened."""

    def __init__(self, api: Api, handle: ctypes.c_void_p) -> None:
        self.api, self.handle = api, handle
        self.in_shape, self.out_shape = self._shape("input"), self._shape("output")

    def __del__(self) -> None:
        self.api._library.sparse_close(self.handle)

    def _shape(self, which: str) -> tuple[int, ...]:
        shape = (ctypes.c_int64 * 3)()
        getattr(self.api._library, f"sparse_{which}_shape")(self.handle, shape)
        return tuple(shape)

    def ask(self, name: str) -> object:
        return getattr(self.api._library, f"sparse_{name}")(self.handle)

    def run(self, images: Tensor) -> Tensor:
        """Run float32 images (N, C, H, W) or uint8 images (N, H, W, C)."""
        name = "run_uint8" if images.dtype == torch.uint8 else "run"
        outputs = torch.full((len(images), *self.out_shape), torch.nan)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (images, outputs))
        count = ctypes.c_int64(len(images))
        images_at, outputs_at = pointers
        status = self.api.call(name, self.handle, images_at, count, outputs_at)
        assert status == "SPARSE_OK", self.api.error()
        return outputs


@dataclass(frozen=True)
class Target:
    """A level with the compilers and the emulator that it needs on this machine."""

    level: str
    prefix: str = ""
    """Of the names of the compilers."""
    emulator: tuple[str, ...] = ()

    def compiler(self, language: str) -> str:
        """Return a compiler, `gcc` or `g++`; skip the test if it is missing."""
        return needed(self.prefix + language)

    def run(self, program: Path, *arguments: object, **options: object) -> str:
        """Return what a program prints."""
        command = [*self.emulator, str(program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def needed(program: str) -> str:
    """Return the path of a program; skip the test if it is missing."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"needs {program}")
    return found


def aarch64() -> Target:
    """Return 64-bit ARM: this machine, or qemu on another one."""
    if platform.machine() in ("aarch64", "arm64"):
        return Target("aarch64")
    root = "/usr/aarch64-linux-gnu"
    return Target("aarch64", "aarch64-linux-gnu-", (needed("qemu-aarch64"), "-L", root))


def install(target: Target, *flags: str) -> Path:
    """Return where CMake installed the library; it is compiled once for its sources and flags."""
    cmake, compiler = needed("cmake"), target.compiler("g++")
    configured = [f"-DSPARSE_LEVEL={target.level}", f"-DCMAKE_CXX_COMPILER={compiler}", *flags]
    configured.append("-DCMAKE_INSTALL_LIBDIR=lib")
    if target.emulator:
        configured += ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    digest = hashlib.sha256("\0".join(configured).encode())
    for path in sorted(filter(Path.is_file, SOURCES.rglob("*"))):
        digest.update(path.read_bytes())
    cache = library.default_cache()
    prefix = cache / f"embedded-{target.level}-{digest.hexdigest()[:16]}"
    if prefix.is_dir():
        return prefix
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made, build = Path(scratch) / "prefix", Path(scratch) / "build"
        configured.append(f"-DCMAKE_INSTALL_PREFIX={made}")
        run(cmake, "-S", SOURCES, "-B", build, *configured)
        run(cmake, "--build", build, "--parallel", os.cpu_count() or 1, "--target", "install")
        try:
            made.rename(prefix)
        except OSError:
            assert prefix.is_dir()  # another process was faster
    return prefix


def compile_program(
    target: Target, source: Path, output: Path, *flags: str, shared: bool = False
) -> Path:
    """Compile a C or C++ program with the installed library."""
    prefix = install(target, *flags)
    is_c = source.suffix == ".c"
    standard = ("-std=c11", "-D_POSIX_C_SOURCE=200809L") if is_c else ("-std=c++17",)
    compiled = output.with_suffix(".o")
    warnings = "-O1", "-Wall", "-Wextra", "-Werror", "-pedantic"
    compiler = target.compiler("gcc" if is_c else "g++")
    run(compiler, *standard, *warnings, f"-I{prefix}/include", "-c", source, "-o", compiled)
    link = [target.compiler("g++"), compiled, "-o", output]
    if shared:
        run(*link, f"-L{prefix}/lib", "-lsparse_runtime", f"-Wl,-rpath,{prefix}/lib")
    else:
        run(*link, f"{prefix}/lib/libsparse_runtime.a", "-pthread")
    return output


def run(*command: object) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def run_cases(
    target: Target, program: Path, cases: Sequence[Case], folder: Path, *, threads: int
) -> list[Tensor]:
    """Return the outputs of RUN_PLANS for plans and images."""
    stems = [folder / str(i) for i in range(len(cases))]
    for stem, case in zip(stems, cases, strict=True):
        stem.with_suffix(".plan").write_bytes(case.data)
        stem.with_suffix(".in").write_bytes(case.images.numpy().tobytes())
    target.run(program, threads, 1, *stems)
    return [
        torch.from_numpy(np.fromfile(stem.with_suffix(".out"), np.float32)).view(case.wanted.shape)
        for stem, case in zip(stems, cases, strict=True)
    ]


def write_ppm(path: Path, pixels: Tensor) -> None:
    """Write an image (H, W, 3)."""
    height, width, _ = pixels.shape
    path.write_bytes(b"P6\n%d %d\n255\n" % (width, height) + pixels.numpy().tobytes())


def replaced(data: bytes, values: Mapping[int, int]) -> bytes:
    """Return a plan with other 8-byte numbers at some places, and its digest."""
    changed = bytearray(data)
    for place, value in values.items():
        changed[place : place + 8] = value.to_bytes(8, "little", signed=True)
    return signed(bytes(changed))
