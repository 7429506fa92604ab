"""Read files of weights, whoever wrote them, and check them against a network.

Reads files of torch.save and of safetensors: bare state dicts, and checkpoints of torchvision's and
NVIDIA's trainers, of timm, of the PyTorch port of RigL, and our own. Also reads TensorFlow
checkpoints of the RigL repository. Nothing in a file is executed.
"""

import argparse
import importlib
import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from image_classification import checkpoint, foreign
from image_classification.foreign import Network

ENTRIES = ("state_dict", "model_state_dict", "model", "net", "module")
AVERAGED_ENTRIES = ("ema", "state_dict_ema", "model_ema", "ema_state_dict")

_NUMPY_SCALAR: Any = np.float64(0).__reduce__()[0]
# Objects that trainers store beside the weights, such as their flags and an accuracy as a NumPy
# number. Rebuilding these objects runs no code that a file could choose. The second spellings are
# those of other versions.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    (pathlib.PosixPath, "pathlib.PosixPath"),
    (pathlib.PosixPath, "pathlib._local.PosixPath"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")),
]
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


@dataclass(frozen=True)
class Weights(Network):
    """Weights and masks of a file under our names, and what else it says."""

    arch: str | None = None
    """The network, where the file names it."""
    entry: str | None = None
    """Entry of the file that had the weights; None: the file is the state dict."""
    left: tuple[str, ...] = ()
    """Entries with averaged weights that were not asked for."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Flags of main.py that belong to the network."""
    sparse: Mapping[str, Any] | None = None
    """State of the sparse method, where one of our runs wrote the file."""


def read(path: Path, *, ema: bool = False) -> Weights:
    """Return the weights in a file.

    Args:
        path: A file of `torch.save` or of safetensors, or the prefix of a TensorFlow checkpoint.
        ema: Take the averaged weights.

    Raises:
        ValueError: One line: the file is missing, damaged or of no known kind.
    """
    prefix = path.with_suffix("") if path.suffix == ".index" else path
    is_tf = Path(f"{prefix}.index").is_file()
    if not is_tf and not path.is_file():
        raise ValueError(f"{path} does not exist: name a file, or the prefix of PREFIX.index")
    if is_tf and ema:
        raise ValueError(f"{path} is a TensorFlow checkpoint, which has no averaged weights")
    state = None if is_tf else _load(path)
    try:
        return _from_tf(prefix) if state is None else _select(state, ema=ema)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} cannot be used: {reason}") from error


def fit(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], arch: str, *, new_layer: str = ""
) -> dict[str, Tensor]:
    """Return weights in the order and the types of a network, after comparing names and shapes.

    BatchNorm's counters of batches, which early files lack, start at 0. The auxiliary classifiers
    of torchvision's GoogLeNet and Inception are left out.

    Args:
        weights: What a file holds.
        own: State dict of the network, on any device.
        arch: Its name, for messages.
        new_layer: Layer whose weights are left out of the result, whatever the file has.

    Raises:
        ValueError: A name is missing or unknown, or a shape differs.
    """
    left_out = tuple(f"{name}." for name in (new_layer,) if name)
    fitted: dict[str, Tensor] = {}
    for name, expected in own.items():
        if name.startswith(left_out):
            continue
        if name not in weights and name.endswith(".num_batches_tracked"):
            fitted[name] = torch.tensor(0)
            continue
        if name not in weights:
            raise ValueError(f"it is no {arch}: {name} is missing")
        if weights[name].shape != expected.shape:
            raise ValueError(
                f"it is no {arch}: {name} has shape {tuple(weights[name].shape)}, "
                f"not {tuple(expected.shape)}"
            )
        fitted[name] = weights[name].to(expected.dtype).contiguous()
    for name in weights:
        if name not in own and not name.startswith((*left_out, *_AUXILIARY.get(arch, ()))):
            raise ValueError(f"it is no {arch}, which has no {name}")
    return fitted


