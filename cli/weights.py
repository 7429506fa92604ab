"""Weights of any file together with their masks, whoever wrote it.

Reads what the trainer reads (image_classification.weights), and in such files the masks of our own
checkpoints, of the PyTorch port of RigL and of torch.nn.utils.prune. Also reads TensorFlow
checkpoints of the RigL repository.
"""

import importlib
from pathlib import Path

import numpy as np
import safetensors
import torch

from cli import foreign
from cli.foreign import Network
from image_classification import weights
from image_classification.weights import Weights, explained
from sparse import runtime
from sparse.training.checkpoints import read_masks


def read(path: Path, *, ema: bool = False) -> Network:
    """Return the weights and masks in a file; weights are 0 where a mask is inactive.

    Args:
        path: A file of `torch.save` or of safetensors, or the prefix of a TensorFlow checkpoint.
        ema: Take the averaged weights.

    Raises:
        ValueError: One line: the file is missing, damaged or of no known kind.
    """
    prefix = path.with_suffix("") if path.suffix == ".index" else path
    if Path(f"{prefix}.index").is_file():
        if ema:
            raise ValueError(f"{path} is a TensorFlow checkpoint, which has no averaged weights")
        with explained(path):
            return _read_tf(prefix)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name a file, or the prefix of PREFIX.index")
    found = weights.read(path, ema=ema)
    with explained(path):
        return _with_masks(found)


def read_sparse(path: Path) -> Network:
    """Return the weights and masks in a file that `read` reads, or in a compact file.

    Raises:
        ValueError: One line: the file is missing, damaged or of no known kind.
    """
    if not _is_compact(path):
        return read(path)
    compact = runtime.read(path)
    return Network(compact.state_dict(), arch=compact.header.arch, masks=compact.masks())


def _is_compact(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return any(name.endswith(".values") for name in file.keys())  # noqa: SIM118, no dict
    except (safetensors.SafetensorError, OSError):
        return False


def _with_masks(found: Weights) -> Network:
    if "pruner" in found.rest:
        state_dict = found.state_dict
        masks = foreign.port_masks(state_dict, found.rest["pruner"])
    else:
        state_dict, masks = foreign.from_pruned(found.state_dict)
        masks |= read_masks(found.rest.get("sparse"))
    given = {**vars(found), "state_dict": foreign.masked(state_dict, masks)}
    return Network(**given, masks=masks)


def _read_tf(prefix: Path) -> Network:
    try:
        tensorflow = importlib.import_module("tensorflow")  # a large package for rare use
    except ImportError:
        raise ValueError(
            "reading TensorFlow checkpoints needs tensorflow: pip install tensorflow-cpu"
        ) from None
    reader = tensorflow.train.load_checkpoint(str(prefix))
    names = [n for n in reader.get_variable_to_shape_map() if n.startswith("resnet_model/")]
    variables = {name: torch.from_numpy(np.array(reader.get_tensor(name))) for name in names}
    return foreign.from_tf(variables, foreign.tf_arch(variables))
