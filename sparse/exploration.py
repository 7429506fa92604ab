"""Remember which weights were ever active, one bit each."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse.masks import pack


def record(explored: dict[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Add the active weights of masks to those explored so far."""
    for name, mask in masks.items():
        bits = pack(mask)
        explored[name] = explored[name] | bits if name in explored else bits


def count(explored: Mapping[str, Tensor]) -> int:
    """Count the explored weights. Waits for the device."""
    sums = [((bits >> place) & 1).sum() for bits in explored.values() for place in range(8)]
    return int(torch.stack([value.cpu() for value in sums]).sum()) if sums else 0
