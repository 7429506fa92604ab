"""Compact sparse files: one bit per weight or block for the mask, and the active values.

A file is a safetensors container. It loads without pickle, and any reader of safetensors lists it:

- `<name>.mask`: uint8, bit i % 8 of byte i // 8 is 1 if weight i (C order) is active; if the header
  has `blocks` of (rows, columns) for the name, bit i is that of block i, in the C order of the
  shape (outputs / rows, inputs / columns, ...);
- `<name>.values`: the active weights in the same order;
- `<name>.scale`: float32 (out,), only with int8 values: weight = value * scale of its channel;
- `<name>`: an entry that is stored whole: dense weights, biases, BatchNorm;
- metadata: `format`, `header` (JSON: architecture, graph, normalization) and `sha256`, the digest
  of the header and all tensors. Files with blocks or activations, which earlier versions do not
  read, have the header compressed: JSON in xz in base64.

A file holds BatchNorm either folded, as one bias per channel, or as trained. In either case the
state dict comes back bit for bit: the folded network's in the first case, the trained one's in the
second.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..topology.bits import pack
from ..topology.blocks import (
    ONE,
    Block,
    are_whole,
    check_block,
    first_entries,
)
from . import graph, integers
from .graph import Node
from .header import DTYPES, Header, check_tensors, packed, parse, unpacked
from .integers import IntegerNetwork
from .units import Quantization, units

FORMAT, PACKED = "compact-sparse-1", "compact-sparse-2"  # with the header as it is, and compressed
MAX_REASON = 300  # characters
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class Compact:
    """The content of a file.

    Attributes:
        header: What the file says about its network.
        shapes: Of the entries that are stored.

    Raises:
        ValueError: The tensors do not fit the header.
    """

    def __init__(self, header: Header, tensors: Mapping[str, Tensor]) -> None:
        self.header = header
        self._tensors = tensors
        self.shapes, self._parameters = check_tensors(header, tensors)

    def masks(self) -> dict[str, Tensor]:
        """Return the masks (True = active) of the entries that have one."""
        return self.header.masks(self._tensors)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the dense state dict: bit for bit as it was stored, if it was stored as float32.

        Values of other types come back as float32. For a folded file, each BatchNorm only adds its
        bias, so that the model computes what the trained one did.
        """
        state = {name: self._dense(name) for name in self.header.names}
        return _with_identity(self.header.nodes, state) if self.header.folded else state

    def integers(self) -> IntegerNetwork:
        """Return the integers of a quantized network.

        Raises:
            ValueError: The network is not quantized.
        """
        if self._parameters is None:
            raise ValueError("the network is not quantized: its activations have no scales")
        found = units(self.header.nodes)
        return IntegerNetwork(
            units=found,
            activations=self.header.activations,
            parameters=self._parameters,
            state={
                name: self._dense(name)
                for name in integers.float_entries(found)
                if name in self.header.names
            },
        )

    def _dense(self, name: str) -> Tensor:
        shape = self.header.shapes.get(name)
        if shape is None:
            value = self._tensors[name]
            if value.dtype == torch.int8 and name + ".scale" in self._tensors:
                return _rescale(value, self._tensors[name + ".scale"])
            return value.float() if value.is_floating_point() else value
        mask = self.header.mask(name, self._tensors)
        values = self._tensors[name + ".values"]
        dense = torch.zeros(shape, dtype=torch.float32, device="cpu")
        dense[mask] = values.float()
        if values.dtype == torch.int8:
            return _rescale(dense, self._tensors[name + ".scale"])
        return dense


