"""What every program does: parse its flags, run, tell a user's mistake in one line."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from image_classification import flags

Flags = TypeVar("Flags")


@dataclass(frozen=True)
class Program(Generic[Flags]):
    """A program whose flags are one dataclass."""

    name: str
    """Its file, or the name of its module in cli/."""
    flags: type[Flags]
    """The docstring heads `--help`."""
    action: Callable[[Flags], str]
    """Does what the flags ask for and returns what to print; a ValueError is a user's mistake."""

    def parse(self, argv: Sequence[str]) -> Flags:
        """Return the flags of a command line.

        Raises:
            ValueError: One line naming the flag and, where known, the remedy.
        """
        command = self.name if self.name.endswith(".py") else f"python -m cli.{self.name}"
        given: list[Flags] = flags.parse(
            command, argv, self.flags, description=str(self.flags.__doc__)
        )
        return given[0]

    def main(self, argv: Sequence[str]) -> int:
        """Run the command line; return its exit status: 0, or 2 for a user's mistake."""
        try:
            text = self.action(self.parse(argv))
        except ValueError as error:
            return fail(self.name, error)
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
