"""Masks at one bit per weight, as checkpoints hold them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


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