def save(
    path: str | Path,
    state: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    nodes: Sequence[Node],
    arch: str,
    model: Mapping[str, Any],
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bilinear",
    in_channels: int = 3,
    dtype: str = "float32",
    fold: bool = False,
    block: Sequence[int] | None = None,
    activations: Mapping[str, Quantization] | None = None,
) -> None:
    """Write a compact file, whole or not at all.

    Args:
        path: Replaced if it exists.
        state: Dense state dict of any floating-point type; inactive weights are 0.
        masks: Names of entries of `state` -> bool masks of their shapes, True = active. Entries
            without a mask, or with all weights active, are stored whole.
        nodes: Graph of the network (`graph.trace`).
        arch: Name of the architecture.
        model: Further arguments with which the architecture is created: numbers and strings.
        image_size: Side of the images, in pixels.
        mean: Mean that was subtracted from the images, per channel.
        std: Standard deviation by which the images were divided, per channel.
        interpolation: How images were resized.
        in_channels: Channels of the images.
        dtype: One of `DTYPES`, for the weights of convolutions and linear layers. int8 has one
            scale per output channel: the largest magnitude of the channel, divided by 127.
        fold: Fold BatchNorm into the convolution before it, and store one bias per channel instead
            of four vectors. The file becomes smaller, but the trained state dict cannot be
            recovered. A BatchNorm that follows no convolution of its own stays.
        block: Outputs and inputs of the blocks with which the network was trained. A mask that
            consists of whole blocks takes a bit per block; any other takes a bit per weight.
        activations: Scales and zero points of the values that int8 reads (`calibrate`), with which
            the network is computed in int8. Needs `fold` and the dtype int8.

    Raises:
        ValueError: A weight is not 0 where its mask is False, a mask or a weight does not fit, the
            dtype is unknown, or `read` would refuse the file for another reason.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    kernels = {n.parameters + "weight" for n in nodes if n.op in graph.KERNELS}
    state = {name: value.cpu() for name, value in graph.float32(state).items()}
    if fold:
        state = _fold(nodes, state)
    masks = {name: mask.cpu() for name, mask in masks.items() if not bool(mask.all())}
    whole = check_block(block)
    blocks = {n: whole for n, mask in masks.items() if whole != ONE and are_whole(mask, whole)}
    scales = integers.weight_scales(units(nodes), state, activations) if activations else {}
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        kind = dtype if name in kernels else "float32"
        found = _store(name, value, masks.get(name), kind, blocks.get(name, ONE), scales.get(name))
        tensors |= found
    unknown = masks.keys() - state.keys()
    if unknown:
        raise ValueError(f"there is no weight for the mask of {min(unknown)!r}")
    header = {
        "arch": arch,
        "model": dict(model),
        "in_channels": in_channels,
        "image_size": image_size,
        "mean": list(mean),
        "std": list(std),
        "interpolation": interpolation,
        "dtype": dtype,
        "folded": fold,
        "names": list(state),
        "shapes": {name: list(state[name].shape) for name in masks},
        "nodes": graph.to_json(nodes),
        **({"blocks": blocks} if blocks else {}),  # without blocks, as earlier versions read it
    }
    if activations:
        header["activations"] = {name: list(pair) for name, pair in activations.items()}
    text, version = json.dumps(header, separators=(",", ":")), FORMAT
    if blocks or activations:
        text, version = packed(text), PACKED
    metadata = {"format": version, "header": text, "sha256": digest(text, tensors)}
    check_tensors(_header(metadata), tensors)
    write_whole(Path(path), safetensors.torch.save(tensors, metadata))


def read(path: str | Path) -> Compact:
    """Return the content of a compact file. All of it is verified: a file may come from anybody.

    Raises:
        ValueError: The file does not exist, is damaged, has another format, or its tensors do not
            fit its graph; one line that names the file.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{path} is damaged or not a compact sparse network: {_line(error)}"
        ) from None
    if metadata.get("format") not in (FORMAT, PACKED):
        raise ValueError(
            f"{path} is not a compact sparse network of the formats {FORMAT} and {PACKED}: "
            "write one with export.py"
        )
    if metadata.get("sha256") != digest(metadata.get("header", ""), tensors):
        raise ValueError(f"{path} is damaged: its content does not have the digest it was given")
    try:
        return Compact(_header(metadata), tensors)
    except ValueError as error:
        raise ValueError(f"{path} is no valid compact sparse network: {_line(error)}") from None


