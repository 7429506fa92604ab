"""Send between the ranks of DistributedDataParallel only the gradients that training uses.

The masks are the same on all ranks, so no index has to be sent. The active entries of every bucket
are copied to a smaller buffer, all-reduced, and written back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from .consistency import verify_across_ranks
from .sparsifier import Sparsifier

if TYPE_CHECKING:  # not importable in builds without distributed
    from torch._C._distributed_c10d import GradBucket, ProcessGroup


def compress_gradients(
    model: DistributedDataParallel, sparsifier: Sparsifier, *, dtype: torch.dtype | None = None
) -> "GradientCompression":
    """All-reduce the gradients of active weights only; call it once, before the first backward.

    Gradients of inactive weights are 0 after `backward`, on all ranks. Steps that need these
    gradients send all gradients: an update of RigL, the scoring of SNIP, all steps of SNFS. Weights
    and masks become the same as without compression: bit for bit on two ranks; on more ranks up to
    the order in which the backend adds, which depends on the place of an entry in the backend's
    buffer.

    Deviations from the plain run, for gradients of inactive weights in the other steps: a
    GradScaler does not see an inf or NaN in them and takes a step that it would have skipped; a
    norm that is computed between `backward` and `step` (clipping) does not contain them.

    Args:
        model: The wrapped model, with no other communication hook.
        sparsifier: Its masks.
        dtype: Type in which gradients are sent (torch.bfloat16 halves the bytes of float32 and
            rounds every gradient); by default the gradients' own type.

    Returns:
        The state of the hook; nothing needs to be done with it.

    Raises:
        ValueError: The sparsifier masks another model, or the type is no floating-point one.
        RuntimeError: The masks differ between ranks.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"gradients cannot travel as {dtype}; use torch.bfloat16 or None")
    held = {id(parameter) for parameter in model.parameters()}
    for name, weight in sparsifier.maskable.items():
        if id(weight) not in held:
            raise ValueError(f"{name} of the sparsifier is no parameter of the wrapped model")
    if model.process_group.size() > 1:
        verify_across_ranks(sparsifier.masks, model.process_group)
    compression = GradientCompression(sparsifier, model.process_group, dtype)
    model.register_comm_hook(compression, lambda state, bucket: state.reduce(bucket))
    return compression


def compress(buffer: Tensor, positions: Tensor, values: Tensor) -> None:
    """Copy the entries of a flat buffer at `positions` (int64) to `values`."""
    torch.index_select(buffer, 0, positions, out=values)


def decompress(values: Tensor, positions: Tensor, buffer: Tensor) -> None:
    """Put values back where `compress` found them; all other entries become 0."""
    buffer.zero_().index_copy_(0, positions, values)


@dataclass(frozen=True)
class _Message:
    """How a bucket is sent: `wire` holds `values`, the bucket's entries at `positions`."""

    positions: Tensor | None  # None: all entries
    values: Tensor
    wire: Tensor

    @classmethod
    def make(
        cls, buffer: Tensor, positions: Tensor | None, dtype: torch.dtype | None
    ) -> "_Message":
        """Allocate what is needed; without positions the values are the bucket itself."""
        values = buffer if positions is None else buffer.new_empty(positions.numel())
        same = dtype in (None, values.dtype)
        return cls(positions, values, values if same else torch.empty_like(values, dtype=dtype))


class GradientCompression:
    """The communication hook of `compress_gradients`.

    Attributes:
        num_rebuilds: How often the active entries of a bucket were listed: once for every bucket,
            and again when DDP has rebuilt its buckets (after the first step) or masks changed.
        num_bytes: Bytes handed to the all-reduce so far.
        num_dense_bytes: Bytes that a run without compression would have sent.
    """

    def __init__(
        self, sparsifier: Sparsifier, group: "ProcessGroup", dtype: torch.dtype | None
    ) -> None:
        self.num_rebuilds = self.num_bytes = self.num_dense_bytes = 0
        self._sparsifier, self._group, self._dtype = sparsifier, group, dtype
        self._names = {id(weight): name for name, weight in sparsifier.maskable.items()}
        self._orders = {name: _order(weight) for name, weight in sparsifier.maskable.items()}
        # Number of a bucket -> what its message depends on, and the message.
        self._messages: dict[int, tuple[list[int], _Message | None]] = {}

    def reduce(self, bucket: "GradBucket") -> Future[Tensor]:
        """Average a bucket over the ranks; the result is the bucket's own buffer."""
        buffer = bucket.buffer()
        message = None if self._sparsifier.needs_dense_gradients else self._message(bucket)
        if message is None:
            message = _Message.make(buffer, None, self._dtype)
        positions, values, wire = message.positions, message.values, message.wire
        if positions is not None:
            compress(buffer, positions, values)
        values.mul_(1.0 / self._group.size())  # before the sum, as DDP does
        if wire is not values:
            wire.copy_(values)
        self.num_bytes += wire.nbytes
        self.num_dense_bytes += buffer.nbytes
        work = distributed.all_reduce(wire, group=self._group, async_op=True)

        def finish(_: Future[list[Tensor]]) -> Tensor:
            if wire is not values:
                values.copy_(wire)
            if positions is not None:
                decompress(values, positions, buffer)
            return buffer

        return work.get_future().then(finish)

    def _message(self, bucket: "GradBucket") -> _Message | None:
        """Give the message for a bucket, None if all of its entries are active."""
        parameters = bucket.parameters()
        self._check_layout(parameters)
        key = [self._sparsifier.masks_version, *map(id, parameters)]
        found = self._messages.get(bucket.index())
        if found is None or found[0] != key:
            self.num_rebuilds += 1
            positions = self._active_positions(parameters)
            message = None
            if positions is not None:
                message = _Message.make(bucket.buffer(), positions, self._dtype)
            found = self._messages[bucket.index()] = (key, message)
        return found[1]

    def _check_layout(self, parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            name = self._names.get(id(parameter))
            if name is not None and _order(parameter) != self._orders[name]:
                raise ValueError(
                    f"the memory format of {name} changed, but DistributedDataParallel keeps the "
                    "order of its gradients; convert the model before you wrap it"
                )

    def _active_positions(self, parameters: Sequence[Tensor]) -> Tensor | None:
        """List the active entries of parameters that lie in memory one after the other."""
        parts, offset, masked = [], 0, False
        for parameter in parameters:
            name = self._names.get(id(parameter))
            positions = self._sparsifier.active_positions(name) if name is not None else None
            if positions is None:
                positions = torch.arange(parameter.numel(), device=parameter.device)
            else:
                masked = True
            parts.append(positions + offset)
            offset += parameter.numel()
        return torch.cat(parts) if masked else None


def _order(tensor: Tensor) -> list[int]:
    """Say how the entries of a tensor lie in memory; dimensions of size 1 do not matter."""
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
