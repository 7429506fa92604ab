"""Go on with a sparse run where model and optimizer were loaded before there was a sparsifier."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..methods.base import Allocated
from ..methods.layers import prunable_modules, weights_of
from ..topology.flat import count_nonzero
from ..topology.shards import local
from . import checkpoints
from .sparsifier import Sparsifier


def resume(
    model: nn.Module,
    optimizer: Optimizer,
    method: Allocated,
    state: Mapping[str, Any],
    **options: Any,
) -> Sparsifier:
    """Make a sparsifier that goes on with `state`, for a model that holds its weights already.

    This is for loops that load model and optimizer before a sparsifier can exist: a new one would
    begin with random masks, and zero weights that were trained. Where the sparsifier exists first,
    `load_state_dict` is enough.

    Args:
        model: The model with the weights that were saved together with `state`.
        optimizer: Its optimizer; what it holds at inactive connections is zeroed.
        method: The method.
        state: What `Sparsifier.state_dict` gave.
        **options: Further arguments of `Sparsifier`.

    Raises:
        ValueError: The state is of another run, or the model has other weights than were saved with
            it: masking them would lose some.
    """
    method = method.fitted_to(model)
    checkpoints.check(state, method.name)
    weights = weights_of(prunable_modules(model, method.num_active))
    counts = {name: weight.numel() for name, weight in weights.items()}
    is_dense = method.num_active == counts and state["num_updates"] == 0
    maskable = {} if is_dense else {name: weights[name] for name in method.maskable}
    masks = {} if is_dense else checkpoints.load_masks(state, maskable)
    if method.keeps_counts:
        checkpoints.check_counts(masks, method.num_active)
    for name, mask in masks.items():
        if bool(local(weights[name]).detach()[~local(mask)].any()):
            raise ValueError(
                f"sparse state: {name} is not 0 where its mask is inactive; the model does not "
                "hold the weights that were saved with this state"
            )
    counts |= zip(masks, count_nonzero(masks).tolist() if masks else (), strict=True)
    options |= {"num_active": counts, "maskable": method.maskable, "masks": masks}
    sparsifier = Sparsifier(model, optimizer, method, **options)
    sparsifier.load_state_dict(state)
    return sparsifier
