"""Run random networks on kernels given on the command line; a sanitizer watches.

Not a test by itself: test_sanitizers.py starts it, with the sanitizer's library preloaded. Weights
and images come from NumPy, and torch only converts the weights of int8, in one thread: its threads
are not under suspicion.
"""

import ctypes
import itertools
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from sparse.runtime import bindings, execution_plan
from sparse.runtime.arrange import Arrangement, banded_grids
from sparse.runtime.execution_plan import Choice, ExecutionPlan, can_share, dense_choices
from sparse.runtime.graph import ACTIVATIONS, Node
from sparse.runtime.int8 import integer_layers
from sparse.runtime.integers import IntegerNetwork, read_parameters
from sparse.runtime.layout import Grid, Map
from sparse.runtime.lower import Layer
from sparse.runtime.tune import Tuner
from sparse.runtime.units import units


def layers_of(generator: np.random.Generator, stride: int, groups: int) -> list[Layer]:
    """Return a small residual network with every kind of layer."""

    def conv(name: str, source: str, into: int, kernel: int, **options: object) -> Layer:
        per_group = 12 // groups if source != "input" else 3
        used = groups if source != "input" else 1
        weight = generator.standard_normal((into, per_group, kernel, kernel)).astype(np.float32)
        weight[generator.random(weight.shape) < 0.7] = 0
        return Layer(
            name=name,
            kind="conv",
            source=source,
            channels=into,
            weight=weight,
            bias=np.ones(into, np.float32),
            kernel=(kernel, kernel),
            groups=used,
            activation=ACTIVATIONS[len(name + source) + into + kernel + groups & 7],
            **options,
        )

    def linear(name: str, source: str, into: int, **options: object) -> Layer:
        weight = generator.standard_normal((into, 12)).astype(np.float32)
        bias = np.zeros(into, np.float32)
        return Layer(
            name=name,
            kind="linear",
            source=source,
            channels=into,
            weight=weight,
            bias=bias,
            **options,
        )

    return [
        conv("a", "input", 12, 7, stride=(2, 2), padding=(3, 3)),
        Layer(
            name="b",
            kind="max_pool",
            source="a",
            channels=12,
            kernel=(3, 3),
            stride=(2, 2),
            padding=(1, 1),
        ),
        conv("c", "b", 12, 3, stride=(stride, stride), padding=(1, 1)),
        conv("d", "c", 12, 3, padding=(2, 2), dilation=(2, 2)),
        conv("e", "b", 12, 1, stride=(stride, stride), residual="d"),
        Layer(
            name="n",
            kind="layer_norm",
            source="e",
            channels=12,
            weight=np.ones(12, np.float32),
            bias=np.ones(12, np.float32),
            eps=1e-2,
        ),
        conv("w", "n", 36, 1),
        Layer(name="p", kind="slice", source="w", channels=36, output=(16, 21)),
        Layer(
            name="v",
            kind="attention",
            source="p",
            channels=12,
            heads=2,
            score_scale=0.5,
            head_scale=np.ones(2, np.float32),
            position_bias=generator.standard_normal((2, 12, 12)).astype(np.float32),
            window=(4, 3),
            shift=(1, 2),
        ),
        Layer(name="u", kind="slice", source="v", channels=12, start=(1, 0), output=(9, 8)),
        conv("q", "u", 36, 1),
        Layer(name="t", kind="attention", source="q", channels=12, heads=3, score_scale=0.5),
        Layer(name="f", kind="mean_pool", source="t", channels=12),
        linear("g", "f", 12, activation="sigmoid"),
        Layer(name="h", kind="scale", source="e", factor="g", channels=12),
        Layer(name="i", kind="concat", source="h", parts=("h", "e"), channels=24),
        Layer(name="j", kind="shuffle", source="i", groups=2, channels=24),
        Layer(name="k", kind="chunk", source="j", groups=2, index=1, channels=12),
        Layer(name="l", kind="adaptive_avg_pool", source="k", channels=12),
        linear("m", "l", 5),
    ]


