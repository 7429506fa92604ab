"""Gates: masks in the form that zeroes the gradients of inactive weights fast.

A gate is one bool per weight, True where inactive. On a CPU a compiled loop reads the gate as one
bit per weight, because memory bandwidth limits the speed of this pass. Without a compiler the bytes
of the gate are widened to integers and combined with the bit patterns of the gradients by a bitwise
and. This takes twice as long. (`masked_fill_` takes five times as long.) All of these ways give
exactly 0 for an infinite or NaN gradient, which multiplying by 0 does not.

On other devices the gates of all weights lie in one tensor, and tensors are zeroed in two
operations: the gates become integers, 1 where active and 0 elsewhere, by which the bit patterns of
all tensors are multiplied. This takes as much memory, for a moment, as one tensor for each weight.
"""

import ctypes
import functools
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..native.library import GATES, BuildError, cpu_level, default_cache, open_library
from ..topology.flat import (
    Layout,
    all_true,
    batched,
    by_device,
    copy,
    count_nonzero,
    gather,
    layout_for,
    layout_of,
    memory,
)
from ..topology.shards import any_sharded, local, locals_of, spread_all

Tensors = Mapping[str, Tensor]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Group:
    """The gates of weights of one device, in one flat tensor.

    Attributes:
        layout: Where each gate lies; a gate is laid out in memory as its weight is.
        flat: bool, True where inactive.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.layout = layout_for(weights)
        self.flat = torch.zeros(self.layout.numel, dtype=torch.bool, device=weights[0].device)
        empty = [torch.empty_like(w, dtype=torch.bool, device="meta") for w in weights]
        self._shapes = [(like.shape, like.stride()) for like in empty]
        self._views: list[Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Views of one tensor would be pickled with all of it, each of them.
        return self.__dict__ | {"_views": None}

    @property
    def views(self) -> list[Tensor]:
        """The gates in the shapes and strides of their weights."""
        if self._views is None:
            entries = zip(self.layout.entries(self.flat), self._shapes, strict=True)
            self._views = [entry.as_strided(*shape) for entry, shape in entries]
        return self._views

    def part(self, places: list[int]) -> tuple[Layout, Tensor]:
        """Give some of the gates in one flat tensor, and its layout; all of them take no copy."""
        if places == list(range(len(self._shapes))):
            return self.layout, self.flat
        layout = layout_of(tuple(self.layout.sizes[place] for place in places))
        return layout, layout.flatten([memory(self.views[place]) for place in places], torch.bool)


class Gate:
    """The gate of one weight, laid out in memory as the weight is."""

    def __init__(self, mask: Tensor, weight: Tensor) -> None:
        self._join(_Group([local(weight)]), 0)
        update_gates({"": self}, {"": mask})

    @classmethod
    def together(cls, weights: Tensors) -> dict[str, "Gate"]:
        """Make gates of weights, all of them open, which lie in one tensor on a device."""
        made, weights = {}, locals_of(weights)
        for names in by_device(weights):
            shared = batched(weights[names[0]])
            for members in [names] if shared else [[name] for name in names]:
                group = _Group([weights[name] for name in members])
                for place, name in enumerate(members):
                    made[name] = cls.__new__(cls)
                    made[name]._join(group, place)
        return {name: made[name] for name in weights}

    def _join(self, group: _Group, place: int) -> None:
        self._group, self._place = group, place
        self._strides = group.views[place].stride()
        # One bit per weight in the order of memory, set where active.
        self._bits: Tensor | None = None

    @property
    def inactive(self) -> Tensor:
        """A bool tensor of the weight's shape; its address never changes."""
        return self._group.views[self._place]

    def mask(self) -> Tensor:
        """Give the mask: a new contiguous bool tensor, True = active."""
        return torch.logical_not(self.inactive).contiguous()

    def update(self, mask: Tensor) -> None:
        """Replace the mask."""
        update_gates({"": self}, {"": mask})

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the gate takes."""
        return self.inactive.nbytes + (0 if self._bits is None else self._bits.nbytes)

    def fits(self, tensor: Tensor) -> bool:
        """Say whether a tensor lies in memory as the gate does."""
        if tensor.stride() == self._strides:
            return True
        strides = zip(tensor.shape, tensor.stride(), self._strides, strict=True)
        return all(size == 1 or mine == other for size, mine, other in strides)

    def serves(self, weight: Tensor) -> bool:
        """Say whether a weight still is where it was, on its device and in its memory layout."""
        weight = local(weight)
        return self.fits(weight) and self.inactive.device == weight.device

    def layer(self, tensor: Tensor) -> "_Layer":
        """Describe, for the compiled loop, a tensor on the CPU that `fits`."""
        if self._bits is None:
            active = np.logical_not(memory(self.inactive).numpy())
            self._bits = torch.from_numpy(np.packbits(active, bitorder="little"))
        bits = self._bits.data_ptr()
        return _Layer(tensor.data_ptr(), bits, tensor.numel(), tensor.element_size())


def update_gates(gates: Mapping[str, Gate], masks: Tensors) -> None:
    """Replace the masks of gates, in place.

    Args:
        gates: Name -> gate.
        masks: Name -> mask, for every gate.
    """
    masks = locals_of(masks)
    for names in by_device({name: gate.inactive for name, gate in gates.items()}):
        for name in names:
            gates[name]._bits = None
        places = [gates[name].inactive for name in names]
        if batched(places[0]):
            copy(places, [masks[name] for name in names])
            numbers = [memory(place).view(torch.int8) for place in places]
            torch._foreach_sub_(numbers, 1)  # 0 where active, else -1
            torch._foreach_abs_(numbers)
        else:
            for name, place in zip(names, places, strict=True):
                torch.logical_not(masks[name], out=place)


def zero_inactive(pairs: Iterable[tuple[Tensor, Gate]]) -> None:
    """Set the inactive entries of tensors of the weights' shapes to exactly 0, in place."""
    layers, others = [], []
    for tensor, gate in ((local(tensor), gate) for tensor, gate in pairs):
        if _is_compiled(tensor, gate):
            layers.append(gate.layer(tensor))
            torch.autograd.graph.increment_version(tensor)
        else:
            others.append((tensor.detach(), gate))
    loops = _compiled_loop() if layers else None
    if loops is not None:
        loops.keep((_Layer * len(layers))(*layers), len(layers), torch.get_num_threads())
    alone, batches = _batches(others)
    for place in alone:
        tensor, gate = others[place]
        _zero_by_torch(tensor, gate.inactive)
    for batch in batches:
        found = [others[place] for place in batch]
        integers = _INTEGERS[found[0][0].element_size()]
        gates = list({id(gate): gate for _, gate in found}.values())
        layout, closed = _closed(gates)
        opened = torch.logical_not(closed, out=torch.empty_like(closed, dtype=integers))
        factors = dict(zip(map(id, gates), layout.entries(opened), strict=True))
        bits = [memory(tensor).view(integers) for tensor, _ in found]
        torch._foreach_mul_(bits, [factors[id(gate)] for _, gate in found])


