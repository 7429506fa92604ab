"""Stop in time: a signal asks the run to save its state and to end with a status of its own.

Imports nothing but the standard library, so that signals can be heard before torch is loaded.
"""

import _thread
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

EXIT_STATUS = 75
"""Exit status of a run that was stopped and can go on: EX_TEMPFAIL of sysexits.h."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_received: signal.Signals | None = None
_grace = 25.0


class Preempted(Exception):  # noqa: N818 - no error: the run did what it was asked to
    """All ranks have agreed to stop; what could be saved is saved."""


def listen() -> None:
    """Take SIGTERM and SIGUSR1 as requests to stop, for the rest of this process."""
    for number in SIGNALS:
        signal.signal(number, _receive)


@contextlib.contextmanager
def listening(grace: float) -> Iterator[None]:
    """Take signals as requests inside the context.

    Args:
        grace: Seconds from the first signal until the process ends, whatever it is doing then.
    """
    global _grace
    _grace = grace
    before = {number: signal.getsignal(number) for number in SIGNALS}
    listen()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def requested() -> str | None:
    """Return the name of the signal that asked this process to stop; None if none did."""
    return None if _received is None else _received.name


def _receive(number: int, frame: FrameType | None) -> None:
    global _received
    if _received is None:
        _received = signal.Signals(number)
        # The lowest layer of threads: threading's own takes a lock that the interrupted code
        # may hold.
        _thread.start_new_thread(_end_late, (time.monotonic(),))


def _end_late(since: float) -> None:
    """End the process when the grace is over: a peer may be gone, or a disk may hang."""
    while (left := since + _grace - time.monotonic()) > 0:
        time.sleep(min(left, 1.0))
    # Written past the logger, whose owner may be stuck in it.
    sys.stderr.write(
        f"WARNING: not done within --preempt-grace {_grace:g} s: ending without a new checkpoint\n"
    )
    sys.stderr.flush()
    os._exit(EXIT_STATUS)
