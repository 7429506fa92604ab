"""Pure functions on masks: bool tensors in which True marks an active weight.

Functions that rank do so by magnitude, and their counts are exact. selection.py states the rule for
ties and NaN.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .flat import count_nonzero
from .rng import Draw
from .selection import Counts, Scores, largest, replace


def random_mask(
    shape: Sequence[int],
    num_active: int,
    key: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Make a mask with exactly `num_active` entries at uniformly random places.

    Args:
        shape: Shape of the mask.
        num_active: Number of True entries, from 0 to the number of elements.
        key: Integers that select the random stream. A key gives the same mask on any device.
        device: Device of the mask.
    """
    every = torch.ones(tuple(shape), dtype=torch.bool, device=device)
    return largest(Draw(tuple(shape), tuple(key)), num_active, every)


def topk_mask(scores: Scores, num_active: int | Tensor, among: Tensor | None = None) -> Tensor:
    """Make a mask of the `num_active` entries of largest |score|.

    Only entries in `among` are candidates (by default all). If there are fewer candidates than
    `num_active`, all of them are active.
    """
    if among is None:
        like = scores if isinstance(scores, Tensor) else torch.empty(scores.shape)
        among = torch.ones_like(like, dtype=torch.bool)
    return largest(scores, num_active, among)


def drop_and_grow(
    mask: Tensor,
    drop_scores: Scores,
    grow_scores: Scores,
    num_dropped: int | Tensor,
    *,
    active_first: bool = True,
) -> Tensor:
    """Replace the weakest active entries: Evci et al. 2020, algorithm 1.

    The `num_dropped` active entries of smallest |drop score| are dropped. Then the same number
    is activated: entries of largest |grow score| among all that are inactive now. A dropped entry
    is a candidate, too, and may return. The number of active entries stays the same.

    Args:
        mask: The mask before.
        drop_scores: Usually the weights. Only active entries count.
        grow_scores: Usually the dense gradient, or a `Draw` for random growth.
        num_dropped: At most the number of active entries.
        active_first: Rank every active entry above every inactive one when dropping. False ranks
            inactive entries as score 0 among the active ones, as the RigL repository does without
            drop noise. An inactive entry may then be kept in place of an active zero.

    Returns:
        The mask after, a new bool tensor.
    """
    given = {"": mask}, {"": drop_scores}, {"": grow_scores}, {"": num_dropped}
    if active_first:
        return drop_and_grow_layers(*given)[""]
    if isinstance(drop_scores, Draw):
        raise ValueError("active_first=False needs drop scores that can be 0, not a random draw")
    num_kept = count_nonzero(given[0])[0] - num_dropped
    kept = largest(drop_scores * mask, num_kept, torch.ones_like(mask))
    return replace({"": kept}, grow=given[2], num_grown=given[3])[""]


def drop_and_grow_layers(
    masks: Mapping[str, Tensor],
    drop_scores: Mapping[str, Scores],
    grow_scores: Mapping[str, Scores],
    num_dropped: Counts,
) -> dict[str, Tensor]:
    """Do what `drop_and_grow` does in all layers of some masks: mappings by layer name."""
    counts = num_dropped
    return replace(masks, drop=drop_scores, num_dropped=counts, grow=grow_scores, num_grown=counts)