def count_violations(pairs: Iterable[tuple[Tensor, Gate]]) -> Tensor:
    """Count the inactive entries of tensors of the weights' shapes that are not exactly 0.

    Returns:
        int64, one number per pair, on the device of the first tensor. Waits for no device.
    """
    pairs = [(local(tensor).detach(), gate) for tensor, gate in pairs]
    loops = _compiled_loop() if all(_is_compiled(tensor, gate) for tensor, gate in pairs) else None
    if loops is not None:
        counts = torch.zeros(len(pairs), dtype=torch.int64)
        layers = (_Layer * len(pairs))(*(gate.layer(tensor) for tensor, gate in pairs))
        loops.count(layers, len(pairs), torch.get_num_threads(), counts.data_ptr())
        return counts
    alone, batches = _batches(pairs, each_gate_once=True)
    found = {
        place: torch.count_nonzero(tensor.ne(0) & gate.inactive.to(tensor.device))
        for place, (tensor, gate) in enumerate(pairs)
        if place in alone
    }
    for batch in batches:
        tensors = [memory(pairs[place][0]) for place in batch]
        layout, closed = _closed([pairs[place][1] for place in batch])
        wrong = layout.flatten(tensors, tensors[0].dtype, clear=False)
        found |= zip(batch, layout.counts(wrong.logical_and(closed)), strict=True)
    return gather([found[place] for place in range(len(pairs))]).long()


