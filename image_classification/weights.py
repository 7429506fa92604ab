"""Read files of weights, whoever wrote them, and check them against a network.

Reads files of torch.save and of safetensors: bare state dicts, and checkpoints of torchvision's and
NVIDIA's trainers, of timm, and our own. Nothing in a file is executed.

Our names are torchvision's (layer1.0.conv1.weight), without "module.".
"""

import argparse
import contextlib
import pathlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from image_classification import checkpoint

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
# In front of all names: DistributedDataParallel, AveragedModel, a module that holds the network.
_OUTER = re.compile(r"(?:(?:module|model)\.)+")
# Anywhere in a name, where a part was wrapped: torch.compile, FSDP, activation checkpointing.
_WRAPPER = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


@dataclass(frozen=True)
class Weights:
    """Weights of a file under our names, and what else it says."""

    state_dict: dict[str, Tensor]
    arch: str | None = None
    """The network, where the file names it."""
    entry: str | None = None
    """Entry of the file that had the weights; None: the file is the state dict."""
    left: tuple[str, ...] = ()
    """Entries with averaged weights that were not asked for."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Flags of main.py that belong to the network."""
    rest: Mapping[str, Any] = field(default_factory=dict)
    """What stands beside that entry, as it is."""


def read(path: Path, *, ema: bool = False) -> Weights:
    """Return the weights in a file of `torch.save` or of safetensors.

    Args:
        path: The file.
        ema: Take the averaged weights.

    Raises:
        ValueError: One line: the file is missing, damaged or of no known kind.
    """
    state = _load(path)
    with explained(path):
        return _select(state, ema=ema)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Tell in one line that what a file holds cannot be used.

    Raises:
        ValueError: In place of whatever misplaced content raises.
    """
    try:
        yield
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
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name a file of weights")
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
            f"it has averaged weights only ({averaged[0]}): python -m cli.convert --ema takes them"
        )
    entry = next(iter(averaged if ema else entries), None)
    named = state if entry is None else state[entry]
    if any(name.endswith(".values") for name in named):
        raise ValueError(
            "it is a compact file: python export.py FILE CHECKPOINT --to torch brings it back"
        )
    state_dict = from_torch(named)
    state_dict.pop("n_averaged", None)
    arch, config = state.get("arch"), state.get("config")
    return Weights(
        state_dict,
        arch=arch if isinstance(arch, str) else None,
        entry=entry,
        left=() if ema else tuple(averaged),
        config=config if isinstance(config, Mapping) else {},
        rest={} if entry is None else {key: state[key] for key in state if key != entry},
    )


def from_torch(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename the weights of torchvision, timm or NVIDIA's ConvNets to our names.

    What wrappers put into the names is taken out ("module." of DistributedDataParallel,
    "_orig_mod." of torch.compile), and NVIDIA's later versions number the stages of a ResNet from 0
    (layers.0.0.conv1). What is no tensor is left out.

    Raises:
        ValueError: Two weights get one name.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            continue
        ours = _our_name(name)
        if ours in renamed:
            raise ValueError(f"two of its weights are {ours}, one of them {name}")
        renamed[ours] = tensor
    return renamed


def _our_name(name: str) -> str:
    name = _WRAPPER.sub("", name)
    if outer := _OUTER.match(name):
        name = name[outer.end() :]
    return re.sub(r"^layers\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}.", name)
