"""A terminal of 80 columns and 24 rows: what a program writes to it, and what can be read on it."""

import contextlib
import os
import pty
import re
import subprocess
import termios
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

COLUMNS, ROWS = 80, 24


class Terminal:
    """A pseudo-terminal; `text` is all that was written to it, once it is closed."""

    def __init__(self) -> None:
        self.text = ""

    @contextlib.contextmanager
    def opened(self) -> Iterator[TextIO]:
        """Give the file of the terminal, to write to."""
        seen, shown = pty.openpty()
        termios.tcsetwinsize(shown, (ROWS, COLUMNS))
        reader = threading.Thread(target=self._read, args=(seen,))
        reader.start()
        try:
            with os.fdopen(shown, "w") as terminal:
                yield terminal
        finally:
            reader.join()
            os.close(seen)

    def run(self, command: Sequence[str], cwd: Path, env: Mapping[str, str]) -> int:
        """Run a program on the terminal; return its status."""
        size = {"COLUMNS", "LINES"}  # would take the place of the terminal's own
        environment = {name: value for name, value in env.items() if name not in size}
        with self.opened() as terminal:
            return subprocess.run(
                command, cwd=cwd, env=environment, stdin=terminal, stdout=terminal, stderr=terminal,
                start_new_session=True, check=False, timeout=600,
            ).returncode  # fmt: skip

    def lines(self) -> list[str]:
        """Return the lines that stand there at the end, those that scrolled away included."""
        rows, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[[\d;]*[A-Za-z]|.", self.text, re.DOTALL):
            if part == "\r":
                column = 0
            elif part == "\x1b[K":
                rows[row] = rows[row][:column]
            elif part == "\x1b[A":
                row -= 1
            elif part == "\n" or column == COLUMNS:
                row += 1
                rows += [""] * (row == len(rows))
                column = column if part == "\n" else 0
            if part.isprintable():
                rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + 1 :]
                column += 1
        return [line.rstrip() for line in rows]

    def _read(self, file: int) -> None:
        content = b""
        with contextlib.suppress(OSError):  # how Linux tells that the other side is closed
            while part := os.read(file, 1 << 16):
                content += part
        self.text += content.decode()
