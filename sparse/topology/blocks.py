"""Blocks of weights that are active or inactive as a whole, as kernels of several weights need.

Blocks lie in the first two dimensions of a weight, outputs and inputs.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .shards import cuts, local, spread_as

Tensors = Mapping[str, Tensor]
Block = tuple[int, int]
ONE: Block = (1, 1)


def check_block(block: Sequence[int] | None, why_not: str | None = None) -> Block:
    """Return the outputs and inputs of a block; None stands for a block of one weight.

    Args:
        block: Two numbers, or None.
        why_not: Why there can be none of several weights, if so.

    Raises:
        ValueError: The block is not two numbers of at least 1, or there can be none.
    """
    if block is None:
        return ONE
    numbers = tuple(block) if isinstance(block, Sequence) else ()
    if len(numbers) != 2 or not all(type(n) is int and n >= 1 for n in numbers):
        raise ValueError(
            f"block must be two numbers of at least 1, outputs and inputs such as (1, 4), got "
            f"{block!r}"
        )
    if numbers != ONE and why_not is not None:
        raise ValueError(f"{why_not}: leave block out")
    return numbers


def blocks_of(shapes: Mapping[str, Sequence[int]], block: Block) -> "Blocks":
    """Return the blocks of layers. A layer that the block does not divide has none.

    Args:
        shapes: Layer name -> shape of the weight.
        block: The block that is asked for.
    """

    def divides(shape: Sequence[int]) -> bool:
        return len(shape) >= 2 and all(s % n == 0 for s, n in zip(shape, block, strict=False))

    fits = [name for name, shape in shapes.items() if block != ONE and divides(shape)]
    return Blocks(dict.fromkeys(fits, block))


class Blocks:
    """The blocks of the layers of a model.

    Args:
        blocks: Layer name -> block, of the layers whose blocks have several weights.
    """

    def __init__(self, blocks: Mapping[str, Block]) -> None:
        self._blocks = dict(blocks)

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def __getitem__(self, name: str) -> Block:
        return self._blocks.get(name, ONE)

    def numel(self, name: str) -> int:
        """Return the number of weights of a layer's blocks."""
        return math.prod(self[name])

    def counted(self, numbers: Mapping[str, int]) -> dict[str, int]:
        """Turn numbers of weights of layers into numbers of blocks."""
        return {name: number // self.numel(name) for name, number in numbers.items()}

    def shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a layer with one entry per block."""
        rows, columns = self[name]
        if rows * columns == 1:
            return tuple(shape)
        return shape[0] // rows, shape[1] // columns, *shape[2:]

    def added(self, tensors: Tensors) -> dict[str, Tensor]:
        """Add up the magnitudes of every block; layers without blocks stay as they are.

        The order of the sum is the same on every device, so that equal blocks stay equal.
        """
        found = {**tensors}
        for name in tensors.keys() & self._blocks.keys():
            first, *others = self._entries(name, tensors[name])
            total = first.abs().float() if first.element_size() < 4 else first.abs()
            for entry in others:
                total += entry.abs()
            found[name] = self._of_blocks(name, total, tensors[name])
        return found

    def first(self, masks: Tensors) -> dict[str, Tensor]:
        """Look at masks as masks of blocks, which are active or inactive as a whole."""
        found = {**masks}
        for name in masks.keys() & self._blocks.keys():
            entry = self._entries(name, masks[name])[0]
            found[name] = self._of_blocks(name, entry.contiguous(), masks[name])
        return found

    def _entries(self, name: str, tensor: Tensor) -> list[Tensor]:
        """List the tensors, of one entry per block, that hold each block's 1st, 2nd, ... entry.

        Raises:
            ValueError: Processes share blocks.
        """
        rows, columns = self[name]
        if cuts(tensor, self[name]):
            raise ValueError(
                f"{name} is sharded so that processes share blocks of {rows} x {columns}: leave "
                "block out, or shard the weight at multiples of a block"
            )
        part = local(tensor)
        return [part[i::rows, j::columns] for i in range(rows) for j in range(columns)]

    def _of_blocks(self, name: str, part: Tensor, like: Tensor) -> Tensor:
        """Spread what lies here of a tensor with an entry per block as the weight is spread."""
        return spread_as(part, like, self.shape(name, like.shape))

    def spread(self, masks: Tensors, like: Tensors) -> dict[str, Tensor]:
        """Turn masks of blocks into masks of weights.

        Args:
            masks: Layer name -> mask.
            like: Layer name -> tensor of the shape of the weight.
        """
        found = {**masks}
        for name in masks.keys() & self._blocks.keys():
            rows, columns = self[name]
            mask, whole = local(masks[name]), local(like[name])
            shape = (mask.shape[0], rows, mask.shape[1], columns, *mask.shape[2:])
            spread = mask[:, None, :, None].expand(shape).reshape(whole.shape)
            found[name] = spread_as(spread, like[name])
        return found

    def check_whole(self, masks: Tensors, whose: str) -> None:
        """Refuse masks with blocks that are active in part. Waits for the device.

        Args:
            masks: Layer name -> mask.
            whose: Whose masks these are, for the error.

        Raises:
            ValueError: Names the first layer.
        """
        whole = self.spread(self.first(masks), masks)
        for name in masks.keys() & self._blocks.keys():
            if not torch.equal(local(whole[name]), local(masks[name])):
                rows, columns = self[name]
                raise ValueError(
                    f"{whose} gave {name} a mask that is no mask of blocks of {rows} x {columns}: "
                    "leave block out, or begin with masks of such blocks"
                )
