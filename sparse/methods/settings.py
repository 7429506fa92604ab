"""The settings of a method: fields of its dataclass, from which flags and documents derive."""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
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

    @property
    def follows_from_length(self) -> bool:
        """Whether the length of a run decides it where it is not given."""
        return self.is_end or self.share is not None or self.epochs is not None

    def steps(self, total_steps: float, steps_per_epoch: float, end: float) -> int:
        """Return its value in a run where it is not given.

        Args:
            total_steps: Optimizer steps of the run.
            steps_per_epoch: Those of an epoch.
            end: Share of the steps after which the topology settles.
        """
        if self.epochs is not None:
            return round(self.epochs * steps_per_epoch)
        return int((end if self.share is None else self.share) * total_steps)


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


def complete(
    method: type,
    given: Mapping[str, Any],
    total_steps: float,
    steps_per_epoch: float,
    end: float,
) -> dict[str, Any]:
    """Return settings with those that follow from the length of a run.

    Args:
        method: The method.
        given: Settings by name; what is a number of epochs by default may be given in epochs, too,
            as <name>_epochs.
        total_steps: As for `Setting.steps`, infinite if it is not known, like `steps_per_epoch`.
        steps_per_epoch: Steps of an epoch.
        end: Share of the steps after which the topology settles.

    Raises:
        ValueError: A length that is needed is not known, or a setting is given twice.
    """
    found = dict(given)
    for name, known in settings_of(method).items():
        in_epochs = f"{name}_epochs"
        if known.epochs is not None and in_epochs in found:
            if name in found:
                raise ValueError(f"{name} and {in_epochs} say the same: give one of them")
            known = dataclasses.replace(known, epochs=found.pop(in_epochs))
        if name in found or not known.follows_from_length:
            continue
        length = total_steps if known.epochs is None else steps_per_epoch
        if not 0 < length < math.inf:
            raise ValueError(f"the run has no known length: give {name}, in steps")
        found[name] = known.steps(total_steps, steps_per_epoch, end)
    return found


def names_of(method: type) -> list[str]:
    """List what `complete` takes: the settings by name, and <name>_epochs."""
    known = settings_of(method)
    return [*known, *(f"{name}_epochs" for name in known if known[name].epochs is not None)]


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
