"""Files that somebody made to do harm: random changes of valid ones, with a digest that fits.

`python fuzzed.py LIBRARY COUNT DIRECTORY` does it with kernels given on the command line;
test_sanitizers.py starts that with the sanitizer's library preloaded.
"""

import itertools
import json
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse import runtime
from sparse.runtime import bindings, memory
from sparse.runtime.format import FORMAT, PACKED, digest
from sparse.runtime.graph import Node
from sparse.runtime.header import packed, unpacked
from sparse.runtime.network import Network
from sparse.runtime.units import units

MEMORY = 2**26  # bytes: what a case may take
KINDS = tuple(itertools.product((True, False), ("float32", "bfloat16", "int8")))
NUMBERS = (*(-1, 0, 1, 1, 2, 2, 3, 3, 4, 5, 8, 12, 16), 1000, 10**6, 2**31, 2**63, 10**400)
VALUES = (*(None, True, "", "input", "conv", "add", "a\nb", "\ud800", 0.5, 1e308), [], {}, [1, 1])


class Seed(nn.Module):
    """A small network with every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False)
        self.norm, self.lone = nn.BatchNorm2d(12), nn.BatchNorm2d(12)
        self.pool, self.mean = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 1)
        self.wide = nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=3)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 12, 1), nn.Sigmoid())
        self.more, self.shuffle = nn.Conv2d(12, 6, 1), nn.ChannelShuffle(3)
        self.flat = nn.Sequential(nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(12, 12))
        self.fc = nn.Linear(12, 20)
        self.last = nn.Linear(20, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm(self.stem(x)).relu())
        x = F.silu(self.wide(x) + self.lone(x))
        x = self.mean(x * self.gate(x))
        parts = self.shuffle(torch.cat((x, self.more(x)), 1)).chunk(3, 1)
        x = self.flat(F.gelu(parts[0]) + parts[2])
        return self.last(self.fc(x).relu())


class Quantized(nn.Module):
    """A small network of the operations that int8 computes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm, self.pool = nn.BatchNorm2d(8), nn.MaxPool2d(3, 2, 1)
        self.wide = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.mean, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 12)
        self.last = nn.Linear(12, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm(self.stem(x)).relu())
        x = F.relu(self.wide(x) + x)
        return self.last(F.relu6(self.fc(torch.flatten(self.mean(F.relu6(x)), 1))))


def transformer() -> tuple[list[Node], dict[str, Tensor]]:
    """Return a graph with every operation of transformers, for images of 9 x 9, and its state."""
    nodes = [
        Node(name="patch", op="conv", inputs=("input",), parameters="patch.", **PATCHES),
        Node(name="tokens", op="prepend", inputs=("patch",), parameters="c", size=(3, 3), tokens=1),
        Node(name="placed", op="embedding", inputs=("tokens",), parameters="p", size=(1, 10)),
        Node(name="norm", op="layer_norm", inputs=("placed",), parameters="norm.", eps=1e-6),
        Node(name="qkv", op="pixel_linear", inputs=("norm",), parameters="qkv."),
        Node(name="mix", op="attention", inputs=("qkv",), heads=2, score_scale=0.4),
        Node(name="scaled", op="scale", inputs=("mix",), parameters="s"),
        Node(name="sum", op="add", inputs=("scaled", "placed")),
        *windowed("sum"),
        Node(name="class", op="token", inputs=("cropped",), index=0),
        Node(name="last", op="layer_norm", inputs=("class",), parameters="last.", eps=1e-6),
        Node(name="head", op="linear", inputs=("last",), parameters="head."),
    ]
    shapes = {"patch.weight": (12, 3, 3, 3), "patch.bias": (12,), "c": (1, 1, 12), "s": (12,)}
    shapes |= {"p": (1, 10, 12), "norm.weight": (12,), "norm.bias": (12,), "last.weight": (12,)}
    shapes |= {"last.bias": (12,), "qkv.weight": (36, 12), "head.weight": (7, 12)}
    shapes |= {"wide.weight": (36, 12), "wide.bias": (36,), "again.weight": (36, 12)}
    shapes |= {"near.relative_coords_table": (1, 3, 9, 2), "near.cpb_mlp.0.weight": (5, 2)}
    shapes |= {"near.cpb_mlp.0.bias": (5,), "near.cpb_mlp.2.weight": (2, 5)}
    shapes |= {"near.logit_scale": (2, 1, 1), "far.relative_position_bias_table": (27, 3)}
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    for name in ("near", "far"):
        state[f"{name}.relative_position_index"] = torch.randint(27, (10, 10))
    return nodes, state


