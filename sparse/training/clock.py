"""Count optimizer steps when a GradScaler may have skipped some of them unseen.

A fused optimizer runs its step hooks even when its kernel skipped the step. Whether the kernel did
is a number on the device. Reading this number at every step would stall the device. Therefore the
number of skipped steps is summed on the device, and it is read only when the count matters.
"""

import torch
from torch import Tensor
from torch.optim import Optimizer


class Clock:
    """The number of optimizer steps taken."""

    def __init__(self, steps: int = 0) -> None:
        self._bound = steps
        self._skipped: Tensor | None = None

    @property
    def bound(self) -> int:
        """An upper bound of the count, known without asking the device.

        Only `tick` and `settle` change the bound. All ranks call them together, so the bound is the
        same on all ranks.
        """
        return self._bound

    def read(self) -> int:
        """Give the exact count; waits for the device if steps may have been skipped."""
        return self._bound - (0 if self._skipped is None else int(self._skipped.item()))

    def settle(self, overflow: Tensor | None = None) -> tuple[int, bool]:
        """Make the bound exact; give it, and whether the coming step overflows by `found_inf`.

        Waits for the device at most once.
        """
        flags = [] if overflow is None else [(overflow != 0).to(torch.int64).view(())]
        if self._skipped is not None:
            flags.append(self._skipped.to(flags[0].device) if flags else self._skipped)
        numbers = torch.stack(flags).tolist() if flags else []
        overflows = overflow is not None and bool(numbers.pop(0))
        self._bound, self._skipped = self._bound - sum(numbers), None
        return self._bound, overflows

    def tick(self, overflow: Tensor | None) -> None:
        """Count a step, unless `overflow` (the scaler's found_inf, 0-dim) says it was skipped."""
        self._bound += 1
        if overflow is not None:
            skipped = (overflow != 0).to(torch.int64).view(())
            self._skipped = skipped if self._skipped is None else self._skipped + skipped


def found_inf(optimizer: Optimizer) -> Tensor | None:
    """Give the overflow flag a GradScaler left for a fused step, None if there is none."""
    flag = getattr(optimizer, "found_inf", None)
    return flag if isinstance(flag, Tensor) else None


def inverse_scale(optimizer: Optimizer) -> Tensor | None:
    """Give the factor that unscales the gradients of a fused step, None if they are not scaled."""
    scale = getattr(optimizer, "grad_scale", None)
    return scale.double().reciprocal().float() if isinstance(scale, Tensor) else None
