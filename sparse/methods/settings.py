"""The settings of a method: fields of its dataclass, from which flags and documents derive."""

import dataclasses
import functools
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import check_choice, check_integer, check_number


def setting(
    default: Any,
    help: str,
    *,
    is_end: bool = False,
    share: float | None = None,
    epochs: float | None = None,
) -> Any:
    """Declare a setting of a method, as a dataclass field.

    A number of optimizer steps may follow from the length of a run. The library must be told it,
    `main.py` derives it where it is not given.

    Args:
        default: Value without the argument; `dataclasses.MISSING` if it must be given.
        help: One line: what it means, its unit and range.
        is_end: It is the step at which the topology settles: --t-end-fraction of all steps.
        share: It is this share of all steps.
        epochs: It is this number of epochs. The flag of `main.py` is called <name>-epochs and takes
            epochs, too; the help text has to say "optimizer steps".
    """
    metadata = {"help": help, "is_end": is_end, "share": share, "epochs": epochs}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is known of a setting.

    Attributes:
        type: Its type: int, float, str, bool, a Literal, a Sequence or a Mapping.
        optional: Whether it may also be None.
        default: `dataclasses.MISSING` if it must be given.
        help: See `setting`, like `is_end`, `share` and `epochs`.
    """

    type: Any
    optional: bool
    default: Any
    help: str
    is_end: bool
    share: float | None
    epochs: float | None


@functools.cache
def settings_of(method: type) -> dict[str, Setting]:
    """List the settings of a method by name."""
    hints, found = typing.get_type_hints(method), {}
    for declared in dataclasses.fields(method):
        if "help" in declared.metadata:
            hint = hints[declared.name]
            is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
            kinds = typing.get_args(hint) if is_union else (hint,)
            (kind,) = (kind for kind in kinds if kind is not type(None))
            found[declared.name] = Setting(
                type=kind,
                optional=type(None) in kinds,
                default=declared.default,
                **declared.metadata,
            )
    return found


def check_types(method: Any) -> None:
    """Refuse settings that are of another type, or none of the choices.

    Raises:
        ValueError: Names the setting and the value.
    """
    kind: Any = type(method)
    for name, known in settings_of(kind).items():
        value = getattr(method, name)
        if value is None and known.optional:
            continue
        if typing.get_origin(known.type) is Literal:
            check_choice(name, value, typing.get_args(known.type))
        elif known.type is int:
            check_integer(name, value)
        elif known.type is float:
            check_number(name, value)