def windowed(source: str) -> list[Node]:
    """Return attentions in windows, of a map of 1 x 10 with 12 channels."""
    near = {"cosine": True, "position_bias": "continuous", "window": (2, 5), "shift": (1, 2)}
    far = {"score_scale": 0.5, "position_bias": "table", "window": (2, 5), "spread": True}
    return [
        Node(name="padded", op="slice", inputs=(source,), output=(2, 10)),
        Node(name="wide", op="pixel_linear", inputs=("padded",), parameters="wide.", **NO_KEYS),
        Node(name="near", op="attention", inputs=("wide",), heads=2, parameters="near.", **near),
        Node(name="again", op="pixel_linear", inputs=("near",), parameters="again."),
        Node(name="far", op="attention", inputs=("again",), heads=3, parameters="far.", **far),
        Node(name="cropped", op="slice", inputs=("far",), output=(1, 10)),
    ]


NO_KEYS = {"key_bias": False}
PATCHES = {"kernel": (3, 3), "stride": (3, 3)}


def _save(path: Path, *arguments: Any, **options: Any) -> None:
    """Write a file of a network for images of 9 x 9."""
    runtime.save(path, *arguments, image_size=9, mean=(0.5,) * 3, std=(0.2,) * 3, **options)


def seeds(directory: Path) -> list[Path]:
    """Write valid files of all kinds."""
    torch.manual_seed(0)
    model = Seed().eval()
    masks = {}
    for name in ("stem.weight", "wide.weight", "fc.weight"):
        weight = model.get_parameter(name).data
        masks[name] = torch.rand(weight.shape) < 0.4
        weight *= masks[name]
    paths = []
    for fold, dtype in KINDS:
        paths.append(directory / f"{fold}-{dtype}")
        _save(
            paths[-1],
            model.state_dict(),
            masks,
            nodes=runtime.trace(model),
            arch="seed",
            model={"num_classes": 7},
            dtype=dtype,
            fold=fold,
        )
    others = [*transformer_seeds(directory), *block_seeds(directory)]
    return [*paths, *others, quantized_seed(directory), *mixed_seeds(directory)]


def block_seeds(directory: Path) -> list[Path]:
    """Write files whose masks consist of blocks, except that of the first layer."""
    paths = []
    for fold, dtype, block in ((True, "float32", (1, 4)), (False, "int8", (2, 2))):
        model, masks = Seed().eval(), {}
        for name in ("stem.weight", "wide.weight", "fc.weight"):
            weight = model.get_parameter(name).data
            masks[name] = torch.rand(weight.shape) < 0.4
            if name != "stem.weight":
                some = masks[name][:: block[0], :: block[1]]
                masks[name] = some.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            weight *= masks[name]
        paths.append(directory / f"blocks-{dtype}")
        _save(
            paths[-1],
            model.state_dict(),
            masks,
            nodes=runtime.trace(model),
            arch="seed",
            model={"num_classes": 7},
            dtype=dtype,
            fold=fold,
            block=block,
        )
    return paths


def quantized_seed(directory: Path) -> Path:
    torch.manual_seed(0)
    model = Quantized().eval()
    mask = torch.rand(model.wide.weight.shape) < 0.4
    model.wide.weight.data *= mask
    nodes, activations = runtime.calibrate(
        runtime.trace(model), model.state_dict(), [torch.randn(4, 3, 9, 9)]
    )
    path = directory / "quantized"
    _save(
        path,
        model.state_dict(),
        {"wide.weight": mask},
        nodes=nodes,
        arch="quantized",
        model={},
        dtype="int8",
        fold=True,
        activations=activations,
    )
    return path


def mixed_seeds(directory: Path) -> list[Path]:
    """Write quantized files with float32 between units of int8."""
    torch.manual_seed(0)
    model = Seed().eval()
    graphs = {"some": (runtime.trace(model), model.state_dict()), "tokens": transformer()}
    paths = []
    for name, (traced, state) in graphs.items():
        nodes, activations = runtime.calibrate(traced, state, [torch.randn(4, 3, 9, 9)])
        options = {"dtype": "int8", "fold": True, "activations": activations}
        paths.append(directory / f"mixed-{name}")
        _save(paths[-1], state, {}, nodes=nodes, arch="mixed", model={}, **options)
    return paths


def transformer_seeds(directory: Path) -> list[Path]:
    nodes, state = transformer()
    mask = torch.rand(36, 12) < 0.4
    state["qkv.weight"] *= mask
    paths = []
    for dtype in ("float32", "int8"):
        paths.append(directory / f"transformer-{dtype}")
        _save(
            paths[-1],
            state,
            {"qkv.weight": mask},
            nodes=nodes,
            arch="transformer",
            model={},
            dtype=dtype,
        )
    return paths


