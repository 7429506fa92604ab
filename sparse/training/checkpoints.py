"""Save the state of a sparse run as plain numbers and tensors; check it on loading."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..topology.bits import pack, unpack

Tensors = Mapping[str, Tensor]

_VERSION = 1
_FORMER_NAMES = {"snfs-fixed": "snfs"}  # former name of a method, in older states -> its name
_KEYS = ("step", "num_updates", "last_update", "masks", "averages", "method_state", "explored")


def save(
    *,
    method: str,
    step: int,
    num_updates: int,
    last_update: Mapping[str, float],
    masks: Tensors,
    averages: Tensors,
    method_state: Tensors,
    explored: Tensors | None,
) -> dict[str, Any]:
    """Collect the state of a run: numbers, strings and tensors on the CPU.

    Masks take 1 bit per weight. Each mask is stored with its shape.
    """
    return {
        **masks_alone(masks),
        "method": method,
        "step": step,
        "num_updates": num_updates,
        "last_update": dict(last_update),
        "averages": _copies(averages),
        "method_state": _copies(method_state),
        "explored": None if explored is None else _copies(explored),
    }


def masks_alone(masks: Tensors) -> dict[str, Any]:
    """Return a state that holds masks and nothing of a run."""
    packed = {name: {"shape": [*m.shape], "bits": pack(m).cpu()} for name, m in masks.items()}
    return {"version": _VERSION, "masks": packed}


def read_masks(state: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Return all masks of a state, or none where there is no state.

    Raises:
        KeyError: A mask has no shape or no bits.
        ValueError: Its bits do not fit its shape.
    """
    stored = (state or {}).get("masks") or {}
    return {name: unpack(mask["bits"], tuple(mask["shape"])) for name, mask in stored.items()}


def check(state: Mapping[str, Any], method: str) -> None:
    """Refuse a state that has another format, is of another method, or lacks a key.

    Raises:
        ValueError: Names what does not fit.
    """
    for key in ("version", "method"):
        _take(state, key, "")
    if state["version"] != _VERSION:
        raise ValueError(f"sparse state: its version is {state['version']}, known is {_VERSION}")
    if (written := method_name(state)) != method:
        raise ValueError(
            f"sparse state: it was written by method {written!r}, this run uses {method!r}"
        )
    for key in _KEYS:
        _take(state, key, "")


def method_name(state: Mapping[str, Any]) -> str | None:
    """Give the name of the method that wrote a state, None if the state does not have it."""
    name = state.get("method")
    return _FORMER_NAMES.get(name, name) if isinstance(name, str) else None


def load_masks(state: Mapping[str, Any], weights: Tensors) -> dict[str, Tensor]:
    """Read the masks of exactly the given weights, onto the weights' devices.

    Raises:
        ValueError: A mask is missing, belongs to no weight, or has another shape than its weight.
    """
    saved = state["masks"]
    for name in saved.keys() - weights.keys():
        raise ValueError(f"sparse state: it has a mask for {name}, this run has none there")
    masks = {}
    for name, weight in weights.items():
        entry = _take(saved, name, " of masks")
        shape = tuple(_take(entry, "shape", f" of the mask of {name}"))
        if shape != tuple(weight.shape):
            raise ValueError(
                f"sparse state: the mask of {name} has shape {shape}, "
                f"the weight {tuple(weight.shape)}"
            )
        bits = _take(entry, "bits", f" of the mask of {name}")
        masks[name] = unpack(bits.to(weight.device), shape)
    return masks


def check_masks(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
    """Refuse masks that are missing, not bool, or of another shape than their weights.

    Raises:
        ValueError: Names the layer, and `source` as who gave the masks.
    """
    for name, weight in weights.items():
        mask = masks.get(name)
        if mask is None or mask.dtype != torch.bool or mask.shape != weight.shape:
            found = "none" if mask is None else f"{mask.dtype} of {tuple(mask.shape)}"
            raise ValueError(
                f"{source} gave no bool mask of {tuple(weight.shape)} for {name}, but {found}"
            )


def check_counts(masks: Tensors, num_active: Mapping[str, int]) -> None:
    """Refuse masks whose number of active weights is not that of the run.

    Raises:
        ValueError: Names the layer and both numbers.
    """
    for name, mask in masks.items():
        count = int(mask.sum())
        if count != num_active[name]:
            raise ValueError(
                f"the mask of {name} has {count} active weights, this run {num_active[name]}; "
                "it is of another sparsity, distribution or redistribution"
            )


def load_averages(
    state: Mapping[str, Any], weights: Tensors, wanted: bool, needed: bool
) -> dict[str, Tensor]:
    """Read gradient averages onto the devices and into the memory layouts of the weights.

    Args:
        state: The state.
        weights: The weights by name.
        wanted: Whether the run has a use for averages at its next step.
        needed: Whether it keeps them over all steps.

    Raises:
        ValueError: The run needs averages and the state has none, or one fits no weight.
    """
    saved = state["averages"]
    if not wanted:
        return {}
    if needed and state["step"] > 0 and not saved:
        raise ValueError("sparse state: key 'averages' is empty, this run averages gradients")
    averages = {}
    for name, value in saved.items():
        if name not in weights or value.shape != weights[name].shape:
            raise ValueError(f"sparse state: the gradient average of {name} fits no weight")
        averages[name] = torch.empty_like(weights[name], dtype=value.dtype).copy_(value)
    return averages


def load_explored(state: Mapping[str, Any], weights: Tensors) -> dict[str, Tensor]:
    """Read the record of explored weights.

    Raises:
        ValueError: The state has none, or it does not fit the weights.
    """
    saved = state["explored"]
    if saved is None:
        raise ValueError("sparse state: key 'explored' is empty, this run tracks exploration")
    explored = {}
    for name, weight in weights.items():
        bits = _take(saved, name, " of explored")
        if bits.numel() != (weight.numel() + 7) // 8:
            raise ValueError(f"sparse state: the explored weights of {name} do not fit its size")
        explored[name] = bits.to(weight.device)
    return explored


def _copies(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _take(state: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in state:
        raise ValueError(f"sparse state: key {key!r}{where} is missing")
    return state[key]
