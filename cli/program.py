"""What every program does: parse its flags, run, tell a user's mistake in one line."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from image_classification import flags
from sparse import __version__

Flags = TypeVar("Flags")

DISTRIBUTION = None if __name__ == "cli.program" else "sparsetrain"
"""The distribution to which this file belongs; its build renames the packages (setup.py)."""


@dataclass(frozen=True)
class Program(Generic[Flags]):
    """A program whose flags are one dataclass."""

    command: str
    """What the user types to start it: `costs.py`, `python -m cli.report`."""
    flags: type[Flags]
    """The docstring heads `--help`."""
    action: Callable[[Flags], str]
    """Does what the flags ask for and returns what to print; ValueError and OSError are mistakes of
    the user."""

    def parse(self, argv: Sequence[str]) -> Flags:
        """Return the flags of a command line.

        Raises:
            ValueError: One line naming the flag and, where known, the remedy.
        """
        given: list[Flags] = flags.parse(
            self.command,
            argv,
            self.flags,
            description=str(self.flags.__doc__),
            version=__version__,
        )
        return given[0]

    @property
    def name(self) -> str:
        """What heads its errors: the command, or the last part of its module's name."""
        return self.command.rpartition("cli.")[2]

    def main(self, argv: Sequence[str]) -> int:
        """Run the command line; return its exit status: 0, or 2 for a user's mistake."""
        try:
            text = self.action(self.parse(argv))
        except ValueError as error:
            return fail(self.name, error)
        except OSError as error:  # a folder that is missing, a disk that is full
            place = f"{error.filename}: " if error.filename else ""
            return fail(self.name, f"{place}{error.strerror or error}")
        if text:
            print(text)
        return 0


def fail(name: str, error: object, *, status: int = 2) -> int:
    """Tell the error in one line on standard error; return the exit status."""
    say(f"{name}: error: {error}")
    return status


def say(line: str) -> None:
    """Write a line to standard error at once: print would let other processes write before its end.

    The processes of a run share standard error.
    """
    sys.stderr.write(f"{line}\n")
