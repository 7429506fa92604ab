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

    Bytes of `pack_rows` are unpacked, too.

    Raises:
        ValueError: The number of bytes does not fit the shape.
    """
    if packed.dim() == 2:
        return _unpack_rows(packed, tuple(shape))
    numel = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != ((numel + 7) // 8,):
        raise ValueError(f"{tuple(packed.shape)} bytes do not hold a mask of {tuple(shape)}")
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    flat = (packed[:, None] >> bits).bitwise_and_(1).view(torch.bool).view(-1)
    return flat[:numel].view(*shape)


def pack_rows(mask: Tensor) -> Tensor:
    """Pack a mask so that rows, the entries of an index of dimension 0, begin with a byte.

    Whoever has some rows of a mask, as a process of several does, can pack them alone.

    Returns:
        2-dim uint8 tensor [rows, ceil(entries of a row / 8)] on the same device.
    """
    rows, width = _rows_of(mask.shape)
    flat = torch.nn.functional.pad(mask.reshape(rows, width), (0, -width % 8))
    return pack(flat).view(rows, -(-width // 8))


def _unpack_rows(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    rows, width = _rows_of(shape)
    if packed.dtype != torch.uint8 or packed.shape != (rows, -(-width // 8)):
        raise ValueError(f"{tuple(packed.shape)} bytes do not hold a mask of {shape}")
    padded = unpack(packed.reshape(-1), (rows, -(-width // 8) * 8))
    return padded[:, :width].reshape(shape)


def _rows_of(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)
