"""Random graphs over the operations of transformers and ConvNeXt, computed in random ways."""

import random
from collections.abc import Callable
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
                    *(self._windows, self._slice, self._merge),
                ],
                [2, 3, 3, 1, 1, 1, 2, 1, 2, 6, 1, 1],
            )[0]
            draw()
        if rng.random() < 0.6:
            self._classifier()
        needed = {self.nodes[-1].name}  # a graph has no value that nobody reads
        for node in reversed(self.nodes):
            needed |= set(node.inputs) if node.name in needed else set()
        self.nodes = [node for node in self.nodes if node.name in needed]

    def in_float64(self) -> Callable[[Tensor], Tensor]:
        """Return what torch computes; later changes of the state are not seen."""
        state = {k: v.double() if v.is_floating_point() else v for k, v in self.state.items()}
        return lambda images: graph.run(self.nodes, state, images.double())

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

    def _windows(self) -> None:
        """Add an attention in windows, for which the map may have to be padded."""
        channels, *size = self._values[-1][1]
        window = tuple(self._rng.choice([1, 2, 2, 3, 4, 7]) for _ in size)
        padded = [-(-s // w) * w for s, w in zip(size, window, strict=True)]
        if padded != size:
            self._add("slice", (channels, *padded), output=tuple(padded))
        heads, width = self._rng.choice([1, 2, 3]), self._rng.choice([1, 4, 7])
        qkv, name = self._weight(3 * heads * width, channels), self._prefix()
        options = {"heads": heads, "window": window, "spread": self._rng.random() < 0.4}
        if not options["spread"] and self._rng.random() < 0.6:
            options["shift"] = tuple(self._rng.randrange(w) for w in window)
        cosine = self._rng.random() < 0.4
        options |= {"cosine": True} if cosine else {"score_scale": self._rng.choice([0.5, 2.0])}
        if cosine:
            self.state[name + "logit_scale"] = 2 + torch.randn(heads, 1, 1)
        position_bias = self._rng.choice(["", "table", "continuous"])
        self._position_bias(name, position_bias, window, heads)
        options |= {"position_bias": position_bias}
        if cosine or position_bias:
            options["parameters"] = name
        shape = (3 * heads * width, *padded)
        # A bias of the keys has no effect but on cosines.
        has_key_bias = not cosine or self._rng.random() < 0.3
        self._add("pixel_linear", shape, parameters=qkv, key_bias=has_key_bias)
        self._add("attention", (heads * width, *padded), **options)
        if padded != size and self._rng.random() < 0.8:
            self._add("slice", (heads * width, *size), output=tuple(size))

    def _position_bias(self, name: str, kind: str, window: tuple[int, int], heads: int) -> None:
        """Add the entries of a position bias; its index has any rows of the table."""
        rows = self._rng.randint(1, 40)
        if kind:
            index = torch.randint(rows, ((window[0] * window[1]) ** 2,))
            self.state[name + "relative_position_index"] = index
        if kind == "table":
            self.state[name + "relative_position_bias_table"] = torch.randn(rows, heads)
        if kind == "continuous":
            self.state[name + "relative_coords_table"] = torch.randn(1, rows, 1, 2)
            self.state[name + "cpb_mlp.0.weight"] = torch.randn(5, 2)
            self.state[name + "cpb_mlp.0.bias"] = torch.randn(5)
            self.state[name + "cpb_mlp.2.weight"] = torch.randn(heads, 5)

    def _slice(self) -> None:
        """Take some pixels of a map, and perhaps zeros outside of it."""
        channels, *size = self._values[-1][1]
        start = tuple(self._rng.randrange(s) for s in size)
        stride = tuple(self._rng.choice([1, 1, 2, 2, 3]) for _ in size)
        most = [-(-(s - a) // step) for s, a, step in zip(size, start, stride, strict=True)]
        output = tuple(self._rng.choice([m, m, 1, m + 2]) for m in most)
        self._add("slice", (channels, *output), start=start, stride=stride, output=output)

    def _merge(self) -> None:
        """Join the pixels of every square of 2 x 2, as Swin does."""
        name, (channels, *size) = self._values[-1]
        half = tuple(-(-s // 2) for s in size)
        if 4 * channels > 100:
            return
        parts = []
        for start in ((0, 0), (1, 0), (0, 1), (1, 1)):
            self._values.append((name, (channels, *size)))
            self._add("slice", (channels, *half), start=start, stride=(2, 2), output=half)
            parts.append(self._values[-1][0])
        self._values.append((parts[0], (channels, *half)))
        self._add("concat", (4 * channels, *half), *parts[1:])

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
    wanted = found.in_float64()(images)
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
