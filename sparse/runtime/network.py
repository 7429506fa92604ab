"""A network that runs: `load(path)(images)`."""

import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..native.library import BuildError, check_level, cpu_level, default_cache
from . import bindings, graph, integers
from .check import Shape, check_images, check_shapes, linear_columns
from .execution_plan import ExecutionPlan
from .format import Compact, read
from .graph import Node
from .header import Header
from .int8 import integer_layers
from .integers import IntegerNetwork
from .lower import Layer, lower
from .tune import Tuner

Images = Tensor | npt.NDArray[np.float32]


class Network:
    """A trained network, ready to classify images; made by `load`.

    Several threads may call a network at a time. Each call has its own activations, so the calls
    run side by side. An image size is planned and tuned once.

    Attributes:
        header: What the file says about the network.
        backend: "native" or "torch".
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int,
        kernels: bindings.Kernels | None,
        tuner: Tuner | None,
    ) -> None:
        self._path = path
        compact = read(path)
        self.header: Header = compact.header
        self.backend = "torch" if kernels is None else "native"
        in_channels = self.header.in_channels
        self._check_size = size_check(
            self.header.nodes, compact.shapes, in_channels, folded=self.header.folded
        )
        self._engine: Engine | None = None
        self._integers: IntegerNetwork | None = None
        self._state: dict[str, Tensor] = {}
        if kernels is not None:
            self._engine = Engine(
                layers_of(compact),
                self._check_size,
                in_channels=in_channels,
                threads=threads,
                kernels=kernels,
                tuner=tuner,
            )
        elif self.header.activations:
            self._integers = compact.integers()
        else:
            self._state = compact.state_dict()

    def __call__(self, images: Images) -> Any:
        """Return the logits (N, K) of images (N, C, H, W) or of one image (C, H, W).

        Args:
            images: float32 on the CPU, normalized with the header's mean and std. The logits are
                a NumPy array or a tensor, as the images are.

        Raises:
            ValueError: The images are not float32, have a shape that the network does not take, or
                are too small or too large.
        """
        return classify(images, self.header.in_channels, self._run)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the dense state dict, read again from the file: the runtime keeps no copy."""
        return read(self._path).state_dict()

    def program(self, height: int, width: int) -> "Program":
        """Return the program for images of a size. The first call plans and tunes it.

        Raises:
            ValueError: The images are too small or too large, or the backend is torch, which has
                no program of its own.
        """
        if self._engine is None:
            raise ValueError("the torch backend has no program of its own")
        return self._engine.program(height, width)

    def _run(self, images: Tensor) -> Tensor:
        if self._engine is not None:
            return self._engine.program(*images.shape[2:]).run(images.contiguous())
        self._check_size(*images.shape[2:])
        with torch.inference_mode():
            if self._integers is not None:
                return integers.run(self._integers, images)
            return graph.run(self.header.nodes, self._state, images).clone()


def classify(images: Images, in_channels: int, run: Callable[[Tensor], Tensor]) -> Any:
    """Return what `run` computes of a batch; the arguments and errors are those of `Network`."""
    tensor = images if isinstance(images, Tensor) else torch.from_numpy(images)
    tensor = tensor.detach()
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ValueError(
            f"images must be float32 on the CPU, got {tensor.dtype} on {tensor.device}"
        )
    if tensor.dim() not in (3, 4) or tensor.shape[-3] != in_channels:
        raise ValueError(f"images must be (N, {in_channels}, H, W), got {tuple(tensor.shape)}")
    logits = run(tensor[None] if tensor.dim() == 3 else tensor)
    logits = logits[0] if tensor.dim() == 3 else logits
    return logits if isinstance(images, Tensor) else logits.numpy()


def size_check(
    nodes: Sequence[Node], shapes: Mapping[str, Shape], in_channels: int, *, folded: bool = False
) -> Callable[[int, int], None]:
    """Return the check of `check_images` for a graph whose weights have the shapes.

    Raises:
        ValueError: The weights do not fit the graph.
    """
    channels = check_shapes(nodes, shapes, in_channels=in_channels, folded=folded)
    return functools.partial(check_images, nodes, channels, linear_columns(shapes))


