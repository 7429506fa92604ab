"""Bring weights in and out: `python -m cli.convert SOURCE TARGET`.

Reads whatever `cli.weights` does: files of torchvision, timm, NVIDIA's ConvNets, the PyTorch port
of RigL and of torch.nn.utils.prune with their masks, of the RigL repository (TensorFlow 1,
ResNet-50 and MobileNet-v1) with theirs, and our own. Writes a checkpoint for
`main.py --evaluate --resume` and `--pretrained-from-file`, or the weights alone under
torchvision's or NVIDIA's names. With `--to sparsity-map` it writes, for `main.py --sparsity-map`,
how sparse each layer would be if the smallest weights of all layers together were pruned.
"""

from image_classification import versions

if __name__ == "__main__":
    versions.require()

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

import sparse
from cli import foreign, networks, weights
from cli.foreign import Network
from cli.program import Program
from image_classification import models
from image_classification.flags import argument, flag
from image_classification.weights import fit
from sparse.methods.gap import magnitude_sparsities
from sparse.topology.distributions import check_sparsity, match_layers

Format = Literal["checkpoint", "torchvision", "nvidia", "sparsity-map"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Bring weights in and out."""

    source: Path = argument("file of weights, or the prefix of a TensorFlow checkpoint")
    target: Path = argument("file to write; .safetensors for weights alone is understood")
    arch: str | None = flag(None, "network of SOURCE, where it does not say (resnet50)", "-a")
    to: Format = flag("checkpoint", "a checkpoint with masks, the weights alone under our names "
                      "or NVIDIA's, or the layers' sparsities by magnitude")  # fmt: skip
    ema: bool = flag(False, "take the averaged weights of SOURCE")
    sparsity: float | None = flag(
        None, "--to sparsity-map: fraction of zeros over all layers that are not kept dense"
    )
    dense_layers: list[str] = flag(
        [], "--to sparsity-map: globs of layers kept dense", nargs="*", metavar="GLOB"
    )


def read(source: Path, *, arch: str | None = None, ema: bool = False) -> Network:
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
    try:
        own = sketch(dataclasses.replace(found, arch=name)).state_dict()
        fitted = fit(found.state_dict, own, name)
    except ValueError as error:
        raise ValueError(f"{source} cannot be converted: {error}") from error
    return dataclasses.replace(found, state_dict=fitted, arch=name)


def sketch(network: Network) -> nn.Module:
    """Return a module of the network's architecture, on the meta device.

    Raises:
        ValueError: There is no such architecture, or the weights are not of it.
    """
    assert network.arch is not None
    options = {key: network.config[key] for key in ("stem", "width") if key in network.config}
    num_classes = models.count_classes(network.arch, network.state_dict)
    with torch.device("meta"):
        return models.create_model(network.arch, num_classes=num_classes, **options)


def sparsity_map(
    network: Network, sparsity: float, dense_layers: Sequence[str] = ()
) -> dict[str, float]:
    """Share a sparsity out among the layers of a trained network by the magnitude of its weights.

    Args:
        network: The network.
        sparsity: Fraction of zeros over all layers that are not dense.
        dense_layers: Globs of layers that are left out.

    Returns:
        Layer name -> sparsity, for `main.py --sparsity-map`.

    Raises:
        ValueError: The sparsity is out of range, a glob matches nothing, or no weight of a layer is
            large enough to be kept.
    """
    check_sparsity(sparsity)
    names = sparse.prunable(sketch(network))
    dense = {n for glob in dense_layers for n in match_layers(glob, names, "--dense-layers")}
    weights = {name: network.state_dict[name] for name in names if name not in dense}
    if not weights:
        raise ValueError("--dense-layers leaves no layer that could be sparse")
    found = magnitude_sparsities(weights, sparsity)
    for name, zeros in found.items():
        if zeros == 1.0:
            raise ValueError(
                f"--sparsity {sparsity} leaves no weight of {name}: lower it, or keep the layer "
                "with --dense-layers"
            )
    return found


def write(network: Network, target: Path, *, arch: str, to: Format = "checkpoint") -> None:
    """Write a network.

    Args:
        network: Weights under our names, their masks and flags.
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
    networks.write_checkpoint(
        target, arch, network.state_dict, masks=network.masks, config=network.config
    )


def describe(found: Network, target: Path, *, to: Format) -> str:
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


def write_sparsity_map(found: Network, given: Flags) -> str:
    """Write the sparsities of layers; return the line that says so.

    Raises:
        ValueError: A user's mistake, in one line.
    """
    if given.sparsity is None:
        raise ValueError("--to sparsity-map needs --sparsity")
    if given.target.exists():
        raise ValueError(f"{given.target} exists: name a new file")
    layers = sparsity_map(found, given.sparsity, given.dense_layers)
    given.target.parent.mkdir(parents=True, exist_ok=True)
    given.target.write_text(yaml.safe_dump(layers, sort_keys=False))
    lowest, highest = min(layers.values()), max(layers.values())
    return (
        f"{given.target}: sparsities of {len(layers)} layers, {lowest:.4f} to {highest:.4f}, for "
        "main.py --sparsity-map"
    )


def run(given: Flags) -> str:
    """Convert; return the lines that say what was written.

    Raises:
        ValueError: A user's mistake, in one line.
    """
    is_map = given.to == "sparsity-map"
    for name, value in (("--sparsity", given.sparsity), ("--dense-layers", given.dense_layers)):
        if value not in (None, []) and not is_map:
            raise ValueError(f"{name} has no effect without --to sparsity-map")
    found = read(given.source, arch=given.arch, ema=given.ema)
    assert found.arch is not None
    with networks.writing(given.target):
        if is_map:
            return write_sparsity_map(found, given)
        write(found, given.target, arch=found.arch, to=given.to)
    return describe(found, given.target, to=given.to)


PROGRAM = Program("python -m cli.convert", Flags, run)
main = PROGRAM.main


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
