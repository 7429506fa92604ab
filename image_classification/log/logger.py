"""The logger of a run: raport file, console, TensorBoard, a tracker, progress bars in one."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from enum import IntEnum
from pathlib import Path
from typing import Any

from image_classification.config import ConsoleFormat
from image_classification.log.records import (
    Backend,
    Formats,
    close_raport,
    default_metadata,
    open_console,
    open_raport,
)
from image_classification.log.views import Progress, Summary, TensorBoard, curves
from image_classification.trackers import Tracker

Value = float | int | str | None


class Verbosity(IntEnum):
    """How prominent a record is (DLLogger's levels)."""

    OFF = -1
    """Not written at all."""
    DEFAULT = 0
    """Raport and console."""
    VERBOSE = 1
    """Raport only, for records of iterations; records of epochs and runs go to the console too."""


class Logger:
    """Writes the records of a run. Only one rank writes.

    If the raport can no longer be written (a full disk), training goes on after a single warning.

    Args:
        raport: File of JSON lines, or None.
        append: Continue the file of the run that is resumed; otherwise the file is replaced.
        tensorboard: Directory of TensorBoard events, or None.
        open_tracker: Begins the run at a service that follows runs; called where the log is
            written. The service gets what TensorBoard gets, and the summary of the run.
        console: What standard output shows. `dllogger` shows every record as a line. `summary`
            shows one line per epoch (see `headline`). `auto` is `summary` on a terminal and
            `dllogger` elsewhere. None shows neither records nor messages.
        formats: Units and formats of the metrics that a program joins to training.
        enabled: False on the ranks that do not write. All methods may be called there, too.

    Raises:
        ValueError: In one line: the raport or the directory cannot be written, `tensorboard` is not
            installed, or the run of the tracker cannot begin.
    """

    def __init__(
        self,
        *,
        raport: Path | None,
        append: bool,
        tensorboard: Path | None = None,
        open_tracker: Callable[[], Tracker] | None = None,
        console: ConsoleFormat | None = "auto",
        formats: Formats | None = None,
        enabled: bool = True,
    ) -> None:
        self._enabled, self._formats = enabled, formats
        self._start = datetime.now()
        self._declared: set[str] = set()
        self._raport_failed = False
        self._progress = Progress(0, "", shown=False)
        self._console: Backend | None = None
        self._summary: Summary | None = None
        self._checkpoint: Path | None = None
        self._raport: Backend | None = None
        self._tensorboard: TensorBoard | None = None
        self._tracker: Tracker | None = None
        if not enabled:
            return
        try:
            if open_tracker is not None:  # before the raport of an earlier run is replaced
                self._tracker = open_tracker()
            if raport is not None:
                self._raport = open_raport(raport, append=append)
            if tensorboard is not None:
                self._tensorboard = TensorBoard(tensorboard, resumed=append)
        except ValueError:
            self.close()
            raise
        if console is not None:
            if console == "summary" or (console == "auto" and sys.stdout.isatty()):
                self._summary = Summary(raport)
            self._console = self._summary or open_console()
        if self._tracker is not None:
            self.message(f"tracked as {self._tracker.address}")

    def metadata(self, metric: str, *, unit: str | None, format: str | None) -> None:
        """Declare a metric's unit and format (such as ":.2f"), before its first record.

        The trainer's own metrics need no declaration: the first record of a metric writes it.
        """
        self._declared.add(metric)
        metadata = {"unit": unit, "format": format}
        self._write(lambda out, now, elapsed: out.metadata(now, elapsed, metric, metadata))

    def headline(self, metrics: Sequence[str]) -> None:
        """Choose the metrics that `summary` shows for an epoch and for the run, in this order."""
        if self._summary:
            self._summary.headline = tuple(dict.fromkeys(metrics))

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Write the configuration of the run. Values of types that JSON lacks become text."""
        plain = {name: _plain(value) for name, value in values.items()}
        self._write(lambda out, now, elapsed: out.log(now, elapsed, "PARAMETER", plain))
        if self._tensorboard:
            self._tensorboard.parameters(plain)
        self._track(lambda tracker: tracker.parameters(plain))

    def log(
        self,
        step: tuple[int, ...],
        data: Mapping[str, Value],
        verbosity: Verbosity = Verbosity.DEFAULT,
        *,
        global_step: int | None = None,
    ) -> None:
        """Write one record.

        Args:
            step: (epoch, iteration), (epoch, iteration, validation iteration), (epoch,) for the
                summary of an epoch, or () for the summary of the run.
            data: Metric name -> value. An empty record is not written.
            verbosity: Where the record goes.
            global_step: Optimizer step. TensorBoard and trackers show only records that have one,
                trackers also the summary of a run that has not trained.
        """
        if not data or verbosity == Verbosity.OFF or not self._enabled:
            return
        for metric in data:
            known = default_metadata(metric, self._formats)
            if known and metric not in self._declared:
                self.metadata(metric, unit=known[0], format=known[1])
        by_iteration = verbosity == Verbosity.DEFAULT and self._summary is None
        on_console = by_iteration or len(step) < 2
        record = dict(data)
        self._write(
            lambda out, now, elapsed: out.log(now, elapsed, step, record), on_console=on_console
        )
        if self._tensorboard and global_step is not None:
            self._tensorboard.scalars(step, data, global_step)
        if (global_step is not None or not step) and (numbers := curves(step, data)):
            self._track(lambda tracker: tracker.log(numbers, global_step or 0))

    def message(self, text: str) -> None:
        """Write a line to the console."""
        if self._console:
            with self._progress.hidden():
                print(text, flush=True)

    def saved(self, path: Path) -> None:
        """Tell where a checkpoint was written. `summary` names only the last one, at the end."""
        self._checkpoint = path
        if not self._summary:
            self.message(f"SAVING {path}")

    def warning(self, text: str) -> None:
        """Write one line to standard error."""
        if self._enabled:
            with self._progress.hidden():
                # In one piece: other processes write there, too, and print writes the end alone.
                sys.stderr.write(f"WARNING: {' '.join(text.split())}\n")
                sys.stderr.flush()

    def progress(self, total: int, description: str) -> Progress:
        """Return a progress bar over `total` items; it is invisible unless output is a terminal."""
        shown = self._console is not None and sys.stdout.isatty()
        self._progress = Progress(total, description, shown=shown)
        return self._progress

    def close(self) -> None:
        """Write everything out and close the files. Later calls write nothing."""
        self._progress.close()
        if self._summary and self._checkpoint:
            self.message(f"checkpoint: {self._checkpoint}")
        if self._raport:
            with self._raport_errors():
                close_raport(self._raport)
        if self._tensorboard:
            self._tensorboard.close()
        self._track(lambda tracker: tracker.close())
        self._console = self._summary = self._raport = self._tensorboard = self._tracker = None

    def _track(self, act: Callable[[Tracker], None]) -> None:
        """Let the tracker do something. After a fault, training goes on without it."""
        if self._tracker is None:
            return
        try:
            act(self._tracker)
        except Exception as error:  # of a kind that only its package knows
            self._tracker = None
            self.warning(f"--log-to: the tracker fails and gets no more records: {error}")

    def _write(
        self, write: Callable[[Backend, datetime, float], None], *, on_console: bool = True
    ) -> None:
        now = datetime.now()
        elapsed = (now - self._start).total_seconds()
        if self._raport:
            with self._raport_errors():
                write(self._raport, now, elapsed)
                self._raport.flush()
        if self._console and on_console:
            with self._progress.hidden():
                write(self._console, now, elapsed)
                sys.stdout.flush()

    @contextlib.contextmanager
    def _raport_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._raport_failed:
                self.warning(f"the raport cannot be written, records are lost: {error.strerror}")
            self._raport_failed = True


def _plain(value: Any) -> Any:
    """Return `value` in the types of JSON."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, str | int | float | None) else str(value)
