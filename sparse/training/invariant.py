"""Check the invariant: inactive weights and their optimizer state are exactly 0."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import SparsityError
from ..topology.rng import is_fake
from .gates import Gate, count_violations

States = Callable[[Optimizer, nn.Parameter], Mapping[str, Tensor]]


def held(
    optimizer: Optimizer, weights: Mapping[str, nn.Parameter], gates: Mapping[str, Gate], of: States
) -> Iterator[tuple[str, Tensor, Gate]]:
    """List the tensors that must be 0 at inactive connections, with names for messages.

    Args:
        optimizer: The optimizer.
        weights: The weights, by name.
        gates: The gates of some of them.
        of: Gives the state of the optimizer to list with a weight.
    """
    for name, gate in gates.items():
        yield name, weights[name], gate
        for key, tensor in of(optimizer, weights[name]).items():
            yield f"the optimizer's {key} of {name}", tensor, gate


class Invariant:
    """Counts violations on the device, and reads the numbers when the host waits anyway."""

    def __init__(self) -> None:
        self._unread: list[tuple[list[str], Tensor]] = []

    def count(self, tensors: Iterator[tuple[str, Tensor, Gate]]) -> None:
        """Count the inactive entries that are not 0, of the tensors that `held` lists."""
        names, pairs = [], []
        for name, tensor, gate in tensors:
            names.append(name)
            pairs.append((tensor, gate))
        if pairs:
            self._unread.append((names, count_violations(pairs)))

    @property
    def counts(self) -> Tensor:
        """All counts since `read`, one after the other."""
        return torch.cat([counts for _, counts in self._unread] or [torch.zeros(0).long()])

    def replace(self, counts: Tensor) -> None:
        """Put others, as those of several processes, in the place of `counts`."""
        self._unread = [([name for names, _ in self._unread for name in names], counts)]

    @property
    def is_known(self) -> bool:
        """Whether `read` waits for no device."""
        return all(counts.is_cpu and not is_fake(counts) for _, counts in self._unread)

    def read(self, optimizer: Optimizer) -> None:
        """Read all counts since the last call.

        Raises:
            SparsityError: There was a violation. Names the first one and likely causes.
        """
        for names, counts in self._unread:
            for name, count in zip(names, counts.tolist(), strict=True):
                if count:
                    raise SparsityError(
                        f"{name} is not 0 at {count} inactive connections: something wrote there "
                        "after the last step (reset_parameters, a copy by hand, an average swapped "
                        "in, a step of another optimizer), or "
                        f"{type(optimizer).__name__} moves weights whose gradient is 0; "
                        "Sparsifier.enforce() masks them again"
                    )
        self.forget()

    def forget(self) -> None:
        """Forget the counts, because the violations were repaired."""
        self._unread.clear()
