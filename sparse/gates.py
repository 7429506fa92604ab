"""The form a mask has between updates: made to zero gradients of inactive weights fast.

On a CPU a gate holds 0 or -1 as an integer and is and-ed into the bit pattern of the gradient: one
pass at memory speed, where a bool mask costs four times as much. It is as wide as the weight, at
most 4 bytes. Elsewhere bytes are what counts and a gate is one bool per weight, True where
inactive. Both give exactly 0 for an infinite or NaN gradient, which a product with a mask does not.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse.rng import is_fake

Tensors = Mapping[str, Tensor]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int32}


def make_gate(mask: Tensor, weight: Tensor) -> Tensor:
    """Make the gate of a mask, laid out in memory as the weight is."""
    return update_gate(_empty_gate(weight), mask)


def update_gate(gate: Tensor, mask: Tensor) -> Tensor:
    """Overwrite a gate with another mask."""
    if gate.dtype is torch.bool:
        return torch.logical_not(mask, out=gate) if gate.is_contiguous() else gate.copy_(~mask)
    return gate.copy_(mask.view(torch.int8).neg())


def gate_mask(gate: Tensor) -> Tensor:
    """Give the mask of a gate: contiguous bool tensor, True = active."""
    if gate.dtype is torch.bool:
        return torch.logical_not(gate).contiguous()
    if is_fake(gate):
        return torch.ne(gate, 0).contiguous()
    return torch.from_numpy(gate.numpy() != 0).contiguous()  # three times as fast as torch.ne


def zero_inactive(tensor: Tensor, gate: Tensor) -> None:
    """Set the inactive entries of a tensor of the weight's shape to exactly 0, in place."""
    if gate.dtype is torch.bool:
        tensor.masked_fill_(gate, 0)
    elif tensor.element_size() == gate.element_size():
        tensor.view(gate.dtype).bitwise_and_(gate)
    elif tensor.element_size() == 8 and gate.dtype is torch.int32:
        # A double is two integers, which see the same entry of the gate.
        tensor.unsqueeze(-1).view(torch.int32).bitwise_and_(gate.unsqueeze(-1))
    else:
        tensor.masked_fill_(gate == 0, 0)


def _empty_gate(weight: Tensor) -> Tensor:
    on_cpu = weight.device.type == "cpu"
    dtype = _INTEGERS[weight.element_size()] if on_cpu else torch.bool
    return torch.empty_like(weight, dtype=dtype, requires_grad=False)


def masks_of(gates: Tensors, weights: Tensors) -> dict[str, Tensor]:
    """Give the masks of weights, all True (and of no size in memory) where there is no gate."""
    return {
        name: gate_mask(gates[name])
        if name in gates
        else torch.ones((), dtype=torch.bool, device=weight.device).expand(weight.shape)
        for name, weight in weights.items()
    }


def count_active(gates: Tensors, weights: Tensors) -> dict[str, int]:
    """Count the active weights, all of them where there is no gate. Waits for the device once."""
    counts = {name: weight.numel() for name, weight in weights.items()}
    active = [gate.logical_not() if gate.dtype is torch.bool else gate for gate in gates.values()]
    sums = gather([torch.count_nonzero(values) for values in active]).tolist()
    return counts | dict(zip(gates, sums, strict=True))


def active_positions(gate: Tensor, weight: Tensor) -> Tensor:
    """List the active entries as offsets into the weight's memory: int64, ascending.

    The memory of a weight with gaps is taken to be contiguous, as DistributedDataParallel lays out
    its gradient. Waits for the device.
    """
    if gate.stride() != weight.stride():  # the weight has gaps, or changed its layout since
        laid_out = _empty_gate(weight)
        if laid_out.stride() != weight.stride():
            laid_out = laid_out.new_empty(weight.shape)
        gate = laid_out.copy_(gate)
    flat = gate.as_strided((gate.numel(),), (1,))
    return (flat.logical_not() if gate.dtype is torch.bool else flat).nonzero().flatten()


def gather(counts: list[Tensor]) -> Tensor:
    """Bring counts of several layers, perhaps on several devices, into one int64 tensor."""
    if not counts:
        return torch.zeros(0, dtype=torch.int64)
    return torch.stack([count.to(counts[0].device) for count in counts])
