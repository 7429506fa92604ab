"""The layers of a device as one flat tensor, so that work on all of them takes few operations.

A GPU spends more time on starting the operations of an update than on the weights. On a device the
layers therefore lie one behind the other in a flat tensor, and every operation works on all of
them. On a CPU, where starting costs nothing, layers are treated one by one.

Numbers that differ between layers reach a device as the arguments of operations: no host list is
copied there, and nothing waits.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .rng import is_fake
from .shards import Ranks, any_sharded, locals_of, spread_all

_ONE_BY_ONE = frozenset({"cpu"})  # types of device on which layers are treated one by one
ROW = 1 << 12  # layers begin at multiples of it: a row of so many entries lies in one layer
_Pair = tuple[Tensor, Tensor]  # what is written, and what it is read from


def batched(tensor: Tensor) -> bool:
    """Say whether all layers are treated together: on a device, and on tensors without data."""
    return tensor.device.type not in _ONE_BY_ONE or is_fake(tensor)


@dataclass(frozen=True)
class Layout:
    """Where layers lie in a flat tensor: in rows of their own. The last one may have a gap.

    Attributes:
        sizes: Entries of each layer.
    """

    sizes: tuple[int, ...]

    @functools.cached_property
    def rows(self) -> list[int]:
        """Rows of each layer, at least one."""
        return [max(-(-size // ROW), 1) for size in self.sizes]

    @functools.cached_property
    def last_rows(self) -> list[int]:
        """The last row of each layer."""
        return [row - 1 for row in itertools.accumulate(self.rows)]

    @functools.cached_property
    def starts(self) -> list[int]:
        """Where each layer begins."""
        return [ROW * row for row in itertools.accumulate(self.rows, initial=0)][:-1]

    @functools.cached_property
    def numel(self) -> int:
        """Entries of the flat tensor."""
        return ROW * sum(self.rows)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Cut a flat tensor, or one with as many entries for every row, into layers: views."""
        share = len(flat) // sum(self.rows)
        return list(torch.split(flat, [share * rows for rows in self.rows]))

    def entries(self, flat: Tensor) -> list[Tensor]:
        """Give the entries of every layer: 1-dim views."""
        sized = zip(self.split(flat), self.sizes, strict=True)
        return [part if len(part) == size else part[:size] for part, size in sized]

    def flatten(
        self, tensors: Sequence[Tensor], dtype: torch.dtype, *, clear: bool = True
    ) -> Tensor:
        """Put tensors into a flat one, in row-major order; 0 where there is no layer if `clear`."""
        flat = torch.empty(self.numel, dtype=dtype, device=tensors[0].device)
        copy(self.entries(flat), tensors)
        return self.clear_gaps(flat) if clear else flat

    def by_layer(
        self, flat: Tensor, names: Iterable[str], like: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Give the layers of a flat tensor by name, in the shapes of others."""
        parts = zip(names, self.entries(flat), strict=True)
        return {name: part.view(like[name].shape) for name, part in parts}

    def clear_gaps(self, flat: Tensor) -> Tensor:
        """Set to 0, in place, what belongs to no layer."""
        sized = zip(self.split(flat), self.sizes, strict=True)
        gaps = [part[size:] for part, size in sized if len(part) > size]
        if gaps:
            torch._foreach_zero_(gaps)
        return flat

    def add(self, flat: Tensor, numbers: Sequence[int]) -> Tensor:
        """Add to the entries of every layer, or to those of its rows, its number, in place."""
        torch._foreach_add_(self.split(flat), list(numbers))
        return flat

    def spread(
        self, numbers: Sequence[int], device: torch.device, *, over_rows: bool = False
    ) -> Tensor:
        """Give every entry, or every row, the number of its layer: int32."""
        size = sum(self.rows) if over_rows else self.numel
        return self.add(torch.zeros(size, dtype=torch.int32, device=device), numbers)

    def of_rows(self, numbers: Tensor) -> Tensor:
        """Give every row the number of its layer, of a tensor with an entry per layer: [rows, 1].

        It goes with a flat tensor that is looked at as rows.
        """
        layers = self.spread(range(len(self.sizes)), numbers.device, over_rows=True)
        return numbers.index_select(0, layers)[:, None]

    def counts(self, marks: Tensor) -> list[Tensor]:
        """Count the True entries of each layer of a flat tensor, False where there is no layer.

        Returns:
            A 0-dim tensor of float type for every layer, of an integer.
        """
        exact = torch.float32 if max(self.sizes) <= 1 << 24 else torch.float64
        rows = counts_of_rows(marks, exact)
        return list(torch._foreach_norm(self.split(rows), 1))

    def sums(self, numbers: Tensor) -> Tensor:
        """Add up the numbers of each layer, int64, of which every row has as many: int64.

        The sums wrap around, as those of integers do.
        """
        until = numbers.view(sum(self.rows), -1).sum(1).cumsum(0)
        until = until.index_select(0, vector(self.last_rows, until.device))
        return until.diff(prepend=until.new_zeros(1))


def counts_of_rows(marks: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """Count the True entries of every row of a flat tensor."""
    # A sum of bools would make a large tensor of integers first. Eight sums of up to 128 fit into
    # the bytes of an int64.
    eight = marks.view(torch.int64).view(-1, 128).sum(1).view(torch.uint8)
    return eight.view(-1, ROW // 128).sum(1, dtype=dtype)


@functools.lru_cache(maxsize=64)
def layout_of(sizes: tuple[int, ...]) -> Layout:
    """Give the layout of layers of some sizes."""
    return Layout(sizes)


def layout_for(tensors: Iterable[Tensor]) -> Layout:
    """Give the layout of layers of the sizes of tensors."""
    return layout_of(tuple(tensor.numel() for tensor in tensors))


def vector(
    numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int32
) -> Tensor:
    """Make a tensor of numbers without a copy from the host, which would wait for the device."""
    made = torch.zeros(len(numbers), dtype=dtype, device=device)
    torch._foreach_add_(each(made), list(numbers))
    return made


def each(numbers: Tensor) -> list[Tensor]:
    """Give the entries of a 1-dim tensor as views of one entry."""
    return list(torch.split(numbers, 1))


def all_true(like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make masks, all True, by the names and in the shapes of others; on a CPU of no size."""
    if any_sharded(like.values()):
        return spread_all(all_true(locals_of(like)), like)
    made: dict[str, Tensor] = {}
    for names in by_device(like):
        if batched(like[names[0]]):
            layout = layout_for(like[name] for name in names)
            flat = torch.ones(layout.numel, dtype=torch.bool, device=like[names[0]].device)
            made |= layout.by_layer(flat, names, like)
        else:
            one = torch.ones((), dtype=torch.bool)
            made |= {name: one.expand(like[name].shape) for name in names}
    return {name: made[name] for name in like}


def by_device(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Group names by the device of their tensor, in order."""
    groups = defaultdict(list)
    for name, tensor in tensors.items():
        groups[tensor.device].append(name)
    return list(groups.values())


def gather(numbers: Sequence[Tensor]) -> Tensor:
    """Bring 0-dim tensors of several layers, perhaps on several devices, into one tensor."""
    if not numbers:
        return torch.zeros(0, dtype=torch.int64)
    device = numbers[0].device
    return torch.stack([n if n.device == device else n.to(device) for n in numbers])


def count_nonzero(tensors: Mapping[str, Tensor]) -> Tensor:
    """Count the entries of each tensor that are not 0: int64, on the device of the first one.

    The processes over which tensors are spread count together.
    """
    if any_sharded(tensors.values()):
        ranks, counted = Ranks.of(tensors), count_nonzero(locals_of(tensors))
        return ranks.sum(counted * vector(ranks.owned, counted.device))
    counts: dict[str, Tensor] = {}
    for names in by_device(tensors):
        found = [tensors[name] for name in names]
        if batched(found[0]):
            layout = layout_for(found)
            one_type = all(tensor.dtype == found[0].dtype for tensor in found)
            flat = layout.flatten(found, found[0].dtype if one_type else torch.float64)
            counts |= zip(names, layout.counts(flat.to(torch.bool)), strict=True)
        else:
            counts |= zip(names, map(torch.count_nonzero, found), strict=True)
    return gather([counts[name] for name in tensors]).long()


def joined(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Join the entries of tensors: a 1-dim tensor per device."""
    groups = defaultdict(list)
    for tensor in tensors:
        groups[tensor.device].append(tensor)
    return list(map(join, groups.values()))


def join(tensors: Sequence[Tensor]) -> Tensor:
    """Join the entries of tensors of one device, in row-major order and without gaps: 1-dim.

    Of several dtypes the result has the one to which torch promotes them.
    """
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors})
    sizes = [tensor.numel() for tensor in tensors]
    made = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device)
    copy(torch.split(made, sizes), tensors)
    return made


def copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors of one device, in row-major order, whatever their dtypes.

    Contiguous ones take one operation per dtype. Kernels in another memory format, as
    channels_last, are joined with those of the same size: they take an operation per size, and a
    few more. What cannot be joined is copied by itself.

    Args:
        targets: Tensors of the shapes of the sources, or 1-dim and contiguous.
        sources: Tensors, or 1-dim contiguous ones for targets of another shape.
    """
    alike: dict[tuple[Any, ...], list[_Pair]] = defaultdict(list)
    lines = _Copies()
    for target, source in zip(targets, sources, strict=True):
        if target.is_contiguous() and source.is_contiguous():
            lines.add(_line(target), _line(source))
        else:
            shape = source.shape if target.dim() == 1 else target.shape
            pair = target.view(shape), source.view(shape)
            alike[tuple((t.dtype, t.shape[1:], t.stride()[1:]) for t in pair)].append(pair)
    lines.run()
    stacks = []
    for pairs in alike.values():
        if len(pairs) > 1 and batched(pairs[0][0]) and all(map(_is_stack, itertools.chain(*pairs))):
            stacks.append(pairs)
        else:
            for target, source in pairs:
                target.copy_(source)
    for some in _rounds(stacks):
        _copy_stacks(some)


def _rounds(stacks: list[list[_Pair]]) -> list[list[list[_Pair]]]:
    """Share stacks out, so that all of a share are not larger than the largest one alone."""
    rounds: list[list[list[_Pair]]] = []
    sizes = {id(pairs): sum(source.numel() for _, source in pairs) for pairs in stacks}
    for pairs in sorted(stacks, key=lambda pairs: -sizes[id(pairs)]):
        largest = sizes[id(rounds[0][0])] if rounds else 0
        if rounds and sum(sizes[id(other)] for other in [*rounds[-1], pairs]) <= largest:
            rounds[-1].append(pairs)
        else:
            rounds.append([pairs])
    return rounds


def _copy_stacks(stacks: list[list[_Pair]]) -> None:
    """Copy by way of a tensor for all kernels of a size, and another one in the other format."""
    made, joining, parting = [], _Copies(), _Copies()
    for pairs in stacks:
        stack, parts = _stack([source for _, source in pairs])
        made.append(stack)
        for part, (_, source) in zip(parts, pairs, strict=True):
            joining.add(part, memory(source))
    joining.run()
    for pairs in reversed(stacks):
        laid_out, parts = _stack([target for target, _ in pairs])
        laid_out.copy_(made.pop())
        for part, (target, _) in zip(parts, pairs, strict=True):
            parting.add(memory(target), part)
    parting.run()


class _Copies:
    """Copies between 1-dim tensors, an operation for all of the same dtypes."""

    def __init__(self) -> None:
        self._pairs: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}

    def add(self, target: Tensor, source: Tensor) -> None:
        """Note a copy for `run`."""
        into, out_of = self._pairs.setdefault((target.dtype, source.dtype), ([], []))
        into.append(target)
        out_of.append(source)

    def run(self) -> None:
        """Copy."""
        for into, out_of in self._pairs.values():
            torch._foreach_copy_(into, out_of)


def _is_stack(tensor: Tensor) -> bool:
    """Say whether the parts along the first dimension follow one another, and have no gaps."""
    size = 1
    for stride, length in sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True)):
        if length > 1 and stride != size:
            return False
        size *= length
    return tensor.stride(0) == size


def _stack(like: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Make a tensor for all the parts of tensors that are stacks, and cut its memory as theirs."""
    first = like[0]
    shape = (sum(map(len, like)), *first.shape[1:])
    stack = torch.empty_strided(shape, first.stride(), dtype=first.dtype, device=first.device)
    return stack, list(torch.split(memory(stack), [tensor.numel() for tensor in like]))


def _line(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 1 else tensor.view(-1)


def apart(joined: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take entries that were joined without gaps apart, into the shapes of tensors by name."""
    parts = torch.split(joined, [tensor.numel() for tensor in like.values()])
    return {name: part.view(like[name].shape) for name, part in zip(like, parts, strict=True)}


def zeros_like(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Make zeros in the shapes and strides of tensors of one device: parts of one tensor."""
    layout = layout_for(tensors)
    flat = torch.zeros(layout.numel, dtype=dtype, device=tensors[0].device)
    shapes = [torch.empty_like(tensor, device="meta") for tensor in tensors]
    parts = zip(layout.entries(flat), shapes, strict=True)
    return [part.as_strided(like.shape, like.stride()) for part, like in parts]


def memory(tensor: Tensor) -> Tensor:
    """Look at a tensor without gaps in the order of memory: a 1-dim view."""
    return tensor.as_strided((tensor.numel(),), (1,))
