"""Check that all ranks of a distributed run hold the same masks."""

from collections.abc import Mapping

import torch
from torch import Tensor, distributed

from sparse.errors import SparsityError
from sparse.topology.rng import Draw


def has_ranks() -> bool:
    """Say whether this process is one of several."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def is_first_rank() -> bool:
    """Say whether this process is rank 0, or the only process."""
    return not has_ranks() or distributed.get_rank() == 0


def verify_across_ranks(masks: Mapping[str, Tensor]) -> None:
    """Compare a digest of every mask across ranks.

    All ranks must call this function together. The host reads the result. This is the only place
    where an update waits for the device.

    Raises:
        SparsityError: A mask differs from that of rank 0; names the layer and the ranks.
    """
    if not masks:
        return
    mine = torch.stack([digest(mask) for mask in masks.values()])
    everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyone, mine)
    differs = torch.stack(everyone).ne(everyone[0]).cpu()
    if not differs.any():
        return
    for layer, name in enumerate(masks):
        ranks = differs[:, layer].nonzero().flatten().tolist()
        if ranks:
            raise SparsityError(
                f"the mask of {name} on rank {', '.join(map(str, ranks))} differs from rank 0: "
                "weights, gradients or seeds are not the same on all ranks"
            )


def digest(mask: Tensor) -> Tensor:
    """Condense a mask to one number: int64, 0-dim, and the same on every device."""
    flat = mask.reshape(-1)
    words = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
    factors = Draw((words.numel(),), (0,)).tensor(mask.device).long() * 2 + 1
    return (words * factors).sum()
