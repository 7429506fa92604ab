"""Pure functions of the optimizer step: when to update, how much to drop, how sparse to be."""

import math
import struct
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import check_integer, check_number

Anneal = Literal["cosine", "constant", "linear", "exponential"]


def update_steps(delta_t: int, t_start: int, t_end: int, total_steps: int) -> range:
    """List the steps of a run at which the topology is updated.

    Args:
        delta_t: Optimizer steps between two updates, at least 1.
        t_start: Step of the first update.
        t_end: Last step at which an update may happen, inclusive.
        total_steps: Length of the run, whose steps are 0 ... total_steps - 1.
    """
    return range(t_start, min(t_end, total_steps - 1) + 1, delta_t)


def num_updates(delta_t: int, t_start: int, t_end: int, total_steps: int) -> int:
    """Count the topology updates of a run; the arguments are those of `update_steps`."""
    return len(update_steps(delta_t, t_start, t_end, total_steps))


@dataclass(frozen=True)
class Window:
    """The steps at which a method updates the topology: t_start, t_start + delta_t, ... <= t_end.

    Step t is the number of optimizer steps taken before it, so the first possible update is at 0,
    as in the RigL repository (`begin <= t <= end` and `last + frequency <= t`).

    Attributes:
        delta_t: Optimizer steps between two updates.
        t_start: First update.
        t_end: Last step at which an update may happen, inclusive.
        at_end: Also update at t_end when it is off the grid of delta_t.

    Raises:
        ValueError: delta_t < 1, t_start < 0, t_end <= t_start, or one of them is no integer.
    """

    delta_t: int
    t_start: int
    t_end: int
    at_end: bool = False

    def __post_init__(self) -> None:
        check_integer("delta_t", self.delta_t)
        if self.delta_t < 1:
            raise ValueError(f"delta_t must be at least 1 optimizer step, got {self.delta_t}")
        check_period(self.t_start, self.t_end)

    def due(self, step: int) -> bool:
        """Say whether the topology is updated at this step."""
        if not self.t_start <= step <= self.t_end:
            return False
        on_grid = (step - self.t_start) % self.delta_t == 0
        return on_grid or (self.at_end and step == self.t_end)

    def num_updates(self, total_steps: int) -> int:
        """Count the updates of a run; its steps are 0 ... total_steps - 1."""
        steps = update_steps(self.delta_t, self.t_start, self.t_end, total_steps)
        off_grid = self.at_end and self.t_end < total_steps and self.t_end not in steps
        return len(steps) + off_grid


@dataclass(frozen=True)
class DropFraction:
    """The share of active connections replaced by an update, as a function of the step.

    With f the initial value, N = t_end - t_start and p = (t - t_start) / N:
    constant f; cosine m + (f - m) / 2 * (1 + cos(pi * min(t, N) / N)); linear f * (1 - p);
    exponential f * (1 - p)^power. Zero outside t_start ... t_end.

    The cosine is that of Evci et al. 2020, section 3, exactly as their code computes it. Their code
    does not shift t by t_start. With t_start > 0 the cosine thus begins below f, and it reaches its
    minimum before t_end.

    Attributes:
        initial: f, in [0, 1].
        t_start: First update.
        t_end: Last update; the cosine and linear fractions are zero there.
        anneal: "cosine", "constant", "linear" or "exponential".
        power: Exponent of the exponential (1 is linear, 3 drops fast). No other anneal has one.
        minimum: m, the last value of the cosine (0.005 in Dettmers & Zettlemoyer 2019).

    Raises:
        ValueError: A value is out of range or has no effect with this anneal.
    """

    initial: float
    t_start: int
    t_end: int
    anneal: str = "cosine"
    power: float | None = None
    minimum: float = 0.0

    def __post_init__(self) -> None:
        check_period(self.t_start, self.t_end)
        check_number("drop_fraction", self.initial)
        check_number("the minimum drop fraction", self.minimum)
        if not 0.0 <= self.initial <= 1.0:
            raise ValueError(f"drop_fraction must be in [0, 1], got {self.initial}")
        if self.anneal not in get_args(Anneal):
            raise ValueError(
                f"drop_anneal must be one of {', '.join(get_args(Anneal))}, got {self.anneal!r}"
            )
        if (self.power is not None) != (self.anneal == "exponential"):
            raise ValueError(
                f"drop_power goes with drop_anneal 'exponential' alone: got drop_power {self.power}"
                f" with {self.anneal!r}"
            )
        if self.power is not None:
            check_number("drop_power", self.power)
            if self.power <= 0.0:
                raise ValueError(f"drop_power must be positive, got {self.power}")
        if not 0.0 <= self.minimum <= self.initial:
            raise ValueError(
                f"the minimum drop fraction must be in [0, {self.initial}], got {self.minimum}"
            )
        if self.minimum > 0.0 and self.anneal != "cosine":
            raise ValueError(f"a minimum drop fraction has no effect with {self.anneal!r}")

    def __call__(self, step: int) -> float:
        """Evaluate the drop fraction at a step."""
        if not self.t_start <= step <= self.t_end:
            return 0.0
        length = self.t_end - self.t_start
        if self.anneal == "constant":
            return self.initial
        if self.anneal == "cosine":
            half = (self.initial - self.minimum) / 2.0
            return self.minimum + half * (1.0 + math.cos(math.pi * min(step, length) / length))
        progress = (step - self.t_start) / length
        return float(self.initial * (1.0 - progress) ** (self.power or 1.0))


def num_dropped(num_active: int, fraction: float) -> int:
    """Compute trunc(float32(num_active) * float32(fraction)), the original's drop count."""
    # A double holds the product of two float32 exactly, so one rounding gives the float32 product.
    product = int(_float32(_float32(num_active) * _float32(fraction)))
    return min(product, num_active)  # a float32 holds no odd number above 2^24


def check_period(t_start: int, t_end: int) -> None:
    check_integer("t_start", t_start)
    check_integer("t_end", t_end)
    if t_start < 0:
        raise ValueError(f"t_start must not be negative, got {t_start}")
    if t_end <= t_start:
        raise ValueError(f"t_end must be larger than t_start {t_start}, got {t_end}")


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])
