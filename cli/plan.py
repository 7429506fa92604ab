"""What --dry-run says of the sparse side of a run: counts of all layers, FLOPs and bytes."""

from collections.abc import Mapping
from typing import Any

from torch import nn

import sparse
from cli.flags import create_method
from sparse import Allocated, costs


def sparse_plan(model: nn.Module, flags: Any, *, total_steps: int) -> dict[str, Any]:
    """Return the sparse part of the plan: the method and the exact counts of every layer.

    With the global scope the counts of single layers are not known before training: null.
    """
    method = create_method(flags, total_steps)
    weights = sparse.prunable(model, include=None if method is None else method.include)
    shapes = {name: tuple(p.shape) for name, p in weights.items()}
    sizes = {name: p.numel() for name, p in weights.items()}
    counts: Mapping[str, int] = sizes
    if method is not None:
        method = method.fitted_to(model)
        counts = method.allocation.num_active
    window = None if method is None else method.window
    known = _knows_layers(method)
    return {
        "method": flags.sparse_method,
        "sparsity": getattr(method, "sparsity", None),
        "distribution": (method.distribution or "erk") if method is not None and known else None,
        "delta_t": window and window.delta_t,
        "drop_fraction": getattr(method, "drop_fraction", None),
        "t_end": window and window.t_end,
        "num_updates": 0 if window is None else window.num_updates(total_steps),
        "overall_sparsity": 1 - sum(counts.values()) / sum(sizes.values()),
        "layers": [
            {
                "name": name,
                "shape": list(shapes[name]),
                "num_active": count if known else None,
                "density": count / sizes[name] if known else None,
            }
            for name, count in counts.items()
        ],
    }


def _knows_layers(method: Allocated | None) -> bool:
    """Say whether the counts of single layers are known before training."""
    return method is None or method.scope == "layer"


def cost_plan(
    model: nn.Module, flags: Any, *, image_size: int, total_steps: int
) -> dict[str, Any] | None:
    """Return FLOPs and bytes (see `sparse.costs.report`), in the published convention.

    The training ratio is relative to dense training of the same length. With the global scope
    nothing is known before training: None.
    """
    method = create_method(flags, total_steps)
    include = None if method is None else method.include
    layers = costs.trace_layers(model, image_size, include=include)
    if method is None:
        return costs.report(layers)
    if not _knows_layers(method):
        return None
    allocation = method.fitted_to(model).allocation
    return costs.report(
        layers,
        {name: 1 - zeros for name, zeros in allocation.sparsities.items()},
        method=method,
        total_steps=total_steps,
        num_active=allocation.num_active,
    )