def _header(metadata: Mapping[str, str]) -> Header:
    text = metadata.get("header", "")
    return parse(unpacked(text) if metadata["format"] == PACKED else text)


def _line(error: Exception) -> str:
    """Return an error's first line, shortened: the names in a file may be of any length."""
    return str(error).partition("\n")[0][:MAX_REASON]


def _store(
    name: str,
    value: Tensor,
    mask: Tensor | None,
    dtype: str,
    block: Block,
    scale: Tensor | None,
) -> dict[str, Tensor]:
    """Return the tensors of an entry; a scale is for int8, whose own follows from the weights."""
    if not value.is_floating_point():
        return {name: value.clone()}  # safetensors refuses tensors that share memory
    if mask is not None:
        if mask.shape != value.shape:
            raise ValueError(
                f"the mask of {name!r} is {tuple(mask.shape)}, its weight {tuple(value.shape)}"
            )
        if bool((value[~mask] != 0).any()):
            raise ValueError(f"{name!r} has weights that are not 0 where its mask is inactive")
    stored: dict[str, Tensor] = {}
    if dtype == "int8":
        if scale is None:
            largest = value.flatten(1).abs().amax(1)
            scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest)).float()
        value = (value.float() / scale.view(-1, *[1] * (value.dim() - 1))).round()
        stored[name + ".scale"] = scale
    value = value.to(DTYPES[dtype])
    if mask is None:
        return stored | {name: value.clone(memory_format=torch.contiguous_format)}
    bits = pack(first_entries(mask, block))
    return stored | {name + ".mask": bits, name + ".values": value[mask]}


def _rescale(value: Tensor, scale: Tensor) -> Tensor:
    return value.float() * scale.view(-1, *[1] * (value.dim() - 1))


def _fold(nodes: Sequence[Node], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with scaled weights. Only the bias of a folded BatchNorm stays."""
    folded = dict(state)
    for conv, norm in graph.folds(nodes):
        entries = {name: state[norm.parameters + name].double() for name in _BATCH_NORM[:4]}
        scale = entries["weight"] / torch.sqrt(entries["running_var"] + norm.eps)
        shift = entries["bias"] - entries["running_mean"] * scale
        weight = state[conv.parameters + "weight"]
        scaled = weight.double() * scale.view(-1, 1, 1, 1)
        folded[conv.parameters + "weight"] = scaled.to(weight.dtype)
        bias = conv.parameters + "bias"
        if bias in state:
            folded[bias] = (state[bias].double() * scale).float()
        for name in _BATCH_NORM:
            folded.pop(norm.parameters + name, None)
        folded[norm.parameters + "bias"] = shift.float()
    return folded


def _with_identity(nodes: Sequence[Node], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of a folded file with BatchNorms that only add their bias.

    The entries of each BatchNorm follow those of its convolution, as in the model's state dict.
    """
    norms = {conv.parameters + "weight": norm for conv, norm in graph.folds(nodes)}
    biases = {norm.parameters + "bias" for norm in norms.values()}
    full: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in biases:
            continue
        full[name] = value
        if name in norms:
            norm = norms[name]
            bias = state[norm.parameters + "bias"]
            full[norm.parameters + "weight"] = torch.ones_like(bias)
            full[norm.parameters + "bias"] = bias
            full[norm.parameters + "running_mean"] = torch.zeros_like(bias)
            full[norm.parameters + "running_var"] = torch.full_like(bias, 1 - norm.eps)
            full[norm.parameters + "num_batches_tracked"] = torch.zeros(
                (), dtype=torch.int64, device="cpu"
            )
    return full


def digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a header's JSON and of the tensors; a file carries this digest."""
    found = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        value = tensors[name]
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write or replace a file, whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
