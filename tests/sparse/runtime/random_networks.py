"""Random networks over everything that `runtime.trace` accepts, and random ways to compute them."""

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse import runtime
from sparse.runtime import arrange, bindings, execution_order, execution_plan
from sparse.runtime.arrange import Arrangement, banded_grids
from sparse.runtime.execution_plan import Choice, ExecutionPlan, can_share, dense_choices, tiles
from sparse.runtime.layout import out_size
from sparse.runtime.network import Network

TOLERANCE = 1e-4

Pair = tuple[int, int]


@dataclass
class Step:
    """One operation on earlier values, known by their numbers; 0 is the image."""

    operation: Callable[..., Tensor]
    inputs: tuple[int, ...]


class RandomNetwork(nn.Module):
    """A network that a generator of random numbers has drawn, for images of one size."""

    def __init__(self, rng: random.Random, channels: int, height: int, width: int) -> None:
        super().__init__()
        self._rng = rng
        self._steps: list[Step] = []
        self._shapes = [(channels, height, width)]
        self._shared = {0}  # what must not be overwritten: the image, and what chunks may share
        self.layers = nn.ModuleList()
        for _ in range(rng.randint(1, 7)):
            draw = rng.choices(
                [
                    *(self._conv, self._block, self._norm, self._activation, self._pool),
                    *(self._sum, self._gate, self._concat, self._chunk, self._shuffle),
                    *(self._dense_block, self._adaptive_pool),
                ],
                [5, 2, 1, 3, 2, 2, 1, 2, 1, 1, 1, 1],
            )[0]
            draw(rng.choice([-1, -1, -1, rng.randrange(len(self._shapes))]))
        layers = (nn.Conv2d, nn.BatchNorm2d)
        if not any(isinstance(self._steps[i - 1].operation, layers) for i in self._read() if i):
            self._norm(-1)  # perhaps nothing was computed
        if rng.random() < 0.5:
            self._classifier()
        self._needed = self._read()
        self.eval()

    def _read(self) -> set[int]:
        """Return the numbers of the values that are needed: what is not read is not computed."""
        needed = {len(self._steps)}
        for i, step in reversed(list(enumerate(self._steps, 1))):
            needed |= set(step.inputs) if i in needed else set()
        return needed

    def forward(self, x: Tensor) -> Tensor:
        values = {0: x}
        for i, step in enumerate(self._steps, 1):
            if i in self._needed:
                values[i] = step.operation(*(values[j] for j in step.inputs))
        return values[len(self._steps)]

    def _append(self, operation: object, inputs: Pair | tuple[int], shape: tuple[int, ...]) -> None:
        if isinstance(operation, nn.Module):
            self.layers.append(operation)
        size = len(self._shapes)
        self._steps.append(Step(operation, tuple(i % size for i in inputs)))
        self._shapes.append(shape)

    def _pair(self, *sizes: int) -> Pair:
        pair = self._rng.choice(sizes), self._rng.choice(sizes)
        return pair if self._rng.random() < 0.5 else (pair[0], pair[0])

    def _window(self, source: int, module: Callable[..., nn.Module], **options: object) -> bool:
        """Append a layer with a window if the window fits the image."""
        channels, *size = self._shapes[source]
        made = module(**options)
        found = []
        for axis, n in enumerate(size):
            values = (made.kernel_size, made.stride, made.padding, getattr(made, "dilation", 1))
            window = (v if isinstance(v, int) else v[axis] for v in values)
            found.append(out_size(n, *window, ceil_mode=getattr(made, "ceil_mode", False)))
        if min(found) < 1 or found[0] * found[1] > 4000:
            return False
        if isinstance(made, nn.Conv2d):
            self._prune_(made)
            channels = made.out_channels
        self._append(made, (source,), (channels, *found))
        return True

    def _prune_(self, layer: nn.Conv2d | nn.Linear) -> None:
        density = self._rng.choice([0.0, 0.05, 0.3, 0.6, 1.0])
        fan_in = layer.weight[0].numel()
        nn.init.normal_(layer.weight, std=(max(density, 0.1) * fan_in) ** -0.5)
        layer.weight.data[torch.rand(layer.weight.shape) >= density] = 0

    def _conv(self, source: int) -> None:
        channels = self._shapes[source][0]
        groups = self._rng.choice([1, 1, 1, *(g for g in (2, 3, channels) if channels % g == 0)])
        self._window(
            source,
            nn.Conv2d,
            in_channels=channels,
            out_channels=groups * self._rng.choice([1, 2, 5, 8, 17]) if groups < 4 else groups,
            kernel_size=self._pair(1, 1, 2, 3, 3, 3, 4, 5, 7),
            stride=self._pair(1, 1, 1, 2, 2, 3, 4),
            padding=self._pair(0, 0, 1, 1, 2, 3),
            dilation=self._pair(1, 1, 1, 2, 3),
            groups=groups,
            bias=self._rng.random() < 0.5,
        )

    def _block(self, source: int) -> None:
        """Append a residual block; its sum is folded into one of its convolutions."""
        channels = self._shapes[source][0]
        source %= len(self._shapes)
        options = {"in_channels": channels, "out_channels": channels}
        last = source
        for _ in range(self._rng.randint(1, 2)):
            self._window(last, nn.Conv2d, kernel_size=3, padding=1, **options)
            last = -1
            if self._rng.random() < 0.5:
                self._norm(-1)
        if self._shapes[-1] == self._shapes[source]:
            self._append(self._adder(), (-1, source), self._shapes[-1])
        self._activation(-1)

    def _norm(self, source: int) -> None:
        shape = self._shapes[source]
        norm = nn.BatchNorm2d(shape[0])
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        self._append(norm, (source,), shape)

    def _activation(self, source: int) -> None:
        inplace = functools.partial(F.relu, inplace=True)
        relus = [nn.ReLU(), nn.ReLU(inplace=True), F.relu, inplace, torch.relu, nn.Identity()]
        others = [nn.ReLU6(), F.relu6, nn.SiLU(True), F.silu, nn.Hardswish(), F.hardswish]
        others += [nn.Hardsigmoid(), F.hardsigmoid, nn.Sigmoid(), torch.sigmoid, nn.GELU(), F.gelu]
        others += [nn.GELU(approximate="tanh"), functools.partial(F.gelu, approximate="tanh")]
        if source % len(self._shapes) in self._shared:
            relus = others = [F.relu, nn.GELU()]
        kinds = self._rng.choice([relus, others])
        self._append(self._rng.choice(kinds), (source,), self._shapes[source])

    def _pool(self, source: int) -> None:
        kernel = self._pair(1, 2, 2, 3, 3, 4, 5)
        padding = tuple(self._rng.randint(0, k // 2) for k in kernel)
        options = {"kernel_size": kernel, "padding": padding}
        if self._rng.random() < 0.7:
            options["stride"] = self._pair(1, 2, 2, 3, 4)
        kind = self._rng.choice([nn.MaxPool2d, nn.AvgPool2d])
        if kind is nn.MaxPool2d and self._rng.random() < 0.3:
            options["ceil_mode"] = True
        self._window(source, kind, **options)

    def _adder(self) -> Callable[[Tensor, Tensor], Tensor]:
        return self._rng.choice([torch.add, lambda x, y: x + y])

    def _sum(self, source: int) -> None:
        shape = self._shapes[source]
        other = self._rng.choice([i for i, s in enumerate(self._shapes) if s == shape])
        self._append(self._adder(), (source, other), shape)

    def _concat(self, source: int) -> None:
        size = self._shapes[source][1:]
        others = [i for i, shape in enumerate(self._shapes) if shape[1:] == size]
        parts = [source, *self._rng.choices(others, k=self._rng.choice([0, 1, 1, 2, 3]))]
        self._rng.shuffle(parts)
        channels = sum(self._shapes[i][0] for i in parts)
        if channels <= 60:
            self._append(lambda *x: torch.cat(x, 1), tuple(parts), (channels, *size))

    def _dense_block(self, source: int) -> None:
        """Append layers of which each reads all earlier ones, as in DenseNet."""
        parts = [source % len(self._shapes)]
        for _ in range(self._rng.randint(1, 3)):
            channels = sum(self._shapes[i][0] for i in parts)
            if channels > 60:
                break
            shape = (channels, *self._shapes[source][1:])
            self._append(lambda *x: torch.cat(x, 1), tuple(parts), shape)
            if self._rng.random() < 0.5:
                self._norm(-1)
            if not self._window(
                -1, nn.Conv2d, in_channels=channels, out_channels=5, kernel_size=3, padding=1
            ):
                break
            parts.append(len(self._shapes) - 1)

    def _chunk(self, source: int) -> None:
        source %= len(self._shapes)
        channels, *size = self._shapes[source]
        groups = self._rng.choice([g for g in (1, 2, 3, 4) if channels % g == 0])
        self._shared |= set(range(len(self._shapes) + groups))
        for index in self._rng.sample(range(groups), self._rng.randint(1, min(groups, 2))):
            self._append(
                lambda x, i=index: x.chunk(groups, 1)[i],
                (source,),
                (channels // groups, *size),
            )

    def _shuffle(self, source: int) -> None:
        channels = self._shapes[source][0]
        groups = self._rng.choice([g for g in (2, 3, 5, channels) if channels % g == 0])

        def by_views(x: Tensor) -> Tensor:
            n, c, h, w = x.size()
            x = x.view(n, groups, c // groups, h, w)
            return torch.transpose(x, 1, 2).contiguous().view(n, -1, h, w)

        self._shared |= set(range(len(self._shapes) + 1))
        shuffle = self._rng.choice([nn.ChannelShuffle(groups), by_views])
        self._append(shuffle, (source,), self._shapes[source])

    def _adaptive_pool(self, source: int) -> None:
        channels, *size = self._shapes[source]
        found = [self._rng.choice([k for k in range(1, n + 1) if n % k == 0]) for n in size]
        if found != [1, 1]:
            self._append(nn.AdaptiveAvgPool2d(found), (source,), (channels, *found))

    def _gate(self, source: int) -> None:
        channels = self._shapes[source][0]
        gate = Gate(self._rng, channels)
        for layer in gate.modules():
            if isinstance(layer, nn.Conv2d):
                self._prune_(layer)
        self._append(gate, (source,), self._shapes[source])

    def _classifier(self) -> None:
        channels = self._shapes[-1][0]
        pixels = self._shapes[-1][1] * self._shapes[-1][2]
        sizes = self._rng.choice([(), (7,), (9, 4), (33, 1)])
        if sizes and channels * pixels < 2000 and self._rng.random() < 0.4:
            self._append(nn.Flatten(), (-1,), (channels * pixels,))
            if self._rng.random() < 0.3:
                self._activation(-1)
        elif self._rng.random() < 0.3:
            self._append(lambda x: x.mean((2, 3)), (-1,), (channels,))
        else:
            self._append(nn.AdaptiveAvgPool2d(1), (-1,), (channels, 1, 1))
            if self._rng.random() < 0.3:
                self._activation(-1)
            self._append(nn.Flatten(), (-1,), (channels,))
        for size in sizes:
            layer = nn.Linear(self._shapes[-1][0], size, bias=self._rng.random() < 0.5)
            self._prune_(layer)
            self._append(layer, (-1,), (size,))
            while self._rng.random() < 0.5:
                self._activation(-1)


class Gate(nn.Module):
    """Multiplies the channels of a map by what is computed from their means."""

    def __init__(self, rng: random.Random, channels: int) -> None:
        super().__init__()
        width = rng.choice([1, 3, 8, 17])
        self._pool = rng.choice([nn.AdaptiveAvgPool2d(1), lambda x: x.mean((2, 3), keepdim=True)])
        self._into = nn.Conv2d(channels, width, 1)
        self._back = nn.Conv2d(width, channels, 1, bias=rng.random() < 0.5)
        self._function = rng.choice([F.relu, F.silu])
        self._gate = rng.choice([torch.sigmoid, F.hardsigmoid])
        self._first = rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        gate = self._gate(self._back(self._function(self._into(self._pool(x)))))
        return gate * x if self._first else x * gate


class RandomChoices:
    """Stands in for a tuner: computes every convolution in a random way."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def tune(self, plan: ExecutionPlan, kernels: bindings.Kernels) -> None:
        for operation in plan.convolutions():
            dense = dense_choices(operation)
            if dense and self._rng.random() < 0.3:
                plan.choose(operation, self._rng.choice(dense))
                continue
            groups = list(kernels.max_tiles) if can_share(operation) else [1]
            group = self._rng.choice(groups)
            tile = self._rng.choice(tiles(operation, kernels.max_tiles[group]))
            plan.choose(
                operation,
                Choice(
                    group=group,
                    tile_vectors=tile.tile_vectors,
                    tile_rows=tile.tile_rows,
                    num_blocks=self._rng.choice([1, 1, 2, 3]),
                    panel=self._rng.choice([0, 0, 16]),
                ),
            )


def save(model: nn.Module, path: Path, *, in_channels: int, fold: bool) -> None:
    runtime.save(
        path,
        model.state_dict(),
        {},
        nodes=runtime.trace(model),
        arch="random",
        model={},
        image_size=32,
        mean=(0.0,) * in_channels,
        std=(1.0,) * in_channels,
        in_channels=in_channels,
        fold=fold,
    )


def compare(seed: int, kernels: bindings.Kernels, path: Path) -> int:
    """Draw a network, run it for some sizes and batches, and compare it with torch.

    Returns:
        The runs that were compared; a size that torch refuses has to be refused and is none.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    sizes = [1, 2, 3, 5, 7, 8, 13, 16, 17, 28, 31, 33, 40, 56]
    channels, height, width = rng.randint(1, 4), rng.choice(sizes), rng.choice(sizes)
    model = RandomNetwork(rng, channels, height, width)
    save(model, path, in_channels=channels, fold=rng.random() < 0.5)
    exact = RandomNetwork.double(model)
    runs = 0
    others = [(height, width), (rng.choice(sizes), rng.choice(sizes))]
    networks = [
        Network(path, threads=threads, kernels=kernels, tuner=tuner(rng)) for threads in (1, 3)
    ]
    for network, (h, w) in itertools.product(networks, others):
        images = torch.randn(rng.choice([1, 2, 4]), channels, h, w)
        wanted: Tensor | None = None
        try:
            with torch.no_grad():
                wanted = exact(images.double())
        except RuntimeError:
            pass
        with another_plan(rng, h, w, kernels.num_lanes):
            found = _run(network, images)
        if isinstance(found, str):
            needed = ("the sum", "there are joined", "pixels per channel", "must be divisors")
            assert wanted is None or any(map(found.__contains__, needed)), (seed, h, w, found)
            continue
        assert wanted is not None, (seed, h, w)
        assert found.shape == wanted.shape, (seed, h, w)
        assert torch.isfinite(found).all(), (seed, h, w)
        error = float((found - wanted).abs().max())
        assert error <= TOLERANCE * max(1e-3, float(wanted.abs().max())), (seed, h, w, error)
        runs += 1
    return runs


def _run(network: Network, images: Tensor) -> Tensor | str:
    """Return the logits, or why the images are refused."""
    try:
        return network(images)
    except ValueError as error:
        return str(error)


def tuner(rng: random.Random) -> RandomChoices | None:
    return RandomChoices(rng) if rng.random() < 0.7 else None


@contextmanager
def another_plan(rng: random.Random, height: int, width: int, lanes: int) -> Iterator[None]:
    """Let a plan have bands, or go through the network row by row, as for larger images."""
    arranged = arrange.arrange
    with mock.patch.object(arrange, "MAX_WASTE", 4.0):
        grids = banded_grids(height, width, lanes=lanes)
    if grids and rng.random() < 0.4:
        arranged = functools.partial(Arrangement, grid=rng.choice(grids))
    cache = rng.choice([execution_order.core_cache(), 512, 4096])
    waiting = mock.patch.multiple(
        execution_order,
        core_cache=lambda: cache,
        MAX_WORK=rng.choice([execution_order.MAX_WORK, 1e9]),
    )
    with mock.patch.object(execution_plan, "arrange", arranged), waiting:
        yield
