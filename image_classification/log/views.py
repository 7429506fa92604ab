"""What a person watches while training: a progress bar in the terminal, curves in TensorBoard."""

import contextlib
import functools
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Progress:
    """A progress bar, or nothing at all with the same methods."""

    def __init__(self, total: int, description: str, *, shown: bool) -> None:
        self._bar: Any = None
        if shown:
            self._bar = tqdm(
                total=total, desc=description, file=sys.stdout, leave=False, dynamic_ncols=True
            )

    def update(self, n: int, **postfix: float | str) -> None:
        """Count `n` more items; show the last part of each metric's name with its value."""
        if self._bar is None:
            return
        if postfix:
            short = {name.rpartition(".")[2]: value for name, value in postfix.items()}
            self._bar.set_postfix(short, refresh=False)
        self._bar.update(n)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Take the bar out of the way of lines that are printed meanwhile."""
        if self._bar is None:
            yield
        else:
            with tqdm.external_write_mode(file=sys.stdout):
                yield


class TensorBoard:
    """Curves by optimizer step: `train/loss` and so on, summaries of epochs as `epoch/train.loss`.

    Args:
        directory: Where the event files go.
        resumed: A run that is continued: what an interrupted run recorded beyond its last
            checkpoint is hidden.

    Raises:
        ValueError: in one line, the directory cannot be written or the package is missing.
    """

    def __init__(self, directory: Path, *, resumed: bool) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ValueError(f"--tensorboard needs a package: pip install {error.name}") from error
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"cannot write to --tensorboard {directory}: {error.strerror}"
            ) from error
        self._open = functools.partial(SummaryWriter, str(directory))
        self._resumed = resumed
        self._parameters: dict[str, Any] = {}
        self._writer: Any = None  # opened by the first numbers, which tell where a resume begins

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Show the configuration of the run as text."""
        self._parameters |= values

    def scalars(self, step: tuple[int, ...], data: Mapping[str, Any], global_step: int) -> None:
        """Add the numbers of a record; the run's own summary is no curve and is left out."""
        if not step:
            return
        if self._writer is None:
            self._writer = self._open(purge_step=global_step if self._resumed else None)
            text = json.dumps(self._parameters, indent=4)
            self._writer.add_text("parameters", textwrap.indent(text, "    "), global_step)
        for name, value in data.items():
            if isinstance(value, int | float):
                tag = f"epoch/{name}" if len(step) == 1 else name.replace(".", "/", 1)
                self._writer.add_scalar(tag, value, global_step)

    def close(self) -> None:
        """Write out everything."""
        if self._writer is not None:
            self._writer.close()
