"""Figures of masks over time: their sparsity, and which weights were ever active."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..topology.bits import pack
from ..topology.flat import batched, by_device, copy, count_nonzero, gather, joined, layout_for

Tensors = Mapping[str, Tensor]


def record_explored(explored: dict[str, Tensor], masks: Tensors) -> None:
    """Add the active weights of masks to those explored so far, one bit each."""
    for names in by_device(masks):
        if not batched(masks[names[0]]):
            bits = {name: pack(masks[name]) for name in names}
        else:  # every layer begins with a byte of its own
            layout = layout_for(masks[name] for name in names)
            packed = pack(layout.flatten([masks[name] for name in names], torch.bool))
            firsts = [start // 8 for start in layout.starts]
            sizes = [(masks[name].numel() + 7) // 8 for name in names]
            bits = {n: packed[i : i + k] for n, i, k in zip(names, firsts, sizes, strict=True)}
        known = [name for name in names if name in explored]
        if known:
            (found,) = joined(explored[name] for name in known)
            (more,) = joined(bits[name] for name in known)
            merged = torch.split(found.bitwise_or_(more), [len(bits[name]) for name in known])
            copy([explored[name] for name in known], merged)
        explored |= {name: bits[name].clone() for name in names if name not in explored}


def count_explored(explored: Tensors) -> int:
    """Count the explored weights. Waits for the device."""
    bytes_ = joined(explored.values())
    return int(gather([((bits >> k) & 1).sum() for bits in bytes_ for k in range(8)]).sum())


def fresh_marks(old: Tensors, new: Tensors) -> dict[str, Tensor]:
    """Mark the connections that are active in new masks and were not in old ones."""
    marks: dict[str, Tensor] = {}
    for names in by_device(old):
        if batched(old[names[0]]):
            layout = layout_for(old[name] for name in names)
            flat = layout.flatten([new[name] for name in names], torch.bool, clear=False)
            flat.gt_(layout.flatten([old[name] for name in names], torch.bool, clear=False))
            marks |= layout.by_layer(flat, names, old)
        else:
            marks |= {name: new[name] > old[name] for name in names}
    return {name: marks[name] for name in old}


def turnover(old: Tensors, new: Tensors, fresh: Tensors, *, keeps_counts: bool) -> Tensors:
    """Count the connections that an update dropped and grew: 0-dim tensors on the device.

    Args:
        old: The masks before.
        new: The masks after.
        fresh: The marks of new connections.
        keeps_counts: As many connections come as go.
    """
    counted = [fresh] if keeps_counts else [fresh, old, new]
    masks = {f"{place} {n}": m for place, some in enumerate(counted) for n, m in some.items()}
    grown, *totals = count_nonzero(masks).reshape(len(counted), len(fresh)).sum(1).unbind()
    return {"dropped": grown + totals[0] - totals[1] if totals else grown, "grown": grown}


def summarize(num_active: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, float]:
    """Compute the sparsity of all layers together and of each layer."""
    summary = {"sparsity": 1.0 - sum(num_active.values()) / sum(sizes.values())}
    for name, size in sizes.items():
        summary[f"sparsity.{name.removesuffix('.weight')}"] = 1.0 - num_active[name] / size
    return summary
