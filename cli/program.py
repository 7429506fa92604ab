"""What every program does: run, print the result, tell a user's mistake in one line."""

import sys
from collections.abc import Callable


def run(name: str, action: Callable[[], str]) -> int:
    """Print what `action` returns, if anything.

    Args:
        name: What the user types to start the program.
        action: Parses the command line and does what it asks for; a ValueError is a user's mistake.

    Returns:
        The exit status: 0, or 2 for a user's mistake.
    """
    try:
        text = action()
    except ValueError as error:
        return fail(name, error)
    if text:
        print(text)
    return 0


def fail(name: str, error: object, *, status: int = 2) -> int:
    """Tell the error in one line on standard error; return the exit status."""
    print(f"{name}: error: {error}", file=sys.stderr)
    return status
