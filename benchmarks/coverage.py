"""Run every classifier of torchvision in the sparse runtime: `python benchmarks/coverage.py`.

Each network gets random masks at ERK 0.9 and BatchNorm statistics of random images. It is exported,
executed, and compared with torch; the error is relative to the largest logit. The table of
docs/runtime.md is the output of this script. Weights of the largest networks would not fit the
memory of a small machine beside their sparse copy: those are traced, but not executed.
"""

import argparse
import gc
import re
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sparse
from benchmarks.inference import prunable
from sparse import runtime
from sparse.runtime.tracing import REMEDY

SPARSITY = 0.9
MAX_PARAMETERS = 250_000_000
AUXILIARY = {"googlenet", "inception_v3"}  # have classifiers for training only


@dataclass(frozen=True)
class Result:
    """What became of one network."""

    name: str
    density: float = 0.0
    """Share of the weights that were active."""
    error: float | None = None
    """Largest difference from torch, relative to the largest logit; None if it was not executed."""
    reason: str = ""
    """Why it was not executed."""


def build(name: str, *, num_classes: int = 1000) -> nn.Module:
    """Return a network of torchvision with fresh weights."""
    options = {"aux_logits": False, "init_weights": False} if name in AUXILIARY else {}
    model: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=num_classes, **options
    )
    return model


def prune_(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Draw masks and weights with which activations keep their size; return the masks.

    Without this the logits of a deep network would hardly depend on the image, and errors would not
    show.
    """
    weights = prunable(model)
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    counts = sparse.allocate(shapes, sparsity=SPARSITY, distribution="erk")
    masks = {}
    for name, weight in weights.items():
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[torch.randperm(weight.numel())[: counts[name]]] = True
        masks[name] = mask.view_as(weight)
        fan_in = max(1.0, counts[name] / len(weight))
        nn.init.normal_(weight.data, std=(2 / fan_in) ** 0.5)
        weight.data *= masks[name]
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):
            parameter.data.fill_(0.5)  # ConvNeXt begins with blocks that hardly do anything
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.momentum = 1.0
    with torch.no_grad():
        model(images)
    model.eval()
    return masks


def attempt(
    name: str, directory: Path, *, image_size: int, num_classes: int = 1000, seed: int = 0
) -> Result:
    """Export and execute one network, and compare it with torch."""
    torch.manual_seed(seed)
    model = build(name, num_classes=num_classes)
    images = torch.randn(2, 3, image_size, image_size)
    masks = prune_(model, torch.cat([images, torch.randn(2, 3, image_size, image_size)]))
    path = directory / "network.safetensors"
    try:
        runtime.save(
            path,
            model.state_dict(),
            masks,
            nodes=runtime.trace(model, image_size=image_size),
            arch=name,
            model={"num_classes": num_classes},
            image_size=image_size,
            mean=(0.0,) * 3,
            std=(1.0,) * 3,
            fold=True,
        )
        found = runtime.load(path, backend="native", tune=False)(images)
    except ValueError as error:
        return Result(name, reason=str(error).removesuffix(REMEDY))
    with torch.no_grad():
        wanted = model(images)
    largest = float(wanted.abs().max())
    if not float((wanted[0] - wanted[1]).abs().max()) > 1e-3 * largest > 0:
        raise AssertionError(f"the logits of {name} do not depend on the image: nothing is shown")
    active = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    return Result(name, active / total, float((found - wanted).abs().max()) / largest)


def trace_alone(name: str) -> Result:
    """Trace a network that is too large to be executed here."""
    try:
        with torch.device("meta"):
            model = build(name)
    except NotImplementedError:  # RegNet computes its widths with tensors
        model = build(name)
    num_parameters = sum(p.numel() for p in model.parameters())
    try:
        nodes = runtime.trace(model)
    except ValueError as error:
        return Result(name, reason=str(error).removesuffix(REMEDY))
    millions = num_parameters // 10**6
    return Result(name, reason=f"{millions} M weights: traced ({len(nodes)} operations), not run")


def row(result: Result) -> str:
    """Return a row of the table."""
    if result.error is not None:
        return f"| {result.name} | runs | {result.density:.4f} | {result.error:.1e} |"
    reason = re.sub(r" : \[num_users.*?\] = call_\w+", "", result.reason).replace("|", "/")
    return f"| {result.name} | {reason[:160]} | | |"


def num_parameters(name: str) -> int:
    """Return the parameters of a network as torchvision documents them."""
    weights = torchvision.models.get_model_weights(name)
    return int(next(iter(weights)).meta["num_params"])


def main(argv: Sequence[str] | None = None) -> int:
    names = torchvision.models.list_models(module=torchvision.models)
    parser = argparse.ArgumentParser(description="Run torchvision's classifiers sparse.")
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--image-size", type=int, default=224, help="side, in pixels")
    parser.add_argument(
        "--max-parameters", type=int, default=MAX_PARAMETERS, help="larger networks are traced only"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    print("| network | status | density | error |\n|---|---|---|---|")
    num_run = 0
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in arguments.models:
            if num_parameters(name) > arguments.max_parameters:
                result = trace_alone(name)
            else:
                result = attempt(name, Path(directory), image_size=arguments.image_size)
            num_run += result.error is not None
            print(row(result), flush=True)
            gc.collect()
    print(f"\n{num_run} of {len(arguments.models)} networks run.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
