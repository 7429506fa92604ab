"""Ranges of numbers: each is stated once, where the value lives, with the words that name it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Numbers that are allowed: `5 in AT_LEAST_1`."""

    words: str
    """Completes "the value must be ..."."""
    holds: Callable[[float], bool]

    def __contains__(self, value: float) -> bool:
        return self.holds(value)

    def __str__(self) -> str:
        return self.words


AT_LEAST_0 = Range("at least 0", lambda value: value >= 0)
AT_LEAST_1 = Range("at least 1", lambda value: value >= 1)
ABOVE_0 = Range("above 0", lambda value: value > 0)
