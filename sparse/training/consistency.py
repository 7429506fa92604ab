"""Check that the processes that share a model hold the same masks."""

from collections.abc import Mapping

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import SparsityError
from ..topology.flat import batched, by_device, gather, layout_for
from ..topology.rng import Draw, drawn_at
from ..topology.shards import Ranks

_KEY = (0,)
_WORD = 8  # bools in an int64


def is_first_rank() -> bool:
    """Say whether this process is rank 0, or the only process."""
    known = distributed.is_available() and distributed.is_initialized()
    return not known or distributed.get_rank() == 0


def groups_with_copies(
    model: nn.Module, ranks: Ranks, process_group: "distributed.ProcessGroup | None"
) -> "list[distributed.ProcessGroup]":
    """List the groups of processes that hold the same masks as this one.

    Args:
        model: The model, perhaps in DistributedDataParallel, which knows its group.
        ranks: The processes that share its weights.
        process_group: The group where model and weights do not tell it.

    Raises:
        ValueError: The group is given though the weights tell it.
    """
    copies = list(dict.fromkeys(group for part in ranks.parts.values() for group in part.copies))
    if ranks.groups or copies:
        if process_group is not None:
            raise ValueError("process_group has no effect on sharded weights: their mesh has it")
        return copies
    if process_group is None and distributed.is_available():
        wrappers = (m for m in model.modules() if isinstance(m, DistributedDataParallel))
        process_group = next((wrapper.process_group for wrapper in wrappers), None)
    return [] if process_group is None or process_group.size() == 1 else [process_group]


def check_not_joined(model: nn.Module) -> None:
    """Refuse updates where processes may take different numbers of steps.

    Raises:
        ValueError: `DistributedDataParallel.join` is in use, where processes may end early.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            join = module._join_config
            if join.enable and not join.throw_on_early_termination:
                raise ValueError(
                    "DistributedDataParallel.join() lets a process end early, but masks change on "
                    "all processes together: give all of them as many batches (drop_last=True), "
                    "or call join(throw_on_early_termination=True)"
                )


def verify_across_ranks(masks: Mapping[str, Tensor], group: "distributed.ProcessGroup") -> None:
    """Compare a digest of every mask across the ranks of a group.

    All ranks must call this function together. The host reads the result. This is the only place
    where an update waits for the device.

    Raises:
        SparsityError: A mask differs from that of the first rank; names the layer and the ranks.
    """
    if not masks:
        return
    mine = digests(masks)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    distributed.all_gather(everyone, mine, group=group)
    differs = torch.stack(everyone).ne(everyone[0]).cpu()
    if not differs.any():
        return
    members = distributed.get_process_group_ranks(group)
    for layer, name in enumerate(masks):
        ranks = [str(members[place]) for place in differs[:, layer].nonzero().flatten()]
        if ranks:
            raise SparsityError(
                f"the mask of {name} on rank {', '.join(ranks)} differs from rank {members[0]}: "
                "weights, gradients or seeds are not the same on all ranks"
            )


def digests(masks: Mapping[str, Tensor]) -> Tensor:
    """Condense every mask to one number: int64, the same on every device."""
    found: dict[str, Tensor] = {}
    for names in by_device(masks):
        if not batched(masks[names[0]]):
            found |= {name: digest(masks[name]) for name in names}
            continue
        layout = layout_for(masks[name] for name in names)
        words = layout.flatten([masks[name] for name in names], torch.bool).view(torch.int64)
        index = torch.arange(len(words), dtype=torch.int32, device=words.device)
        layout.add(index, [-start // _WORD for start in layout.starts])
        products = words * _factors(drawn_at(index, _KEY))
        found |= zip(names, layout.sums(products).unbind(), strict=True)
    return gather([found[name] for name in masks])


def digest(mask: Tensor) -> Tensor:
    """Condense a mask to one number: int64, 0-dim, and the same on every device."""
    flat = mask.reshape(-1)
    words = torch.nn.functional.pad(flat, (0, -flat.numel() % _WORD)).view(torch.int64)
    return (words * _factors(Draw((words.numel(),), _KEY).tensor(mask.device))).sum()


def _factors(drawn: Tensor) -> Tensor:
    return drawn.long() * 2 + 1
