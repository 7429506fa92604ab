"""Random networks of the operations that int8 computes, or of all operations; quantized files."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse import runtime
from sparse.runtime.graph import KERNELS, Node
from tests.sparse.runtime.conftest import prune_
from tests.sparse.runtime.random_networks import RandomNetwork
from tests.sparse.runtime.random_transformers import RandomGraph

ACTIVATIONS = (nn.ReLU, nn.ReLU, nn.ReLU6, nn.Identity)


class Residual(nn.Module):
    """A block of ResNet, with or without a convolution in the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(3))
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.projects = stride > 1 or inputs != outputs
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        return self.activation(y + (self.norms[2](self.short(x)) if self.projects else x))


class Joined(nn.Module):
    """Joined branches, a pool or none, and what reads them: convolutions, and perhaps a pool."""

    def __init__(self, rng: random.Random, inputs: int, outputs: int) -> None:
        super().__init__()
        sizes = rng.choices([4, 8, 12, 16, 17], [3, 3, 3, 3, 1], k=rng.randint(1, 3))
        self.branches = nn.ModuleList(self._branch(rng, inputs, size) for size in sizes)
        pool = nn.MaxPool2d(rng.choice([2, 3]), rng.choice([1, 2]), 1)
        self.pool = rng.choice([nn.Identity(), pool])
        self.own = rng.choice([nn.Identity(), nn.Identity(), nn.MaxPool2d(3, 1, 1)])
        self.keeps, self.nests = rng.random() < 0.3, rng.random() < 0.3
        channels = (sum(sizes) + self.keeps * inputs) * (1 + self.nests)
        self.first, self.second = (
            nn.Sequential(nn.Conv2d(channels, outputs, 1), rng.choice(ACTIVATIONS)()) for _ in "ab"
        )

    def _branch(self, rng: random.Random, inputs: int, outputs: int) -> nn.Module:
        conv = nn.Conv2d(inputs, outputs, *rng.choice([(1,), (3, 1, 1)]))
        return nn.Sequential(conv, rng.choice(ACTIVATIONS)())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([*(branch(x) for branch in self.branches), *[x] * self.keeps], 1)
        if self.nests:
            x = torch.cat([x, F.max_pool2d(x, 3, 1, 1)], 1)
        x = self.pool(x)
        return self.first(x) + self.second(self.own(x))


class Integers(nn.Sequential):
    """A network that a generator of random numbers has drawn, for images (3, size, size).

    With `joins` some values are float32 by definition, which the kernels may keep in bytes.
    """

    def __init__(self, rng: random.Random, size: int, *, joins: bool) -> None:
        super().__init__()
        self._rng, self._value = rng, torch.zeros(2, 3, size, size)
        for _ in range(rng.randint(1, 6)):
            kinds = [self._conv, self._conv, self._residual, self._pool, self._activation]
            rng.choice([*kinds, self._joined] if joins else kinds)()
        if rng.random() < 0.3:
            self._add(nn.Flatten())
        else:
            self._add(nn.AdaptiveAvgPool2d(1), *[nn.ReLU()] * rng.choice([0, 0, 0, 1]))
            if rng.random() < 0.3:
                self._add(nn.Conv2d(self._value.shape[1], 11, 1), rng.choice(ACTIVATIONS)())
            self._add(nn.Flatten())
        if rng.random() < 0.4:
            self._add(nn.Linear(self._value.shape[1], 9), rng.choice(ACTIVATIONS)())
        self._add(nn.Linear(self._value.shape[1], 7, bias=rng.random() < 0.5))
        self.eval()

    def _add(self, *layers: nn.Module) -> None:
        """Append layers if the value is large enough for them."""
        try:
            with torch.no_grad():
                self._value = nn.Sequential(*layers)(self._value)
        except RuntimeError:
            return
        for layer in layers:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight.data *= self._rng.choice([1, 1, 2, 4])
            self.append(layer)

    def _conv(self) -> None:
        channels, rng = self._value.shape[1], self._rng
        groups = rng.choice([1, 1, channels])
        outputs = rng.choice([4, 8, 12, 17, 32]) if groups == 1 else groups * rng.choice([1, 2])
        window = {"stride": rng.choice([1, 1, 2]), "padding": rng.choice([0, 1, 2])}
        window |= {"dilation": rng.choice([1, 1, 2]), "groups": groups}
        conv = nn.Conv2d(channels, outputs, rng.choice([1, 3, 3, 5]), **window)
        if rng.random() < 0.5:
            conv.bias = None
        norm = [nn.BatchNorm2d(outputs)] if rng.random() < 0.7 else []
        self._add(conv, *norm, rng.choice(ACTIVATIONS)())

    def _residual(self) -> None:
        outputs = self._rng.choice([4, 8, 17, self._value.shape[1]])
        activation = self._rng.choice(ACTIVATIONS)()
        self._add(Residual(self._value.shape[1], outputs, self._rng.choice([1, 2]), activation))

    def _joined(self) -> None:
        self._add(Joined(self._rng, self._value.shape[1], self._rng.choice([4, 8, 17])))

    def _pool(self) -> None:
        ceil_mode, kernel = self._rng.random() < 0.3, self._rng.choice([2, 3])
        self._add(nn.MaxPool2d(kernel, self._rng.choice([1, 2]), 1, ceil_mode=ceil_mode))

    def _activation(self) -> None:
        self._add(self._rng.choice(ACTIVATIONS)())