def _batches(
    pairs: Sequence[tuple[Tensor, Gate]], *, each_gate_once: bool = False
) -> tuple[set[int], list[list[int]]]:
    """Share tensors out: the places of those treated alone, and of those treated together.

    Together go tensors on a device that lie in memory as their gates do, of one dtype and of gates
    in one tensor.
    """
    alone, batches, seen = set(), defaultdict(list), Counter[tuple[int, torch.dtype]]()
    devices: dict[int, torch.device] = {}
    for place, (tensor, gate) in enumerate(pairs):
        group = id(gate._group)
        device = devices.setdefault(group, gate._group.flat.device)
        has_integers = tensor.element_size() in _INTEGERS
        on_device = batched(gate._group.flat) and tensor.device == device
        if not (on_device and has_integers and gate.fits(tensor)):
            alone.add(place)
            continue
        turn = seen[id(gate), tensor.dtype]
        seen[id(gate), tensor.dtype] += each_gate_once
        batches[group, tensor.dtype, turn].append(place)
    return alone, list(batches.values())


def _closed(gates: Sequence[Gate]) -> tuple[Layout, Tensor]:
    return gates[0]._group.part([gate._place for gate in gates])


def masks_of(gates: Mapping[str, Gate], weights: Tensors) -> dict[str, Tensor]:
    """Give the masks of weights, all True where there is no gate."""
    if any_sharded(weights.values()):
        return spread_all(masks_of(gates, locals_of(weights)), weights)
    masks = all_true({name: weight for name, weight in weights.items() if name not in gates})
    for names in by_device({name: weights[name] for name in weights if name in gates}):
        found = [gates[name].inactive for name in names]
        if batched(found[0]):
            layout = layout_for(found)
            flat = layout.flatten(found, torch.bool, clear=False).logical_not_()
            masks |= layout.by_layer(flat, names, weights)
        else:
            masks |= {name: gates[name].mask() for name in names}
    return {name: masks[name] for name in weights}


def count_active(gates: Mapping[str, Gate], weights: Tensors) -> dict[str, int]:
    """Count active weights; all are active without a gate. Waits for the device once."""
    counts = {name: weight.numel() for name, weight in weights.items()}
    inactive = count_nonzero({name: gate.inactive for name, gate in gates.items()}).tolist()
    return counts | {
        name: counts[name] - number for name, number in zip(gates, inactive, strict=True)
    }


def active_positions(gate: Gate, weight: Tensor) -> Tensor:
    """List the active entries as offsets into the weight's memory here: int64, ascending.

    The memory of a weight with gaps is taken to be contiguous, as DistributedDataParallel lays out
    its gradient. Waits for the device.
    """
    inactive, weight = gate.inactive, local(weight)
    if inactive.stride() != weight.stride():  # the weight has gaps, or changed its layout since
        laid_out = torch.empty_like(weight, dtype=torch.bool)
        if laid_out.stride() != weight.stride():
            laid_out = laid_out.new_empty(weight.shape)
        inactive = laid_out.copy_(inactive)
    return memory(inactive).logical_not().nonzero().flatten()


class _Layer(ctypes.Structure):
    """Mirrors `Layer` of gates.cpp, which explains the members."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("bits", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("entry_size", ctypes.c_int64),
    )


@dataclass(frozen=True)
class _Loops:
    """The functions of gates.cpp."""

    keep: Callable[[ctypes.Array[_Layer], int, int], None]
    count: Callable[[ctypes.Array[_Layer], int, int, int], None]


@functools.cache
def _compiled_loop() -> _Loops | None:
    try:
        library = open_library(GATES.find(cpu_level(), default_cache()))
    except BuildError as error:
        warnings.warn(f"masking gradients takes twice as long on this CPU: {error}", stacklevel=3)
        return None
    assert library["sparse_gates_layer_size"]() == ctypes.sizeof(_Layer)
    keep, count = library["sparse_gates_keep"], library["sparse_gates_count"]
    keep.restype, keep.argtypes = None, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    count.restype, count.argtypes = None, (*keep.argtypes, ctypes.c_void_p)
    return _Loops(keep, count)


def _is_compiled(tensor: Tensor, gate: Gate) -> bool:
    """Say whether compiled code can work on a tensor: plain memory, laid out as its gate."""
    plain = type(tensor) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    on_cpu = plain and not batched(tensor) and not batched(gate.inactive)
    return on_cpu and gate.fits(tensor) and _compiled_loop() is not None


def _zero_by_torch(tensor: Tensor, inactive: Tensor) -> None:
    if tensor.device.type == "cpu" == inactive.device.type:
        integers = tensor.view(_INTEGERS[tensor.element_size()])
        integers.bitwise_and_(inactive.view(torch.int8) - 1)
    else:
        tensor.masked_fill_(inactive.to(tensor.device), 0)
