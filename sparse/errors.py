"""The error of a sparse run that cannot go on, and checks of single numbers."""

from collections.abc import Sequence
from numbers import Integral, Real


class SparsityError(RuntimeError):
    """Training is not what the masks say it is and cannot go on; the message is one line."""


def check_integer(name: str, value: object) -> None:
    """Refuse what is not a whole number: a float, even 100.0, a bool, a string.

    Raises:
        ValueError: Names the setting and the value.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}")


def check_number(name: str, value: object) -> None:
    """Refuse what is not a finite number: NaN, an infinity, a bool, a string.

    Raises:
        ValueError: Names the setting and the value.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not -float("inf") < float(value) < float("inf"):  # type: ignore[arg-type]
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse what is none of the choices.

    Raises:
        ValueError: Names the setting, the choices and the value.
    """
    if value not in choices:
        known = " or ".join(choices) if len(choices) < 3 else "one of " + ", ".join(choices)
        raise ValueError(f"{name} must be {known}, got {value!r}")