def draw(seed: int, *, joins: bool = False) -> tuple[Integers, Tensor, dict[str, Any]]:
    """Return a random network, images for it, and how it is to be pruned and quantized."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    size = rng.choice([5, 8, 13, 24, 32])
    model = Integers(rng, size, joins=joins)
    how = {"method": rng.choice(runtime.METHODS), "density": rng.choice([0.1, 0.4, 1.0])}
    how["stretch"] = rng.choice([1.0, 1.0, 0.4, 1.7])
    return model, torch.randn(3, 3, size, size) * 1.5, how


def with_heads(model: nn.Module) -> nn.Module:
    """Fill the parameters that are all zero, as torchvision's heads are; return the network."""
    for parameter in model.eval().parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model


def draw_mixed(
    seed: int, *, is_square: bool = False
) -> tuple[Sequence[Node], dict[str, Tensor], Tensor]:
    """Return a random graph of all operations of the runtime, its state, and images for it."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    while True:
        size = rng.randint(1, 4), rng.choice([5, 8, 13, 24, 32]), rng.choice([7, 16, 33])
        size = (size[0], *[min(size[1], 24)] * 2) if is_square else size
        if rng.random() < 0.5:
            drawn = RandomGraph(rng, size)
            nodes, state = drawn.nodes, drawn.state
        else:
            model = RandomNetwork(rng, *size)
            nodes, state = runtime.trace(model), model.state_dict()
        if any(node.op in KERNELS for node in nodes):
            return nodes, state, torch.randn(3, *size)


def write(
    path: Path,
    model: nn.Module,
    *,
    size: int,
    density: float = 0.4,
    masks: dict[str, Tensor] | None = None,
    **how: Any,
) -> runtime.Compact:
    """Prune, quantize and save a network, with random images; return the content of the file."""
    masks = prune_(model.eval(), density) if masks is None else masks
    nodes, state = runtime.trace(model, image_size=size), model.state_dict()
    return write_graph(path, nodes, state, masks, shape=(3, size, size), **how)


def write_graph(
    path: Path,
    nodes: Sequence[Node],
    state: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    shape: tuple[int, ...],
    method: str = "mse",
    stretch: float = 1.0,
) -> runtime.Compact:
    """Quantize and save a graph, with random images; return the content of the file.

    Scales are multiplied by `stretch`: values saturate, or a ReLU6 ends below 255.
    """
    images = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1))
    nodes, activations = runtime.calibrate(nodes, state, images.split(4), method=method)
    activations = {
        name: (float(np.float32(scale * stretch)), zero_point)
        for name, (scale, zero_point) in activations.items()
    }
    runtime.save(
        path,
        state,
        masks,
        nodes=nodes,
        arch="some",
        model={},
        in_channels=shape[0],
        image_size=shape[1],
        mean=(0.0,) * shape[0],
        std=(1.0,) * shape[0],
        dtype="int8",
        fold=True,
        activations=activations,
    )
    return runtime.read(path)
