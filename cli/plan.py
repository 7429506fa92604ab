"""What --dry-run says of the sparse side of a run: counts of all layers, FLOPs and bytes."""

from collections.abc import Mapping
from typing import Any

from torch import nn

import sparse
from sparse import Allocated, costs


def sparse_plan(model: nn.Module, method: Allocated | None, *, total_steps: int) -> dict[str, Any]:
    """Return the sparse part of the plan: the method and the exact counts of every layer.

    Where the counts of single layers are not known before training, they are null: with the global
    scope, for example.

    Args:
        model: The network.
        method: The method, fitted to it; None in a dense run.
        total_steps: Optimizer steps of the run.
    """
    weights = sparse.prunable(model, include=None if method is None else method.include)
    shapes = {name: tuple(p.shape) for name, p in weights.items()}
    sizes = {name: p.numel() for name, p in weights.items()}
    counts: Mapping[str, int] | None = sizes
    total = sum(sizes.values())
    if method is not None:
        counts, total = method.final_counts, method.final_total
    window = None if method is None else method.window
    known = counts is not None
    blocks = None if method is None else method.allocation.blocks
    shared = known and (method is None or not method.follows_masks)
    return {
        "sparsity": getattr(method, "sparsity", None),
        "distribution": (method.distribution or "erk") if method is not None and shared else None,
        "delta_t": window and window.delta_t,
        "drop_fraction": getattr(method, "drop_fraction", None),
        "t_end": window and window.t_end,
        "num_updates": 0 if method is None else _num_updates(method, total_steps),
        "overall_sparsity": 1 - total / sum(sizes.values()),
        "layers": [
            {
                "name": name,
                "shape": list(shapes[name]),
                "num_active": counts[name] if counts is not None else None,
                "density": counts[name] / size if counts is not None else None,
                **({"block": list(blocks[name])} if blocks else {}),
            }
            for name, size in sizes.items()
        ],
    }


def _num_updates(method: Allocated, total_steps: int) -> int:
    """Count the updates of a run; one before training is none."""
    return 0 if method.timing == "once" else sum(map(method.due, range(total_steps)))


def cost_plan(
    model: nn.Module, method: Allocated | None, *, image_size: int, total_steps: int
) -> dict[str, Any] | None:
    """Return FLOPs and bytes (see `sparse.costs.report`), in the published convention.

    The training ratio is relative to dense training of the same length. Where the counts of single
    layers are not known before training, neither are the costs: None. The method is fitted to the
    network.
    """
    include = None if method is None else method.include
    layers = costs.trace_layers(model, image_size, include=include)
    if method is None:
        return costs.report(layers)
    if method.final_counts is None:
        return None
    return costs.report(
        layers,
        {name: 1 - zeros for name, zeros in method.allocation.sparsities.items()},
        method=method,
        total_steps=total_steps,
        num_active=method.final_counts,
    )
