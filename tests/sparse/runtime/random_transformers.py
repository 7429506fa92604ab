"""Random graphs over the operations of transformers and ConvNeXt, computed in random ways."""

import random
from pathlib import Path

import torch
from torch import Tensor

from sparse import runtime
from sparse.runtime import bindings, graph
from sparse.runtime.graph import ACTIVATIONS, INPUT, Node
from sparse.runtime.network import Network
from tests.sparse.runtime.random_networks import TOLERANCE, another_plan, tuner

Shape = tuple[int, int, int]


class RandomGraph:
    """Nodes and weights that a generator of random numbers has drawn, for images of one size."""

    def __init__(self, rng: random.Random, shape: Shape) -> None:
        self._rng, self._num_prefixes = rng, 0
        self.nodes: list[Node] = []
        self.state: dict[str, Tensor] = {}
        self._values: list[tuple[str, Shape]] = [(INPUT, shape)]
        self._conv()
        for _ in range(rng.randint(1, 8)):
            draw = rng.choices(
                [
                    *(self._conv, self._linear, self._norm, self._scale, self._prepend),
                    *(self._embedding, self._attention, self._activation, self._sum),
                ],
                [2, 3, 3, 1, 1, 1, 3, 1, 2],
            )[0]
            draw()
        if rng.random() < 0.6:
            self._classifier()
        needed = {self.nodes[-1].name}  # a graph has no value that nobody reads
        for node in reversed(self.nodes):
            needed |= set(node.inputs) if node.name in needed else set()
        self.nodes = [node for node in self.nodes if node.name in needed]

    def _add(self, op: str, shape: Shape, *others: str, **values: object) -> None:
        inputs = (self._values[-1][0], *others)
        self.nodes.append(Node(name=f"v{len(self.nodes)}", op=op, inputs=inputs, **values))
        self._values.append((self.nodes[-1].name, shape))

    def _prefix(self) -> str:
        self._num_prefixes += 1
        return f"p{self._num_prefixes}."

    def _entry(self, *shape: int) -> str:
        name = self._prefix()
        self.state[name] = torch.randn(shape)
        return name

    def _weight(self, out: int, *fan_in: int) -> str:
        """Add weights of a random density, and perhaps a bias; return their prefix."""
        density = self._rng.choice([0.0, 0.1, 0.5, 1.0])
        weight = torch.randn(out, *fan_in)
        weight *= (max(density, 0.1) * weight[0].numel()) ** -0.5
        weight[torch.rand(weight.shape) >= density] = 0
        prefix = self._prefix()
        self.state[prefix + "weight"] = weight
        if self._rng.random() < 0.7:
            self.state[prefix + "bias"] = torch.randn(out)
        return prefix

    def _conv(self) -> None:
        channels, height, width = self._values[-1][1]
        window = self._rng.choice([(1, 1, 0), (3, 1, 1), (7, 1, 3), (2, 2, 0), (4, 4, 0)])
        kernel, stride, padding = window
        size = [(s + 2 * padding - kernel) // stride + 1 for s in (height, width)]
        if min(size) < 1:
            return
        out = self._rng.choice([6, 12, 18])
        prefix = self._weight(out, channels, kernel, kernel)
        options = {"kernel": (kernel,) * 2, "stride": (stride,) * 2, "padding": (padding,) * 2}
        self._add("conv", (out, *size), parameters=prefix, **options)

    def _linear(self) -> None:
        channels, *size = self._values[-1][1]
        out = self._rng.choice([3, 6, 12, 24, 33])
        self._add("pixel_linear", (out, *size), parameters=self._weight(out, channels))

    def _norm(self) -> None:
        shape = self._values[-1][1]
        prefix = self._prefix()
        if self._rng.random() < 0.8:
            self.state[prefix + "weight"] = torch.randn(shape[0])
            self.state[prefix + "bias"] = torch.randn(shape[0])
        self._add("layer_norm", shape, parameters=prefix, eps=self._rng.choice([1e-6, 1e-2]))

    def _scale(self) -> None:
        shape = self._values[-1][1]
        self._add("scale", shape, parameters=self._entry(shape[0], 1, 1))

    def _prepend(self) -> None:
        channels, height, width = self._values[-1][1]
        count = self._rng.choice([1, 1, 4])
        entry = self._entry(1, count, channels)
        shape = (channels, 1, count + height * width)
        self._add("prepend", shape, parameters=entry, size=(height, width), tokens=count)

    def _embedding(self) -> None:
        channels, height, width = self._values[-1][1]
        entry = self._entry(1, height * width, channels)
        self._add("embedding", (channels, height, width), parameters=entry, size=(height, width))

    def _attention(self) -> None:
        """Add the projection of queries, keys and values, and the attention."""
        channels, *size = self._values[-1][1]
        heads, width = self._rng.choice([1, 2, 3]), self._rng.choice([1, 4, 7, 16])
        out = 3 * heads * width
        self._add("pixel_linear", (out, *size), parameters=self._weight(out, channels))
        scale = self._rng.choice([width**-0.5, 2.0])
        self._add("attention", (heads * width, *size), heads=heads, score_scale=scale)

    def _activation(self) -> None:
        self._add(self._rng.choice(ACTIVATIONS), self._values[-1][1])

    def _sum(self) -> None:
        shape = self._values[-1][1]
        self._add("add", shape, self._rng.choice([n for n, s in self._values if s == shape]))

    def _classifier(self) -> None:
        channels, height, width = self._values[-1][1]
        if self._rng.random() < 0.5:
            self._add("mean_pool", (channels, 1, 1))
        else:
            self._add("token", (channels, 1, 1), index=self._rng.randrange(height * width))
        if self._rng.random() < 0.5:
            self._norm()
        for out in self._rng.choice([(), (5,), (9, 4)]):
            self._add("linear", (out, 1, 1), parameters=self._weight(out, channels))
            channels = out
            if self._rng.random() < 0.5:
                self._activation()


def save(found: RandomGraph, path: Path, channels: int) -> None:
    runtime.save(
        path,
        found.state,
        {name: value != 0 for name, value in found.state.items() if name.endswith("weight")},
        nodes=found.nodes,
        arch="random",
        model={},
        image_size=32,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        in_channels=channels,
    )


def compare(seed: int, kernels: list[bindings.Kernels], path: Path) -> None:
    """Draw a graph, run it with each of the kernels on 1 and 3 threads, and compare with torch."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    sides = [1, 2, 5, 8, 14, 17, 31, 40]
    shape = rng.randint(1, 4), rng.choice(sides), rng.choice(sides)
    found = RandomGraph(rng, shape)
    save(found, path, shape[0])
    images = torch.randn(rng.choice([1, 2, 4]), *shape)
    state = {name: value.double() for name, value in found.state.items()}
    wanted = graph.run(found.nodes, state, images.double())
    for each in kernels:
        for threads in (1, 3):
            network = Network(path, threads=threads, kernels=each, tuner=tuner(rng))
            with another_plan(rng, *shape[1:], each.num_lanes):
                logits = network(images)
            assert logits.shape == wanted.shape, (seed, each.num_lanes)
            assert torch.isfinite(logits).all(), (seed, each.num_lanes)
            error = float((logits - wanted).abs().max())
            most = max(1e-3, float(wanted.abs().max()))
            assert error <= TOLERANCE * most, (seed, each.num_lanes, threads, error, most)
