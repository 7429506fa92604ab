"""Figures of masks over time: their sparsity, and which weights were ever active."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse.topology.bits import pack
from sparse.training.gates import gather

Tensors = Mapping[str, Tensor]


def record_explored(explored: dict[str, Tensor], masks: Tensors) -> None:
    """Add the active weights of masks to those explored so far, one bit each."""
    for name, mask in masks.items():
        bits = pack(mask)
        explored[name] = explored[name] | bits if name in explored else bits


def count_explored(explored: Tensors) -> int:
    """Count the explored weights. Waits for the device."""
    sums = [((bits >> place) & 1).sum() for bits in explored.values() for place in range(8)]
    return int(gather(sums).sum())


def turnover(old: Tensors, new: Tensors, fresh: Tensors, *, keeps_counts: bool) -> Tensors:
    """Count the connections that an update dropped and grew: 0-dim tensors on the device.

    Args:
        old: The masks before.
        new: The masks after.
        fresh: The marks of new connections.
        keeps_counts: As many connections come as go.
    """
    grown = _total(fresh)
    dropped = grown if keeps_counts else grown + _total(old) - _total(new)
    return {"dropped": dropped, "grown": grown}


def _total(masks: Tensors) -> Tensor:
    return gather([torch.count_nonzero(mask) for mask in masks.values()]).sum()


def summarize(num_active: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, float]:
    """Compute the sparsity of all layers together and of each layer."""
    summary = {"sparsity": 1.0 - sum(num_active.values()) / sum(sizes.values())}
    for name, size in sizes.items():
        summary[f"sparsity.{name.removesuffix('.weight')}"] = 1.0 - num_active[name] / size
    return summary