class Engine:
    """Layers that the kernels run. An image size is planned and tuned once.

    Args:
        layers: Those of a network.
        check_size: Raises a ValueError for a height and width that the network does not take.
        in_channels: Channels of the images.
        threads: Between which the work of a call is split.
        kernels: Run the graph.
        tuner: Decides how layers are computed; None: a fixed rule does.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        check_size: Callable[[int, int], None],
        *,
        in_channels: int,
        threads: int,
        kernels: bindings.Kernels,
        tuner: Tuner | None,
    ) -> None:
        self._threads, self._kernels, self._tuner = threads, kernels, tuner
        self._in_channels = in_channels
        self._layers, self._check_size = layers, check_size
        self._programs: dict[tuple[int, int], Program] = {}
        self._planning = threading.Lock()

    def program(self, height: int, width: int) -> "Program":
        """Return the program for images of a size. The first call plans and tunes it.

        Raises:
            ValueError: The images are too small or too large.
        """
        found = self._programs.get((height, width))
        if found is not None:
            return found
        with self._planning:
            if (height, width) not in self._programs:
                self._programs[height, width] = self._plan(height, width)
            return self._programs[height, width]

    def _plan(self, height: int, width: int) -> "Program":
        self._check_size(height, width)
        size = (self._in_channels, height, width)
        plan = ExecutionPlan(
            self._layers, size, lanes=self._kernels.num_lanes, num_parts=self._threads
        )
        if self._tuner is not None:
            self._tuner.tune(plan, self._kernels)
        return Program(plan, self._kernels, self._threads)


def layers_of(compact: Compact) -> list[Layer]:
    """Return the layers of a network, in int8 if the network is quantized."""
    header = compact.header
    if header.activations:
        return integer_layers(compact.integers(), in_channels=header.in_channels)
    return lower(header.nodes, compact.state_dict(), in_channels=header.in_channels)


class Program:
    """An execution plan that the kernels run, with its memory and threads.

    Attributes:
        threads: Number of threads that the system has started for a call. If it is smaller than
            the number asked for, a warning says so.
    """

    def __init__(self, plan: ExecutionPlan, kernels: bindings.Kernels, threads: int) -> None:
        self.plan, self._kernels, self._wanted = plan, kernels, threads
        # Handles, each with arenas and threads, that no call is using. There are as many handles
        # as there have been calls at the same time.
        self._idle = [self._create()]
        self.threads = int(kernels.threads(self._idle[0]))
        if self.threads < threads:
            warnings.warn(
                f"the system has started {self.threads} of {threads} threads: the network runs "
                "on them",
                stacklevel=7,
            )

    def __del__(self) -> None:
        for handle in getattr(self, "_idle", []):
            self._kernels.destroy(handle)

    def _create(self) -> int:
        handle = self.plan.create(self._kernels, threads=self._wanted)
        if not handle:
            raise MemoryError(f"no memory for {4 * self.plan.arena_size} bytes of activations")
        return handle

    @contextmanager
    def _handle(self) -> Iterator[int]:
        """Lend a handle to one call; another call at the same time gets its own."""
        try:
            handle = self._idle.pop()
        except IndexError:
            handle = self._create()
        try:
            yield handle
        finally:
            self._idle.append(handle)

    def run(self, images: Tensor) -> Tensor:
        """Return the logits of contiguous images (N, C, H, W)."""
        logits = torch.empty(len(images), *self.plan.out_shape, dtype=torch.float32, device="cpu")
        with self._handle() as handle:
            failed = self._kernels.run(
                handle,
                images.data_ptr(),
                images[:1].numel(),
                logits.data_ptr(),
                math.prod(self.plan.out_shape),
                len(images),
            )
        if failed:
            raise MemoryError("no memory for the activations of another thread")
        return logits

    def profile(self, image: Tensor) -> list[float]:
        """Return the processor seconds of each operation of the plan, for one image."""
        seconds = np.zeros(len(self.plan.operations))
        logits = torch.empty(self.plan.out_shape, dtype=torch.float32, device="cpu")
        with self._handle() as handle:
            self._kernels.profile(handle, image.data_ptr(), logits.data_ptr(), seconds.ctypes.data)
        return [float(s) for s in seconds]


def load(
    path: str | Path,
    *,
    threads: int = 1,
    backend: str = "auto",
    level: str | None = None,
    tune: bool = True,
    cache: str | Path | None = None,
) -> Network:
    """Return the network of a compact file.

    Args:
        path: Written by `save` (export.py).
        threads: A single image is split between them. A batch is distributed image by image.
        backend: "native" (compiled kernels), "torch", or "auto": native, or torch with a warning if
            the machine cannot compile the kernels.
        level: Instruction set of the kernels, one of `sparse.native.library.LEVELS`; by default the
            processor's best.
        tune: Measure, once per model of processor and layer, how each layer is computed fastest.
            Otherwise a fixed rule decides.
        cache: Directory of compiled kernels and measurements; by default beside torch's caches.
            If it cannot be written, measurements last as long as the process.

    Raises:
        ValueError: The file is damaged or foreign, or an argument is out of range; one line.
        BuildError: The backend is "native" and the machine cannot compile the kernels.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if backend not in ("auto", "native", "torch"):
        raise ValueError(f"backend must be auto, native or torch, got {backend!r}")
    if level is not None:
        check_level(level)
    directory = default_cache() if cache is None else Path(cache)
    kernels = None
    if backend != "torch":
        try:
            kernels = bindings.load(level or cpu_level(), directory)
        except BuildError as error:
            if backend == "native":
                raise
            warnings.warn(f"torch runs the network, dense: {error}", stacklevel=2)
    tuner = Tuner(directory) if tune and kernels is not None else None
    return Network(Path(path), threads=threads, kernels=kernels, tuner=tuner)
