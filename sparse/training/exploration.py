"""Figures of masks over time: their sparsity, and which weights were ever active."""

from collections.abc import Mapping

from torch import Tensor

from sparse.topology.masks import pack
from sparse.training.gates import gather


def record(explored: dict[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Add the active weights of masks to those explored so far, one bit each."""
    for name, mask in masks.items():
        bits = pack(mask)
        explored[name] = explored[name] | bits if name in explored else bits


def count(explored: Mapping[str, Tensor]) -> int:
    """Count the explored weights. Waits for the device."""
    sums = [((bits >> place) & 1).sum() for bits in explored.values() for place in range(8)]
    return int(gather(sums).sum())


def summarize(num_active: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, float]:
    """Compute the sparsity of all layers together and of each layer."""
    summary = {"sparsity": 1.0 - sum(num_active.values()) / sum(sizes.values())}
    for name, size in sizes.items():
        summary[f"sparsity.{name.removesuffix('.weight')}"] = 1.0 - num_active[name] / size
    return summary
