"""Bring weights in and out: `python -m image_classification.convert SOURCE TARGET`.

Reads whatever `image_classification.weights` does: files of torchvision, timm, NVIDIA's ConvNets,
the PyTorch port of RigL and of torch.nn.utils.prune with their masks, of the RigL repository
(TensorFlow 1, ResNet-50 and MobileNet-v1) with theirs, and our own. Writes a checkpoint for
`main.py --evaluate --resume` and `--pretrained-from-file`, or the weights alone under
torchvision's or NVIDIA's names.
"""

from image_classification import versions

if __name__ == "__main__":
    versions.require()

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from image_classification import checkpoint, foreign, models, weights
from image_classification.foreign import Network
from image_classification.weights import Weights

Format = Literal["checkpoint", "torchvision", "nvidia"]


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m image_classification.convert", description="Bring weights in and out."
    )
    add = parser.add_argument
    add("source", type=Path, help="file of weights, or the prefix of a TensorFlow checkpoint")
    add("target", type=Path, help="file to write; .safetensors for weights alone is understood")
    add("-a", "--arch", help="network of SOURCE, where it does not say (resnet50)")
    add("--to", choices=("checkpoint", "torchvision", "nvidia"), default="checkpoint")
    add("--ema", action="store_true", help="take the averaged weights of SOURCE")
    return parser


def read(source: Path, *, arch: str | None = None, ema: bool = False) -> Weights:
    """Return the weights in a file, in the order of their architecture and checked against it.

    Args:
        source: A file of `torch.save` or of safetensors, or the prefix of a TensorFlow checkpoint.
        arch: What the file holds; by default what it says itself, else resnet50.
        ema: Take the averaged weights.

    Raises:
        ValueError: One line: the file is missing, damaged, of no known kind or of another
            architecture.
    """
    found = weights.read(source, ema=ema)
    name = arch or found.arch or "resnet50"
    options = {key: found.config[key] for key in ("stem", "width") if key in found.config}
    try:
        num_classes = models.count_classes(name, found.state_dict)
        with torch.device("meta"):
            own = models.create_model(name, num_classes=num_classes, **options).state_dict()
        fitted = weights.fit(found.state_dict, own, name)
    except ValueError as error:
        raise ValueError(f"{source} cannot be converted: {error}") from error
    return dataclasses.replace(found, state_dict=fitted, arch=name)


def write(network: Network, target: Path, *, arch: str, to: Format = "checkpoint") -> None:
    """Write a network.

    Args:
        network: Weights under our names, and masks; `Weights` bring their flags along.
        target: New file. With the suffix .safetensors, weights are written in that format.
        arch: Its architecture.
        to: "checkpoint" keeps the masks, the others hold weights with zeros.

    Raises:
        ValueError: `target` exists, or a checkpoint was asked for in another format.
    """
    if target.exists():
        raise ValueError(f"{target} exists: name a new file")
    if to != "checkpoint":
        rename = foreign.to_nvidia if to == "nvidia" else dict
        renamed: dict[str, Tensor] = rename(network.state_dict)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".safetensors":
            safetensors.torch.save_file(renamed, target)
        else:
            torch.save(renamed, target)
        return
    if target.suffix == ".safetensors":
        raise ValueError(f"{target}: a checkpoint is no .safetensors file; add --to torchvision")
    state: dict[str, Any] = {"epoch": 0, "arch": arch, "state_dict": network.state_dict}
    if network.masks:
        packed = {name: weights.pack(mask) for name, mask in network.masks.items()}
        state["sparse"] = {"version": 1, "masks": packed}
    if isinstance(network, Weights) and network.config:
        state["config"] = dict(network.config)
    checkpoint.write(target, state)


def describe(found: Weights, target: Path, *, to: Format) -> str:
    """Return the lines that say what was written and what was not."""
    zeros = sum(int((~mask).sum()) for mask in found.masks.values())
    masked = sum(mask.numel() for mask in found.masks.values())
    masks = f", {len(found.masks)} masks, {zeros / masked:.2%} zeros in them" if masked else ""
    taken = "" if found.entry is None else f", from the entry '{found.entry}'"
    lines = [f"{target}: {found.arch}, {len(found.state_dict)} tensors{masks}{taken}"]
    if found.left:
        lines.append(f"averaged weights are left in '{found.left[0]}': --ema takes them instead")
    if to != "checkpoint" and found.arch == "tf_resnet50":
        lines.append("these weights need TensorFlow's max-pooling, which their names do not say")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run the command line; return its exit status: 0, or 2 for a user's mistake."""
    args = build_parser().parse_args(argv)
    try:
        found = read(args.source, arch=args.arch, ema=args.ema)
        assert found.arch is not None
        write(found, args.target, arch=found.arch, to=args.to)
    except (ValueError, OSError) as error:
        print(f"convert: error: {error}", file=sys.stderr)
        return 2
    print(describe(found, args.target, to=args.to))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