def content(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Return the header and the tensors of a file."""
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    text = metadata["header"]
    return json.loads(unpacked(text) if metadata["format"] == PACKED else text), tensors


def rewrite(path: Path, header: Any, tensors: dict[str, Tensor], *, packs: bool = False) -> None:
    """Write a file with a digest that fits whatever it holds."""
    text = header if isinstance(header, str) else json.dumps(header)
    if packs:
        text = packed(text)
    sign(path, text, tensors, PACKED if packs else FORMAT)


def sign(path: Path, text: str, tensors: dict[str, Tensor], version: str) -> None:
    """Write a file with the text as its header."""
    metadata = {"format": version, "header": text, "sha256": digest(text, tensors)}
    path.write_bytes(safetensors.torch.save(tensors, metadata))


def mutate(rng: random.Random, header: Any, tensors: dict[str, Tensor]) -> None:
    """Change one thing of a file."""
    if rng.random() < 0.5:
        nodes = header.get("nodes")
        places = [header, nodes, rng.choice(nodes) if isinstance(nodes, list) and nodes else None]
        _mutate_json(rng, rng.choice([p for p in places if isinstance(p, list | dict)]))
    else:
        _mutate_tensors(rng, tensors)


def _mutate_json(rng: random.Random, value: Any) -> None:
    """Change an entry of a list or mapping, or of one below it."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys:
        return
    key = rng.choice(keys)
    if isinstance(value[key], list | dict) and value[key] and rng.random() < 0.8:
        _mutate_json(rng, value[key])
    elif rng.random() < 0.1:
        del value[key]
    elif rng.random() < 0.2 and isinstance(value, list):
        value.insert(rng.choice(keys), value[key])
    elif rng.random() < 0.1 and isinstance(value, dict):
        value["unknown"] = value[key]
    elif rng.random() < 0.2:
        value[key] = value[rng.choice(keys)]
    else:
        value[key] = rng.choice(NUMBERS if rng.random() < 0.7 else VALUES)


def _mutate_tensors(rng: random.Random, tensors: dict[str, Tensor]) -> None:
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    changes: list[Callable[[], Tensor]] = [
        lambda: value.flatten(),
        lambda: value[..., :-1] if value.dim() else value[None],
        lambda: torch.cat([value, value]) if value.dim() else value[None],
        lambda: value.repeat_interleave(rng.choice([2, 1000]), -1) if value.dim() else value,
        lambda: value.to(rng.choice([torch.float64, torch.int8, torch.uint8, torch.float16])),
        lambda: value.to(rng.choice([torch.bool, torch.complex64, torch.int64, torch.bfloat16])),
        lambda: torch.full_like(value, rng.choice([0, 1, 3, 127])),
        lambda: value * rng.choice([-1, 100, float("inf"), float("nan")]),
        lambda: tensors[rng.choice(sorted(tensors))].clone(),
    ]
    if rng.random() < 0.1:
        del tensors[name]
    elif rng.random() < 0.1:
        tensors[rng.choice(["x", *tensors]) + rng.choice(["", ".mask", ".scale"])] = value.clone()
    else:
        tensors[name] = rng.choice(changes)().contiguous()


def attempt(path: Path, kernels: bindings.Kernels, threads: int) -> None:
    """Load and run a file.

    Raises:
        AssertionError: It computes something else than torch, bit for bit if all units are int8.
            Where float32 is between, a byte that differs by one step may change anything.
    """
    reference = Network(path, threads=1, kernels=None, tuner=None)
    channels, size = reference.header.in_channels, min(reference.header.image_size, 32)
    images = torch.randn(2, channels, size, size)
    wanted = reference(images)
    found = Network(path, threads=threads, kernels=kernels, tuner=None)(images)
    assert found.shape == wanted.shape
    if reference.header.activations:
        is_whole = all(unit.is_int8 for unit in units(reference.header.nodes))
        assert not is_whole or torch.equal(found, wanted)
    elif torch.isfinite(wanted).all():
        error = float((found - wanted).abs().max())
        assert error <= 1e-2 * max(1e-2, float(wanted.abs().max())), error


def fuzz(kernels: bindings.Kernels, count: int, directory: Path, seed: int = 0) -> dict[str, int]:
    """Run `count` cases; return how many were right and how many refused."""
    originals = [content(path) for path in seeds(directory)]
    path = directory / "case"
    outcomes = {"right": 0, "refused": 0}
    with mock.patch.object(memory, "limit", return_value=MEMORY), warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in range(seed, seed + count):
            rng = random.Random(case)
            torch.manual_seed(case)
            original, stored = rng.choice(originals)
            header, tensors = json.loads(json.dumps(original)), dict(stored)
            for _ in range(rng.choice([1, 1, 1, 2, 3])):
                mutate(rng, header, tensors)
            rewrite(path, header, tensors, packs=case % 2 == 1)
            try:
                attempt(path, kernels, threads=rng.choice([1, 2]))
                outcomes["right"] += 1
            except Exception as error:
                if not isinstance(error, ValueError) or not str(error).isprintable():
                    raise AssertionError(f"case {case}: {header} {error!r}") from error
                outcomes["refused"] += 1
    return outcomes


if __name__ == "__main__":
    print(fuzz(bindings.Kernels(Path(sys.argv[1])), int(sys.argv[2]), Path(sys.argv[3])))
    print("clean")
