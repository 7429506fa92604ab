"""Save the state of a sparse run as plain numbers and tensors; check it on loading.

torch.distributed.checkpoint loads the keys that a fresh run has, and these alone. All keys of a run
are therefore there from its start. What comes later is text. Of a weight that is spread over
processes, the tensors of the state are spread, too.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..topology.bits import pack, pack_rows, unpack
from ..topology.flat import count_nonzero
from ..topology.shards import is_sharded, local, part_like, part_of, spread_as, whole

Tensors = Mapping[str, Tensor]

_VERSION = 2
_READABLE = (1, 2)  # 1: masks without rows; method_state and last_update are no text
_FORMER_NAMES = {"snfs-fixed": "snfs"}  # former name of a method, in older states -> its name
_KEYS = ("step", "num_updates", "last_update", "masks", "averages", "method_state", "explored")


def save(
    *,
    method: str,
    step: int,
    num_updates: int,
    last_update: Mapping[str, float],
    masks: Tensors,
    averages: Tensors | None,
    method_state: Tensors,
    explored: Tensors | None,
) -> dict[str, Any]:
    """Collect the state of a run: numbers, strings and tensors on the CPU, or spread tensors.

    Masks take 1 bit per weight. Each mask is stored with its shape.

    Args:
        masks: Name -> mask, of all weights that may have one.
        averages: The averages of the parts here, so far; None if the run has none.
        explored: The explored weights of the parts here; None if the run does not track them.
    """
    numbers = {name: [str(v.dtype)[6:], v.tolist()] for name, v in method_state.items()}
    return {
        **masks_alone(masks),
        "method": method,
        "step": step,
        "num_updates": num_updates,
        "last_update": json.dumps(dict(last_update)),
        "averages": {} if averages is None else _whole(averages, masks),
        "averaged": json.dumps(list(averages or ())),
        "method_state": json.dumps(numbers),
        "explored": None if explored is None else _rows_of(explored, masks),
    }


def collected(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state whose tensors are whole and on the CPU, for a file that one process writes.

    The processes over which the weights are spread must call this together.
    """
    found: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            found[name] = collected(value)
        elif isinstance(value, Tensor) and is_sharded(value):
            found[name] = whole(value).cpu()
            if value.dtype == torch.bool:
                found[name] = pack_rows(found[name])
        else:
            found[name] = value
    return found


def masks_alone(masks: Tensors) -> dict[str, Any]:
    """Return a state that holds masks and nothing of a run."""
    packed = {name: {"shape": [*m.shape], "bits": _bits(m)} for name, m in masks.items()}
    return {"version": _VERSION, "masks": packed}


def _bits(mask: Tensor) -> Tensor:
    """Pack a mask by rows. Where the parts are no whole rows, the entries stay bools."""
    if not is_sharded(mask):
        return pack_rows(mask).cpu()
    if not part_of(mask).has_whole_rows:
        return mask
    bits = pack_rows(local(mask))
    return spread_as(bits, mask, (mask.shape[0], bits.shape[1]))


def _rows_of(explored: Tensors, masks: Tensors) -> dict[str, Tensor]:
    sizes = {name: local(masks[name]).shape for name in explored}
    marks = {name: unpack(bits, sizes[name]) for name, bits in explored.items()}
    return {name: _bits(spread_as(mark, masks[name])) for name, mark in marks.items()}


def _whole(averages: Tensors, masks: Tensors) -> dict[str, Tensor]:
    """Copy averages, with zeros where there is none so far."""
    found = {}
    for name, mask in masks.items():
        average = averages.get(name)
        if average is None:
            average = torch.zeros(local(mask).shape, device=local(mask).device)
        spread = is_sharded(mask)
        copied = average.detach().clone() if spread else average.detach().to("cpu", copy=True)
        found[name] = spread_as(copied, mask)
    return found


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
    if state["version"] not in _READABLE:
        raise ValueError(
            f"sparse state: its version is {state['version']}, known are 1 to {_VERSION}"
        )
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
        masks[name] = _mask(_take(entry, "bits", f" of the mask of {name}"), weight)
    return masks


def _mask(bits: Tensor, weight: Tensor) -> Tensor:
    """Undo `_bits`, for a weight that may be spread in another way than the bits are."""
    if not is_sharded(bits):
        return part_like(unpack(bits.to(weight.device), weight.shape), weight)
    if bits.dtype == torch.bool:
        return bits
    return spread_as(unpack(local(bits), local(weight).shape), weight)


def load_numbers(
    state: Mapping[str, Any], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor | float]]:
    """Read what a method remembers, and the figures of the last update."""
    memory, last = state["method_state"], state["last_update"]
    if state["version"] == 1:
        return {name: value.to(device) for name, value in memory.items()}, dict(last)
    numbers = {
        name: torch.tensor(values, dtype=getattr(torch, dtype), device=device)
        for name, (dtype, values) in json.loads(memory).items()
    }
    return numbers, json.loads(last)


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
    counts = count_nonzero(masks).tolist()
    for name, count in zip(masks, counts, strict=True):
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
    if state["version"] > 1:
        saved = {name: saved[name] for name in json.loads(_take(state, "averaged", ""))}
    averages = {}
    for name, value in saved.items():
        if name not in weights or value.shape != weights[name].shape:
            raise ValueError(f"sparse state: the gradient average of {name} fits no weight")
        weight, part = local(weights[name]), local(part_like(value, weights[name]))
        averages[name] = torch.empty_like(weight, dtype=value.dtype).copy_(part)
    return averages


def load_explored(state: Mapping[str, Any], weights: Tensors) -> dict[str, Tensor]:
    """Read the record of the explored weights that lie here.

    Raises:
        ValueError: The state has none, or it does not fit the weights.
    """
    saved = state["explored"]
    if saved is None:
        raise ValueError("sparse state: key 'explored' is empty, this run tracks exploration")
    explored = {}
    for name, weight in weights.items():
        bits = _take(saved, name, " of explored")
        try:
            explored[name] = pack(local(_mask(bits, weight)))
        except ValueError as error:
            raise ValueError(f"sparse state: the explored weights of {name}: {error}") from None
    return explored


def _take(state: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in state:
        raise ValueError(f"sparse state: key {key!r}{where} is missing")
    return state[key]