def _load(path: Path) -> dict[str, Any]:
    """Return what a file holds, without running anything."""
    if path.suffix == ".safetensors":
        try:
            return dict(safetensors.torch.load_file(path))
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what damaged bytes raise is anybody's guess
        raise ValueError(f"{path} {_why_not(error)}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not named weights")
    if "format" in state and "epoch" in state:
        checkpoint.verify(path)
    return dict(state)


def _why_not(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror}"
    if "TorchScript" in text:
        return "is a TorchScript archive: save the state_dict() of what torch.jit.load returns"
    if found := re.search(r"GLOBAL (\S+) (?:was not|whose module)", text):
        return (
            f"holds objects besides tensors ({found[1]}), which only code could rebuild: "
            "save its state_dict() alone"
        )
    if "Weights only load failed" in text:
        return "is no file of torch.save, or holds objects besides tensors"
    return "is truncated or damaged, or no file of torch.save"


def _select(state: Mapping[str, Any], *, ema: bool) -> Weights:
    """Return the weights among all that a file holds."""
    entries = [key for key in ENTRIES if isinstance(state.get(key), Mapping)]
    averaged = [key for key in AVERAGED_ENTRIES if isinstance(state.get(key), Mapping)]
    if ema and not averaged:
        raise ValueError("it has no averaged weights; leave --ema out")
    if averaged and not entries and not ema:
        raise ValueError(
            f"it has averaged weights only ({averaged[0]}): "
            "python -m image_classification.convert --ema takes them"
        )
    entry = next(iter(averaged if ema else entries), None)
    network = _network(state if entry is None else state[entry], state)
    arch, config = state.get("arch"), state.get("config")
    return Weights(
        network.state_dict,
        network.masks,
        arch=arch if isinstance(arch, str) else None,
        entry=entry,
        left=() if ema else tuple(averaged),
        config=config if isinstance(config, Mapping) else {},
        sparse=state.get("sparse"),
    )


def _network(named: Mapping[str, Any], state: Mapping[str, Any]) -> Network:
    """Return the network of a state dict and of the masks that stand beside it."""
    if any(name.endswith(".values") for name in named):
        raise ValueError(
            "it is a compact file: python export.py FILE CHECKPOINT --to torch brings it back"
        )
    if "pruner" in state:
        return foreign.from_port(named, state["pruner"])
    weights = foreign.from_torch(named)
    weights.pop("n_averaged", None)
    pruned = foreign.from_pruned(weights)
    stored = (state.get("sparse") or {}).get("masks", {})
    masks = {name: unpack(mask) for name, mask in stored.items()}
    return foreign.masked(pruned.state_dict, {**pruned.masks, **masks})


def _from_tf(prefix: Path) -> Weights:
    try:
        tensorflow = importlib.import_module("tensorflow")  # a large package for rare use
    except ImportError:
        raise ValueError(
            "reading TensorFlow checkpoints needs tensorflow: pip install tensorflow-cpu"
        ) from None
    reader = tensorflow.train.load_checkpoint(str(prefix))
    names = [n for n in reader.get_variable_to_shape_map() if n.startswith("resnet_model/")]
    variables = {name: torch.from_numpy(np.array(reader.get_tensor(name))) for name in names}
    return from_tf(variables)


def from_tf(variables: Mapping[str, Tensor]) -> Weights:
    """Return the network of the RigL repository's variables, and how it saw images."""
    arch = foreign.tf_arch(variables)
    network = foreign.from_tf(variables, arch)
    config = {"interpolation": "tensorflow"}
    return Weights(network.state_dict, network.masks, arch=arch, config=config)


def pack(mask: Tensor) -> dict[str, Any]:
    """Return a mask as checkpoints of sparse runs hold it: eight entries a byte, lowest first."""
    bits = np.packbits(mask.numpy(), axis=None, bitorder="little")
    return {"shape": list(mask.shape), "bits": torch.from_numpy(bits)}


def unpack(packed: Mapping[str, Any]) -> Tensor:
    """Undo `pack`."""
    shape = torch.Size(packed["shape"])
    bits = np.unpackbits(packed["bits"].numpy(), count=shape.numel(), bitorder="little")
    return torch.from_numpy(bits).bool().reshape(shape)
