"""Gates: masks in the form that zeroes the gradients of inactive weights fast.

A gate is one bool per weight, True where inactive. On a CPU a compiled loop reads the gate as one
bit per weight, because memory bandwidth limits the speed of this pass. Without a compiler the bytes
of the gate are widened to integers and combined with the bit patterns of the gradients by a bitwise
and. This takes twice as long. (`masked_fill_` takes five times as long.) All of these ways give
exactly 0 for an infinite or NaN gradient, which multiplying by 0 does not.
"""

import ctypes
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sparse.native.library import GATES, BuildError, cpu_level, default_cache, open_library

Tensors = Mapping[str, Tensor]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Gate:
    """The gate of one weight, laid out in memory as the weight is.

    Attributes:
        inactive: bool, of the weight's shape.
    """

    def __init__(self, mask: Tensor, weight: Tensor) -> None:
        self.inactive = torch.empty_like(weight, dtype=torch.bool, requires_grad=False)
        self._strides = self.inactive.stride()
        # One bit per weight in the order of memory, set where active.
        self._bits: Tensor | None = None
        self.update(mask)

    def update(self, mask: Tensor) -> None:
        """Replace the mask."""
        torch.logical_not(mask, out=self.inactive)
        self._bits = None

    def mask(self) -> Tensor:
        """Give the mask: a new contiguous bool tensor, True = active."""
        return torch.logical_not(self.inactive).contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the gate takes."""
        return self.inactive.nbytes + (0 if self._bits is None else self._bits.nbytes)

    def fits(self, tensor: Tensor) -> bool:
        """Say whether a tensor on the CPU lies in memory as the gate does."""
        if not self.inactive.is_cpu:
            return False
        if tensor.stride() == self._strides:
            return True
        strides = zip(tensor.shape, tensor.stride(), self._strides, strict=True)
        return all(size == 1 or mine == other for size, mine, other in strides)

    def layer(self, tensor: Tensor) -> "_Layer":
        """Describe, for the compiled loop, a tensor that `fits`."""
        if self._bits is None:
            active = np.logical_not(_memory(self.inactive).numpy())
            self._bits = torch.from_numpy(np.packbits(active, bitorder="little"))
        bits = self._bits.data_ptr()
        return _Layer(tensor.data_ptr(), bits, tensor.numel(), tensor.element_size())


def zero_inactive(pairs: Iterable[tuple[Tensor, Gate]]) -> None:
    """Set the inactive entries of tensors of the weights' shapes to exactly 0, in place."""
    layers = []
    for tensor, gate in pairs:
        if _is_compiled(tensor, gate):
            layers.append(gate.layer(tensor))
            torch.autograd.graph.increment_version(tensor)
        else:
            _zero_by_torch(tensor.detach(), gate.inactive)
    loops = _compiled_loop() if layers else None
    if loops is not None:
        loops.keep((_Layer * len(layers))(*layers), len(layers), torch.get_num_threads())


def count_violations(pairs: Iterable[tuple[Tensor, Gate]]) -> Tensor:
    """Count the inactive entries of tensors of the weights' shapes that are not exactly 0.

    Returns:
        int64, one number per pair, on the device of the first tensor. Waits for no device.
    """
    pairs = list(pairs)
    loops = _compiled_loop() if all(_is_compiled(tensor, gate) for tensor, gate in pairs) else None
    if loops is not None:
        counts = torch.zeros(len(pairs), dtype=torch.int64)
        layers = (_Layer * len(pairs))(*(gate.layer(tensor) for tensor, gate in pairs))
        loops.count(layers, len(pairs), torch.get_num_threads(), counts.data_ptr())
        return counts
    return gather(
        [
            torch.count_nonzero(tensor.detach().ne(0) & gate.inactive.to(tensor.device))
            for tensor, gate in pairs
        ]
    )


def masks_of(gates: Mapping[str, Gate], weights: Tensors) -> dict[str, Tensor]:
    """Give the masks of weights. Without a gate a mask is all True, and takes no memory."""
    return {
        name: gates[name].mask()
        if name in gates
        else torch.ones((), dtype=torch.bool, device=weight.device).expand(weight.shape)
        for name, weight in weights.items()
    }


def count_active(gates: Mapping[str, Gate], weights: Tensors) -> dict[str, int]:
    """Count active weights; all are active without a gate. Waits for the device once."""
    counts = {name: weight.numel() for name, weight in weights.items()}
    inactive = gather([torch.count_nonzero(gate.inactive) for gate in gates.values()]).tolist()
    return counts | {
        name: counts[name] - number for name, number in zip(gates, inactive, strict=True)
    }


def active_positions(gate: Gate, weight: Tensor) -> Tensor:
    """List the active entries as offsets into the weight's memory: int64, ascending.

    The memory of a weight with gaps is taken to be contiguous, as DistributedDataParallel lays out
    its gradient. Waits for the device.
    """
    inactive = gate.inactive
    if inactive.stride() != weight.stride():  # the weight has gaps, or changed its layout since
        laid_out = torch.empty_like(weight, dtype=torch.bool)
        if laid_out.stride() != weight.stride():
            laid_out = laid_out.new_empty(weight.shape)
        inactive = laid_out.copy_(inactive)
    return _memory(inactive).logical_not().nonzero().flatten()


def gather(counts: list[Tensor]) -> Tensor:
    """Bring counts of several layers, perhaps on several devices, into one int64 tensor."""
    if not counts:
        return torch.zeros(0, dtype=torch.int64)
    return torch.stack([count.to(counts[0].device) for count in counts])


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
    return plain and gate.fits(tensor) and _compiled_loop() is not None


def _zero_by_torch(tensor: Tensor, inactive: Tensor) -> None:
    if tensor.device.type == "cpu" == inactive.device.type:
        integers = tensor.view(_INTEGERS[tensor.element_size()])
        integers.bitwise_and_(inactive.view(torch.int8) - 1)
    else:
        tensor.masked_fill_(inactive.to(tensor.device), 0)


def _memory(inactive: Tensor) -> Tensor:
    return inactive.as_strided((inactive.numel(),), (1,))
