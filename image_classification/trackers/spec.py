"""What a service that follows runs has to offer, and what flags and checks know of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """A run of one service."""

    run_id: str
    """By which the service knows the run."""
    address: str
    """Where a person finds the run."""

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Add to the configuration of the run: values of JSON's types, before any record."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add numbers to the curves of the run. A resumed run may repeat steps."""

    def close(self) -> None:
        """Send everything and end the run."""


@dataclass(frozen=True)
class TrackerSpec:
    """A tracker and what the flags and checks have to know of it."""

    open: Callable[[str, Path, str | None], Tracker]
    """Begins a run, from the project, a folder for files, and the id of the run to go on with."""
    package: str
    """The package that has to be installed: its name on PyPI and in an import statement."""
    remedy: str
    """What to do when a run cannot begin."""
