"""Blocks of weights that are active or inactive as a whole, as kernels of several weights need.

Blocks lie in the first two dimensions of a weight, outputs and inputs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .flat import batched, joined
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


def divides(block: Block, shape: Sequence[int]) -> bool:
    """Say whether a weight of some shape consists of whole blocks."""
    return len(shape) >= 2 and all(s % n == 0 for s, n in zip(shape, block, strict=False))


def blocks_of(shapes: Mapping[str, Sequence[int]], block: Block) -> "Blocks":
    """Return the blocks of layers. A layer that the block does not divide has none.

    Args:
        shapes: Layer name -> shape of the weight.
        block: The block that is asked for.
    """
    fits = [name for name, shape in shapes.items() if block != ONE and divides(block, shape)]
    return Blocks(dict.fromkeys(fits, block))


def shape_in_blocks(shape: Sequence[int], block: Block) -> tuple[int, ...]:
    """Return the shape of a weight with one entry per block."""
    if block == ONE:
        return tuple(shape)
    return shape[0] // block[0], shape[1] // block[1], *shape[2:]


def first_entries(mask: Tensor, block: Block) -> Tensor:
    """Look at a mask of weights as a mask of blocks, by the first weight of every block."""
    return mask if block == ONE else mask[:: block[0], :: block[1]].contiguous()


def spread_blocks(mask: Tensor, block: Block) -> Tensor:
    """Turn a mask of blocks into a mask of weights."""
    if block == ONE:
        return mask
    outputs, inputs, *others = mask.shape
    expanded = mask[:, None, :, None].expand(outputs, block[0], inputs, block[1], *others)
    return expanded.reshape(outputs * block[0], inputs * block[1], *others)


def are_whole(mask: Tensor, block: Block) -> bool:
    """Say whether a mask consists of blocks that are active or inactive as a whole.

    Waits for the device.
    """
    if not divides(block, mask.shape):
        return False
    return torch.equal(spread_blocks(first_entries(mask, block), block), mask)


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
        return shape_in_blocks(shape, self[name])

    def added(self, tensors: Tensors) -> dict[str, Tensor]:
        """Add up the magnitudes of every block; layers without blocks stay as they are.

        The order of the sum is the same on every device, so that equal blocks stay equal.
        """
        found = {**tensors}
        for stack in self._stacks(tensors):
            rows, columns = stack.block
            weights = stack.join(tensors)
            first, *others = [
                weights[i::rows, j::columns] for i in range(rows) for j in range(columns)
            ]
            total = first.abs().float() if first.element_size() < 4 else first.abs()
            for entry in others:
                total += entry.abs()
            found |= self._of_blocks(stack, total, tensors)
        return found

    def first(self, masks: Tensors) -> dict[str, Tensor]:
        """Look at masks as masks of blocks, which are active or inactive as a whole."""
        found = {**masks}
        for stack in self._stacks(masks):
            found |= self._of_blocks(stack, first_entries(stack.join(masks), stack.block), masks)
        return found

    def spread(self, masks: Tensors, like: Tensors) -> dict[str, Tensor]:
        """Turn masks of blocks into masks of weights.

        Args:
            masks: Layer name -> mask.
            like: Layer name -> tensor of the shape of the weight.
        """
        found = {**masks}
        for stack in self._stacks({name: like[name] for name in masks}):
            whole = spread_blocks(stack.join(masks, in_blocks=True), stack.block)
            parts = stack.apart(whole, [local(like[name]).shape for name in stack.names])
            found |= {name: spread_as(part, like[name]) for name, part in parts.items()}
        return found

    def check_whole(self, masks: Tensors, whose: str) -> None:
        """Refuse masks with blocks that are active in part. Waits for the device.

        Args:
            masks: Layer name -> mask.
            whose: Whose masks these are, for the error.

        Raises:
            ValueError: Names the first layer.
        """
        for name in masks.keys() & self._blocks.keys():
            self._check_cuts(name, masks[name])
            if not are_whole(local(masks[name]), self[name]):
                rows, columns = self[name]
                raise ValueError(
                    f"{whose} gave {name} a mask that is no mask of blocks of {rows} x {columns}: "
                    "leave block out, or begin with masks of such blocks"
                )

    def _of_blocks(self, stack: "_Stack", whole: Tensor, like: Tensors) -> dict[str, Tensor]:
        """Take layers with one entry per block apart, and spread them as the weights are spread."""
        shapes = [shape_in_blocks(local(like[name]).shape, stack.block) for name in stack.names]
        return {
            name: spread_as(part, like[name], self.shape(name, like[name].shape))
            for name, part in stack.apart(whole, shapes).items()
        }

    def _stacks(self, like: Tensors) -> "list[_Stack]":
        """List what is worked on at a time: on a CPU a layer, on a device all layers of a kind.

        Raises:
            ValueError: Processes share blocks.
        """
        stacks: dict[object, _Stack] = {}
        for name in [name for name in like if name in self._blocks]:
            self._check_cuts(name, like[name])
            block, part = self[name], local(like[name])
            if not batched(part):
                stacks[name] = _Stack([name], block, part.shape, as_it_is=True)
                continue
            outputs, inputs, others = *part.shape[:2], part.shape[2:].numel()
            if block[0] == 1:  # blocks of any number of inputs follow one another in the same way
                outputs, inputs = outputs * inputs // block[1], block[1]
            kind = part.device, part.dtype, block, inputs, others
            stack = stacks.setdefault(kind, _Stack([], block, (0, inputs, others)))
            stack.names.append(name)
            stack.shape = (stack.shape[0] + outputs, inputs, others)
        return list(stacks.values())

    def _check_cuts(self, name: str, tensor: Tensor) -> None:
        if cuts(tensor, self[name]):
            rows, columns = self[name]
            raise ValueError(
                f"{name} is sharded so that processes share blocks of {rows} x {columns}: leave "
                "block out, or shard the weight at multiples of a block"
            )


@dataclass
class _Stack:
    """Layers that are worked on as if they were one, with their weights one behind the other.

    Attributes:
        names: The layers.
        block: Their block.
        shape: Outputs, inputs and so on of all of them together.
        as_it_is: It is a single layer, whose tensors are not copied.
    """

    names: list[str]
    block: Block
    shape: tuple[int, ...]
    as_it_is: bool = False

    def join(self, tensors: Tensors, *, in_blocks: bool = False) -> Tensor:
        """Join tensors of the shapes of the weights, or `in_blocks`: of one entry per block."""
        parts = [local(tensors[name]) for name in self.names]
        if self.as_it_is:
            return parts[0]
        (flat,) = joined(parts)
        return flat.view(shape_in_blocks(self.shape, self.block) if in_blocks else self.shape)

    def apart(self, whole: Tensor, shapes: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Take a joined tensor apart, into layers of some shapes."""
        if self.as_it_is:
            return {self.names[0]: whole}
        parts = torch.split(whole.reshape(-1), [math.prod(shape) for shape in shapes])
        return {n: p.view(*s) for n, p, s in zip(self.names, parts, shapes, strict=True)}