def integers_of(generator: np.random.Generator, stride: int, groups: int) -> list[Layer]:
    """Return the layers of a small quantized network with every operation of int8."""
    window = {"kernel": (3, 3), "padding": (1, 1)}
    step = {"stride": (stride, stride)}

    def node(op: str, name: str, *inputs: str, **options: object) -> Node:
        return Node(name=name, op=op, inputs=inputs, parameters=name + ".", **options)

    nodes = [
        node("conv", "a", "input", kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
        node("relu", "b", "a"),
        node("conv", "q", "input", kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
        node("concat", "r", "b", "q"),  # of bytes, as only int8 reads the pool
        node("max_pool", "c", "r", kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
        node("conv", "d", "c", groups=groups, **window, **step),
        node("relu6", "e", "d"),
        node("conv", "f", "e", kernel=(3, 3), padding=(2, 2), dilation=(2, 2)),
        node("conv", "g", "c", **step),
        node("add", "h", "f", "g"),  # the sum is part of a convolution
        node("relu", "i", "h"),
        node("relu", "j", "g"),  # looked up, as another node reads its operand
        node("add", "k", "i", "j"),  # of two values that are read as they are
        node("conv", "l", "k", **window),
        node("mean_pool", "m", "l"),
        node("linear", "n", "m"),
        node("relu", "o", "n"),
        node("linear", "p", "o"),
    ]
    shapes = {
        "a": (12, 3, 7, 7),
        "q": (12, 3, 7, 7),
        "d": (24, 24 // groups, 3, 3),
        "f": (18, 24, 3, 3),
        "g": (18, 24, 1, 1),
        "l": (33, 18, 3, 3),
        "n": (9, 33),
        "p": (5, 9),
    }
    tensors = {}
    for name, shape in shapes.items():
        weight = generator.integers(-127, 128, shape, np.int8)
        weight[generator.random(shape) < 0.7] = 0
        numbers = {"weight": weight, "bias": generator.standard_normal(shape[0], np.float32)}
        numbers["weight.scale"] = np.full(shape[0], 2**-9, np.float32)
        tensors |= {f"{name}.{kind}": torch.from_numpy(value) for kind, value in numbers.items()}
    zero_points = {"input": 128, "f": 120, "g": 130, "c": 60, "l": 100, "m": 90}
    values = ("input", "c", "e", "f", "g", "i", "j", "k", "l", "m", "o")
    activations = {name: (2**-5, zero_points.get(name, 0)) for name in values}
    found = units(nodes)
    parameters = read_parameters(found, activations, {}, tensors)
    network = IntegerNetwork(units=found, activations=activations, parameters=parameters, state={})
    return integer_layers(network, in_channels=3)


def main(library: str) -> None:
    """Compare one thread with several, for many sizes, kernels and batches."""
    kernels = bindings.Kernels(Path(library))
    generator = np.random.default_rng(0)
    sizes = {(17, 26): None, (40, 49): None, (61, 70): None}
    sizes |= {(48, 64): banded_grids(48, 64, lanes=kernels.num_lanes)[0]}
    for (size, grid), stride, groups in itertools.product(sizes.items(), (1, 2, 3), (1, 2, 12)):
        layers = layers_of(generator, stride, groups)
        images = generator.standard_normal((5, 3, *size)).astype(np.float32)
        found = list(computed(kernels, layers, images, grid))
        for one, several in zip(found[::2], found[1::2], strict=True):
            assert np.allclose(one, several, rtol=1e-4, atol=1e-4)
        layers, found = integers_of(generator, stride, groups), []
        for is_fast in (0, 1):
            kernels.fast_int8(is_fast)
            found += computed(kernels, layers, images, grid)
        assert all(np.array_equal(logits, found[0]) for logits in found)
        assert len(np.unique(found[0])) > 5
    tune(kernels, generator)
    print("clean")


def computed(
    kernels: bindings.Kernels, layers: list[Layer], images: np.ndarray, grid: Grid | None
) -> Iterator[np.ndarray]:
    """Yield the logits that kernels of two kinds compute, each with one thread and with several."""
    size = images.shape[1:]
    for dense, threads in itertools.product((False, True), (1, 3)):
        with mock.patch.object(execution_plan, "arrange", partial(Arrangement, grid=grid)):
            plan = ExecutionPlan(layers, size, lanes=kernels.num_lanes, num_parts=threads)
        for operation in plan.convolutions():
            assert isinstance(operation.target, Map)
            if dense and dense_choices(operation):
                plan.choose(operation, dense_choices(operation)[-1])
            elif not dense:
                group = max(kernels.max_tiles) if can_share(operation) else 1
                rows = min(3, kernels.max_tiles[group]) if operation.stride[1] <= 2 else 1
                plan.choose(operation, Choice(group=group, tile_rows=rows, num_blocks=2))
        handle = plan.create(kernels, threads=threads)
        assert handle is not None
        logits = np.full((5, 5), np.nan, np.float32)
        for count in (1, 5):
            failed = kernels.run(
                ctypes.c_void_p(handle),
                images.ctypes.data,
                images[0].size,
                logits.ctypes.data,
                5,
                count,
            )
            assert not failed
        kernels.destroy(ctypes.c_void_p(handle))
        yield logits


def tune(kernels: bindings.Kernels, generator: np.random.Generator) -> None:
    """Measure layers whose default kernel is another than some that are tried."""
    for layers in (layers_of(generator, 1, 1), integers_of(generator, 1, 1)):
        plan = ExecutionPlan(layers, (3, 17, 26), lanes=kernels.num_lanes)
        with tempfile.TemporaryDirectory() as directory:
            Tuner(Path(directory)).tune(plan, kernels)


if __name__ == "__main__":
    main(sys.argv[1])
