"""Bring weights in and out: `python -m image_classification.convert SOURCE TARGET`.

Reads the state dicts of torchvision, checkpoints of NVIDIA's ConvNets, of the PyTorch port of RigL
with its masks, of the RigL repository (TensorFlow 1, ResNet-50 and MobileNet-v1) with theirs, and
our own. Writes a checkpoint for `main.py --evaluate --resume` and `--pretrained-from-file`, or the
weights alone under torchvision's or NVIDIA's names.
"""

from image_classification import versions

if __name__ == "__main__":
    versions.require()

import argparse
import importlib
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from image_classification import checkpoint, foreign
from image_classification.foreign import Network
from image_classification.models import create_model

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


def read(source: Path, *, arch: str | None = None, ema: bool = False) -> tuple[Network, str]:
    """Return the network in a file and its architecture, checked against each other.

    Args:
        source: A file of `torch.save` or of safetensors, or the prefix of a TensorFlow checkpoint.
        arch: What the file holds; by default what it says itself, else resnet50.
        ema: Take the averaged weights.

    Raises:
        ValueError: One line: the file is missing, damaged, of no known kind or of another
            architecture.
    """
    prefix = source.with_suffix("") if source.suffix == ".index" else source
    is_tf = Path(f"{prefix}.index").is_file()
    if not is_tf and not source.is_file():
        raise ValueError(f"{source} does not exist: name a file, or the prefix of PREFIX.index")
    if is_tf and ema:
        raise ValueError(f"{source} is a TensorFlow checkpoint, which has no averaged weights")
    try:
        if is_tf:
            arch = arch or "resnet50"
            network = foreign.from_tf(_read_tf(prefix), arch)
        else:
            state = _read_torch(source)
            arch = arch or str(state.get("arch", "resnet50"))
            network = _network(state, ema=ema)
        return Network(_fit(network.state_dict, arch), network.masks), arch
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{source} cannot be converted: {reason}") from error


def write(network: Network, target: Path, *, arch: str, to: Format = "checkpoint") -> None:
    """Write a network.

    Args:
        network: Weights under our names, and masks.
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
        weights: dict[str, Tensor] = rename(network.state_dict)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".safetensors":
            safetensors.torch.save_file(weights, target)
        else:
            torch.save(weights, target)
        return
    if target.suffix == ".safetensors":
        raise ValueError(f"{target}: a checkpoint is no .safetensors file; add --to torchvision")
    state: dict[str, Any] = {"epoch": 0, "arch": arch, "state_dict": network.state_dict}
    if network.masks:
        packed = {name: _pack(mask) for name, mask in network.masks.items()}
        state["sparse"] = {"version": 1, "masks": packed}
    checkpoint.save(target.parent, state, epoch=0, is_best=False, filename=target.name)


def _read_torch(source: Path) -> dict[str, Any]:
    if source.suffix == ".safetensors":
        return dict(safetensors.torch.load_file(source))
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("it is no file of torch.save, or holds objects besides tensors") from error
    except RuntimeError as error:
        raise ValueError("it is truncated or damaged") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"it holds a {type(state).__name__}, not named weights")
    return checkpoint.load(source) if "format" in state else dict(state)


def _network(state: Mapping[str, Any], *, ema: bool) -> Network:
    key = next((k for k in ("ema", "state_dict_ema") if k in state), None) if ema else "state_dict"
    if key is None:
        raise ValueError("it has no averaged weights; leave --ema out")
    weights = state.get(key, state)
    if "pruner" in state:
        return foreign.from_port(weights, state["pruner"])
    named = {name: tensor for name, tensor in weights.items() if name != "n_averaged"}
    masks = {name: _unpack(m) for name, m in (state.get("sparse") or {}).get("masks", {}).items()}
    return foreign.masked(foreign.from_torch(named), masks)


def _read_tf(prefix: Path) -> dict[str, Tensor]:
    try:
        tensorflow = importlib.import_module("tensorflow")  # a large package for rare use
    except ImportError:
        raise ValueError(
            "reading TensorFlow checkpoints needs tensorflow: pip install tensorflow-cpu"
        ) from None
    reader = tensorflow.train.load_checkpoint(str(prefix))
    names = (n for n in reader.get_variable_to_shape_map() if n.startswith("resnet_model/"))
    return {name: torch.from_numpy(np.array(reader.get_tensor(name))) for name in names}


def _fit(weights: Mapping[str, Tensor], arch: str) -> dict[str, Tensor]:
    """Return the weights in the order of the architecture, after comparing names and shapes."""
    *_, last = weights.values()  # every network ends in its classifier, one row per class
    with torch.device("meta"):
        expected = create_model(arch, num_classes=len(last)).state_dict()
    for name, tensor in expected.items():
        if name not in weights:
            raise ValueError(f"it is no {arch}: {name} is missing")
        if weights[name].shape != tensor.shape:
            raise ValueError(
                f"it is no {arch}: {name} has shape {tuple(weights[name].shape)}, "
                f"not {tuple(tensor.shape)}"
            )
    for name in weights.keys() - expected.keys():
        raise ValueError(f"it is no {arch}, which has no {name}")
    return {name: weights[name].contiguous() for name in expected}


def _pack(mask: Tensor) -> dict[str, Any]:
    # eight entries a byte, the first in the lowest bit: as in the checkpoints of sparse runs
    bits = np.packbits(mask.numpy(), axis=None, bitorder="little")
    return {"shape": list(mask.shape), "bits": torch.from_numpy(bits)}


def _unpack(packed: Mapping[str, Any]) -> Tensor:
    shape = torch.Size(packed["shape"])
    bits = np.unpackbits(packed["bits"].numpy(), count=shape.numel(), bitorder="little")
    return torch.from_numpy(bits).bool().reshape(shape)


def main(argv: Sequence[str]) -> int:
    """Run the command line; return its exit status: 0, or 2 for a user's mistake."""
    args = build_parser().parse_args(argv)
    try:
        network, arch = read(args.source, arch=args.arch, ema=args.ema)
        write(network, args.target, arch=arch, to=args.to)
    except (ValueError, OSError) as error:
        print(f"convert: error: {error}", file=sys.stderr)
        return 2
    zeros = sum(int((~mask).sum()) for mask in network.masks.values())
    masked = sum(mask.numel() for mask in network.masks.values())
    note = f", {len(network.masks)} masks, {zeros / masked:.2%} zeros in them" if masked else ""
    print(f"{args.target}: {arch}, {len(network.state_dict)} tensors{note}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
