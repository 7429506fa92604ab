"""What a person watches during training: progress bars, one line per epoch, TensorBoard."""

import contextlib
import functools
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from image_classification.log.records import Data, Step, number_text

_BAR = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
"""A bar with metrics. It leaves out the counts and the rate, so that 80 columns suffice."""


class Progress:
    """A progress bar. If it is not shown, all methods do nothing."""

    def __init__(self, total: int, description: str, *, shown: bool) -> None:
        self._bar: Any = None
        if shown:
            self._bar = tqdm(
                total=total, desc=description, file=sys.stdout, leave=False, dynamic_ncols=True
            )

    def update(self, n: int, **postfix: float | str) -> None:
        """Count `n` more items, and show metrics by the last part of their names."""
        if self._bar is None:
            return
        if postfix:
            short = {name.rpartition(".")[2]: value for name, value in postfix.items()}
            self._bar.set_postfix(short, refresh=False)
            self._bar.bar_format = _BAR
        self._bar.update(n)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Hide the bar while lines are printed."""
        if self._bar is None:
            yield
        else:
            with tqdm.external_write_mode(file=sys.stdout):
                yield


class Summary:
    """Prints one line per epoch and one for the run.

    A line such as `epoch 3  loss 0.51234  top-1 87.50%` shows the metrics that `headline` names.

    Args:
        raport: The file of all records, which the first line names, or None.
    """

    def __init__(self, raport: Path | None) -> None:
        self.headline: tuple[str, ...] = ()
        self._metadata: dict[str, Data] = {}
        if raport is not None:
            print(f"full log: {raport}")

    def metadata(
        self, timestamp: datetime, elapsedtime: float, metric: str, metadata: Data
    ) -> None:
        self._metadata[metric] = metadata

    def log(self, timestamp: datetime, elapsedtime: float, step: Step, data: Data) -> None:
        shown = [self._field(metric, data[metric]) for metric in self.headline if metric in data]
        if shown and not isinstance(step, str) and len(step) < 2:
            head = f"epoch {step[0]}" if step else "summary"
            print(_joined([head, *shown], indent=len(head) + 2))

    def flush(self) -> None:
        """Do nothing, because the logger flushes standard output."""

    def _field(self, metric: str, value: object) -> str:
        metadata = self._metadata.get(metric, {})
        unit = metadata.get("unit") or ""
        default = ":.4g" if isinstance(value, float) else None
        text = number_text(value, metadata.get("format") or default)
        return f"{_label(metric)} {text}{unit if unit == '%' else ' ' + unit}".rstrip()


def _label(metric: str) -> str:
    """Return a metric's name in words: "ema top-1" of val_ema.top1."""
    group, _, name = metric.partition(".")
    words = re.sub(r"^top(?=\d)", "top-", name or group).replace("_", " ")
    return f"ema {words}" if group.endswith("_ema") else words


def _joined(fields: list[str], *, indent: int) -> str:
    """Put fields on one line. A narrow terminal gets several lines, but no field is broken."""
    if not sys.stdout.isatty():
        return "  ".join(fields)
    width = shutil.get_terminal_size().columns
    text = "  ".join(field.replace(" ", "\0") for field in fields)
    return textwrap.fill(
        text,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    ).replace("\0", " ")


def curves(step: tuple[int, ...], data: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record under the names of their curves.

    These are train/loss and so on, epoch/train.loss for whole epochs, and summary/train.loss for
    the run.
    """
    numbers = {name: value for name, value in data.items() if isinstance(value, int | float)}
    if len(step) < 2:
        whole = "epoch" if step else "summary"
        return {f"{whole}/{name}": value for name, value in numbers.items()}
    return {name.replace(".", "/", 1): value for name, value in numbers.items()}


class TensorBoard:
    """Curves over optimizer steps, by the names of `curves`.

    Args:
        directory: Where the event files go.
        resumed: Whether the run is resumed. Records of the interrupted run after its last
            checkpoint are then hidden.

    Raises:
        ValueError: In one line: the directory cannot be written, or the package is missing.
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
        self._writer: Any = (
            None  # opened by the first record, whose step is where a resumed run begins
        )

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Show the configuration of the run as text."""
        self._parameters |= values

    def scalars(self, step: tuple[int, ...], data: Mapping[str, Any], global_step: int) -> None:
        """Add the numbers of a record. The summary of the run is left out, as it is no curve."""
        if not step:
            return
        if self._writer is None:
            self._writer = self._open(purge_step=global_step if self._resumed else None)
            text = json.dumps(self._parameters, indent=4)
            self._writer.add_text("parameters", textwrap.indent(text, "    "), global_step)
        for name, value in curves(step, data).items():
            self._writer.add_scalar(name, value, global_step)

    def close(self) -> None:
        """Write everything out."""
        if self._writer is not None:
            self._writer.close()
