"""Tensors that are spread over processes (DTensors), and what their processes add up together.

FSDP2 and tensor parallelism spread a weight over processes: each of them holds a part. Only this
file and `sharded` know this. A tensor that is not spread is its own only part.
"""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:  # not importable in builds without distributed
    from torch.distributed import ProcessGroup

Tensors = Mapping[str, Tensor]


def is_sharded(tensor: Any) -> bool:
    """Say whether a tensor is a DTensor."""
    # There is none before the module is loaded, which takes a while and needs distributed.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Give the part of a tensor that lies here, to read and to write."""
    if not is_sharded(tensor):
        return tensor
    part: Tensor = (tensor.detach() if torch.is_grad_enabled() else tensor).to_local()  # type: ignore[attr-defined]
    return part


def locals_of(tensors: Tensors) -> dict[str, Tensor]:
    """Give the parts that lie here, by the same names."""
    return {name: local(tensor) for name, tensor in tensors.items()}


def spread_as(part: Tensor, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Make of parts a tensor that is spread as another one; of the same shape by default."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    whole = torch.empty(like.shape if shape is None else tuple(shape), device="meta")
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    spread: Tensor = DTensor.from_local(
        part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return spread


def spread_all(parts: Tensors, like: Tensors) -> dict[str, Tensor]:
    """Do `spread_as` for tensors by name."""
    return {name: spread_as(part, like[name]) for name, part in parts.items()}


def part_like(whole: Tensor, like: Tensor) -> Tensor:
    """Spread a tensor, of which every process has the whole, as another one of its shape."""
    if not is_sharded(like) or is_sharded(whole):
        return whole
    part = part_of(like)
    for dim, (start, size) in enumerate(zip(part.offset, part.size, strict=True)):
        whole = whole.narrow(dim, start, size)
    return spread_as(whole.contiguous(), like)


def whole(tensor: Tensor) -> Tensor:
    """Collect a tensor that is spread. All of its processes must call this together."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


@dataclass(frozen=True)
class Part:
    """Where the part of a tensor that lies here is in the whole.

    Attributes:
        shape: Shape of the whole.
        size: Shape of the part.
        offset: Index of the part's first entry.
        groups: The processes over which the tensor is spread, for every way in which it is.
        copies: The processes that hold the same part, likewise.
        device: Type of device on which the processes communicate.
    """

    shape: tuple[int, ...]
    size: tuple[int, ...]
    offset: tuple[int, ...]
    groups: "tuple[ProcessGroup, ...]" = ()
    copies: "tuple[ProcessGroup, ...]" = ()
    device: str = ""

    @property
    def has_whole_rows(self) -> bool:
        """Whether the parts are ranges of flat indices, in the order of the ranks."""
        return self.size[1:] == self.shape[1:] and len(self.groups) <= 1

    @property
    def start(self) -> int:
        """Flat index of the first entry."""
        return self.offset[0] * math.prod(self.shape[1:]) if self.offset else 0

    def index(self, device: torch.device) -> Tensor:
        """List the flat indices, in the whole, of the entries of the part: 1-dim int32."""
        index = torch.zeros((), dtype=torch.int32, device=device)
        for dim, (size, start) in enumerate(zip(self.size, self.offset, strict=True)):
            places = torch.arange(start, start + size, dtype=torch.int32, device=device)
            index = index[..., None] + places * math.prod(self.shape[dim + 1 :])
        return index.reshape(-1)


def part_of(tensor: Tensor) -> Part:
    """Locate the part of a tensor that lies here.

    Raises:
        ValueError: The parts are to be added up.
    """
    if not is_sharded(tensor):
        shape = tuple(tensor.shape)
        return Part(shape, shape, (0,) * len(shape))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, spread = tuple(tensor.shape), cast(Any, tensor)
    mesh, placements = spread.device_mesh, spread.placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"a DTensor of {shape} is partial: its parts are yet to be added up")
    size, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    groups: dict[bool, list[ProcessGroup]] = {True: [], False: []}
    for dim, placement in enumerate(placements):
        if mesh.size(dim) > 1:
            groups[placement.is_replicate()].append(mesh.get_group(dim))
    shared, copies = tuple(groups[False]), tuple(groups[True])
    return Part(shape, tuple(size), tuple(offset), shared, copies, mesh.device_type)


def cuts(tensor: Tensor, block: Sequence[int]) -> bool:
    """Say whether processes share blocks of a tensor. All of its processes say the same.

    Args:
        tensor: A tensor.
        block: Size of a block in the first dimensions.
    """
    if not is_sharded(tensor):
        return False
    sizes, spread = list(tensor.shape), cast(Any, tensor)
    for dim, placement in enumerate(spread.placements):
        if placement.is_shard() and placement.dim < len(block):
            sizes[placement.dim] = -(-sizes[placement.dim] // spread.device_mesh.size(dim))
            if sizes[placement.dim] % block[placement.dim]:
                return True
    return False


class Ranks:
    """What the processes that share some tensors do together.

    Entries that several of the processes hold are counted by the first of them.

    Args:
        parts: Name of a tensor -> its part here.
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self.parts = dict(parts)
        self.groups = list(dict.fromkeys(g for part in parts.values() for g in part.groups))
        self._device = next((part.device for part in parts.values() if part.groups), "")

    @classmethod
    def of(cls, tensors: Tensors) -> "Ranks":
        """Give the processes that share tensors."""
        return cls({name: part_of(tensor) for name, tensor in tensors.items()})

    @property
    def line_up(self) -> bool:
        """Whether all parts are in the order of the ranks of one group."""
        return len(self.groups) <= 1 and all(p.has_whole_rows for p in self.parts.values())

    @property
    def owned(self) -> list[bool]:
        """Whether the entries of each tensor that lie here are counted here."""
        return [
            all(group in part.groups or group.rank() == 0 for group in self.groups)
            for part in self.parts.values()
        ]

    def sum(self, numbers: Tensor) -> Tensor:
        """Add up numbers over the processes; may write to `numbers`."""
        if not self.groups:
            return numbers
        travelling = numbers if numbers.device.type == self._device else numbers.to(self._device)
        for group in self.groups:
            torch.distributed.all_reduce(travelling, group=group)
        return travelling.to(numbers.device)

    def gather(self, numbers: Tensor) -> Tensor:
        """Collect numbers of all ranks of the one group there is: [ranks, numbers]."""
        if not self.groups:
            return numbers[None]
        (group,) = self.groups
        mine = numbers if numbers.device.type == self._device else numbers.to(self._device)
        everyone = [torch.empty_like(mine) for _ in range(group.size())]
        torch.distributed.all_gather(everyone, mine, group=group)
        return torch.stack(everyone).to(numbers.device)

    @property
    def rank(self) -> int:
        """The rank of this process in the one group there is."""
        return self.groups[0].rank() if self.groups else 0


def any_sharded(tensors: Iterable[Any]) -> bool:
    """Say whether there is a DTensor among tensors."""
    return any(map(is_sharded, tensors))
