"""Check that all ranks of a distributed run hold the same masks."""

from collections.abc import Mapping

import torch
from torch import Tensor, distributed

from ..errors import SparsityError
from ..topology.flat import WORD, batched, by_device, gather, layout_of, sums_until
from ..topology.rng import Draw, drawn_at

_KEY = (0,)


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
    mine = digests(masks)
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


def digests(masks: Mapping[str, Tensor]) -> Tensor:
    """Condense every mask to one number: int64, the same on every device."""
    found: dict[str, Tensor] = {}
    for names in by_device(masks):
        if not batched(masks[names[0]]):
            found |= {name: digest(masks[name]) for name in names}
            continue
        layout = layout_of(tuple(masks[name].numel() for name in names))
        words = layout.flatten([masks[name] for name in names], torch.bool).view(torch.int64)
        index = torch.arange(len(words), dtype=torch.int32, device=words.device)
        firsts = [start // WORD for start in layout.starts]
        parts = torch.split(index[: sum(layout.spans) // WORD], [n // WORD for n in layout.spans])
        torch._foreach_add_(list(parts), [-first for first in firsts])
        products = words * _factors(drawn_at(index, _KEY))
        ends = [
            (start + n) // WORD - 1 for start, n in zip(layout.starts, layout.spans, strict=True)
        ]
        found |= zip(names, sums_until(products, ends).unbind(), strict=True)
    return gather([found[name] for name in masks])


def digest(mask: Tensor) -> Tensor:
    """Condense a mask to one number: int64, 0-dim, and the same on every device."""
    flat = mask.reshape(-1)
    words = torch.nn.functional.pad(flat, (0, -flat.numel() % WORD)).view(torch.int64)
    return (words * _factors(Draw((words.numel(),), _KEY).tensor(mask.device))).sum()


def _factors(drawn: Tensor) -> Tensor:
    return drawn.long() * 2 + 1
