"""Plans of random networks, and the C interface through ctypes and as CMake builds it."""

import ctypes
import hashlib
import os
import platform
import random
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from sparse import runtime
from sparse.native import library
from sparse.runtime import bindings, integers, plan_file
from sparse.runtime.execution_plan import ExecutionPlan
from sparse.runtime.graph import Node
from sparse.runtime.int8 import integer_layers
from sparse.runtime.lower import Layer, lower
from tests.sparse.runtime import integer_networks
from tests.sparse.runtime.conftest import LEVELS
from tests.sparse.runtime.random_networks import RandomChoices, RandomNetwork, another_plan
from tests.sparse.runtime.random_transformers import RandomGraph
from tests.sparse.runtime.test_transformers import MODELS, export

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
    """A plan file with images and what torch computes for them, in float64."""

    data: bytes
    images: Tensor
    wanted: Tensor

    def check(self, found: Tensor) -> None:
        """Compare outputs with torch's."""
        assert found.shape == self.wanted.shape
        assert torch.isfinite(found).all()
        error = float((found - self.wanted).abs().max())
        assert error <= 1e-4 * max(1e-3, float(self.wanted.abs().max())), error


@dataclass
class Drawn(Case):
    """A random plan."""

    plan: ExecutionPlan


Shape = tuple[int, int, int]
State = Mapping[str, Tensor]
Function = Callable[[Tensor], Tensor]


def _network(rng: random.Random, size: Shape) -> tuple[Sequence[Node], State, Function]:
    """Draw a network; return its graph and weights, and the function of it in float64."""
    model = RandomNetwork(rng, *size)
    return runtime.trace(model), model.state_dict(), lambda x: RandomNetwork.double(model)(x)


def _transformer(rng: random.Random, size: Shape) -> tuple[Sequence[Node], State, Function]:
    """Draw a graph with operations of transformers."""
    drawn = RandomGraph(rng, size)
    return drawn.nodes, drawn.state, drawn.in_float64()


def _integers(seed: int) -> tuple[Shape, list[Layer], Function]:
    """Draw a network in int8; return its size of images, its layers and what they compute.

    Every other one has float32 between units of int8.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network"
        if seed % 2:
            nodes, state, images = integer_networks.draw_mixed(seed)
            size = images.shape[1:]
            compact = integer_networks.write_graph(path, nodes, state, {}, shape=size)
        else:
            model, images, how = integer_networks.draw(seed)
            compact = integer_networks.write(path, model, size=images.shape[-1], **how)
    network, (channels, height, width) = compact.integers(), images.shape[1:]
    layers = integer_layers(network, in_channels=channels)
    return (channels, height, width), layers, lambda x: integers.run(network, x.float())


def draw(seed: int, level: str) -> Drawn:
    """Draw a random network, its size of images and how it is computed."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    sizes = [1, 2, 3, 5, 7, 8, 13, 16, 17, 28, 31, 33, 40, 56]
    if seed % 5 == 4:
        size, layers, function = _integers(seed)
    else:
        size = rng.randint(1, 4), rng.choice(sizes), rng.choice(sizes)
        nodes, state, function = (_transformer if seed % 3 == 0 else _network)(rng, size)
        layers = lower(nodes, state, in_channels=size[0])
    channels, height, width = size
    lanes, threads = library.LEVELS[level][0], rng.choice([1, 3])
    with another_plan(rng, height, width, lanes):
        plan = ExecutionPlan(layers, size, lanes=lanes, num_parts=threads)
    if rng.random() < 0.7:
        RandomChoices(rng).tune(plan, SimpleNamespace(max_tiles=MAX_TILES[level]))
    images = torch.randn(rng.choice([1, 2, 4]), *size)
    with torch.no_grad():
        wanted = function(images.double())
    data = plan_file.to_bytes(
        plan, level=level, size=size, threads=threads, mean=(0.0,) * channels, std=(1.0,) * channels
    )
    return Drawn(data, images, wanted, plan)


def draw_for(seed: int, kernels: bindings.Kernels) -> Drawn:
    """Draw a plan that these kernels open, if they only lend a layout, too."""
    case = draw(seed, LEVELS[kernels.num_lanes])
    case.data = replaced(case.data, {HEADER["registers"]: kernels.num_registers})
    return case


def flat() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, 4), nn.GELU(), nn.Flatten(), nn.Linear(384, 7))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vit": MODELS["vit"],
    "convnext": MODELS["convnext"],
    "swin": MODELS["swin"],
    "swin v2": MODELS["swin v2"],
    "squeeze and excitation": MODELS["timm efficientnet"],
    "concat": lambda: torchvision.models.DenseNet(4, (2, 2), 8, num_classes=7),
    "shuffle": lambda: torchvision.models.ShuffleNetV2(
        [1, 1, 1], [8, 12, 24, 36, 48], num_classes=7
    ),
    "flatten": flat,
}
"""Small networks for images of 32 x 32 that have all operations of the runtime, together."""


def case_of(name: str, level: str, compact: Path) -> Case:
    """Write one of `NETWORKS` as a compact file; return its plan and what torch computes."""
    torch.manual_seed(0)
    model, plan = NETWORKS[name](), compact.with_suffix(".plan")
    export(model, compact, size=32)
    runtime.save_plan(compact, plan, level=level, threads=3, tune=False)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        wanted = model.double()(images.double())
    return Case(plan.read_bytes(), images, wanted)


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


def number_at(data: bytes, place: int) -> int:
    """Return an 8-byte number of a plan."""
    return int.from_bytes(data[place : place + 8], "little", signed=True)


def operations(data: bytes) -> int:
    """Return where the operations of a plan begin."""
    at = 184  # after the header; mean and standard deviation come first
    for _ in range(2):
        at = _part(at) + 4 * number_at(data, HEADER["channels"])
    return _part(at)


def member(data: bytes, kind: int, name: str) -> int:
    """Return the place of a member of the first operation of a kind; a table must be there."""
    size = ctypes.sizeof(bindings.Op)
    for i in range(number_at(data, HEADER["num_ops"])):
        place = operations(data) + i * size
        op = bindings.Op.from_buffer_copy(data, place)
        if op.kind == kind and getattr(op, name) is not None:
            return place + int(getattr(bindings.Op, name).offset)
    raise AssertionError(f"no operation of kind {kind} with {name}")


def table(data: bytes, kind: int, name: str) -> int:
    """Return the place of the first entry of a table of the first operation of a kind."""
    number = number_at(data, member(data, kind, name))
    count, pieces = (number_at(data, HEADER[n]) for n in ("num_ops", "num_pieces"))
    at = _part(operations(data) + count * ctypes.sizeof(bindings.Op))
    directory = _part(at + 24 * pieces)
    return number_at(data, directory + 16 * (number - 1))


def bits(value: float) -> int:
    """Return the bits of a float64 as a number."""
    (found,) = struct.unpack("<q", struct.pack("<d", value))
    return int(found)


def _part(place: int) -> int:
    return -(-place // 64) * 64
