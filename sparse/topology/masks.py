"""Pure functions on masks: bool tensors in which True marks an active weight.

Functions that rank do so by magnitude, and their counts are exact. selection.py states the rule for
ties and NaN.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparse.topology.rng import Draw
from sparse.topology.selection import Scores, add_largest, largest, remove_smallest


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


def check_masks(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
    """Refuse masks that are missing, not bool, or of another shape than their weights.

    Raises:
        ValueError: Names the layer, and `source`, which gave the masks.
    """
    for name, weight in weights.items():
        mask = masks.get(name)
        if mask is None or mask.dtype != torch.bool or mask.shape != weight.shape:
            found = "none" if mask is None else f"{mask.dtype} of {tuple(mask.shape)}"
            raise ValueError(
                f"{source} gave no bool mask of {tuple(weight.shape)} for {name}, but {found}"
            )


def topk_mask(scores: Scores, num_active: int | Tensor, among: Tensor | None = None) -> Tensor:
    """Make a mask of the `num_active` entries of largest |score|.

    Only entries in `among` are candidates (by default all). If there are fewer candidates than
    `num_active`, all of them are active.
    """
    if among is None:
        device = scores.device if isinstance(scores, Tensor) else torch.device("cpu")
        among = torch.ones(scores.shape, dtype=torch.bool, device=device)
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
    if active_first:
        kept = remove_smallest(mask, drop_scores, num_dropped)
    else:
        if isinstance(drop_scores, Draw):
            raise ValueError(
                "active_first=False needs drop scores that can be 0, not a random draw"
            )
        kept = largest(drop_scores * mask, mask.sum() - num_dropped, torch.ones_like(mask))
    return add_largest(kept, grow_scores, num_dropped)


def bernoulli_growth(kept: Tensor, expected: Tensor, uniform: Tensor) -> Tensor:
    """Activate each inactive entry with probability expected / number of inactive entries.

    This is the random growth of Dettmers & Zettlemoyer 2019. Only the expected count is exact.

    Args:
        kept: The mask after dropping.
        expected: 0-dim tensor, the number of entries to activate.
        uniform: Numbers uniform on [0, 1), of the shape of `kept`.
    """
    return kept | (uniform < expected / (~kept).sum())


def pack(mask: Tensor) -> Tensor:
    """Pack a bool tensor into bytes of eight entries, with the first entry in the lowest bit.

    Returns:
        1-dim uint8 tensor of ceil(numel / 8) bytes on the same device.
    """
    flat = mask.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.uint8).view(-1, 8)
    # Working bit by bit keeps temporary tensors at an eighth of the mask's size.
    packed = padded[:, 0].clone()
    for bit in range(1, 8):
        packed |= padded[:, bit] << bit
    return packed


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `pack`.

    Raises:
        ValueError: The number of bytes does not fit the shape.
    """
    numel = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != ((numel + 7) // 8,):
        raise ValueError(f"{tuple(packed.shape)} bytes do not hold a mask of {tuple(shape)}")
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    flat = (packed[:, None] >> bits).bitwise_and_(1).view(torch.bool).view(-1)
    return flat[:numel].view(*shape)
