"""The two outputs of DLLogger: lines of JSON in a raport file, lines of text on the console.

`backends` takes the classes of the `dllogger` package where it is installed, and otherwise those
below, which write the same lines (format of DLLogger 1.1.0).
"""

import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

Step = tuple[int, ...] | str
Data = Mapping[str, Any]

Formats = Mapping[str, tuple[str | None, str]]
"""Unit and format of metrics. An entry serves the names below it too (group.metric.<layer>)."""

TIME = ("s", ":.5f")
RATE = ("images/s", ":.2f")
SHARE = (None, ":.4f")
COUNT = (None, ":.0f")

# Validation metrics are listed once, as val.*, and serve val_ema.*.
_METRICS: Formats = {
    "train.loss": (None, ":.5f"),
    "train.lr": (None, ":.6f"),
    "train.grad_scale": (None, ":.1f"),
    "train.compute_ips": RATE,
    "train.total_ips": RATE,
    "train.data_time": TIME,
    "train.compute_time": TIME,
    "val.top": ("%", ":.2f"),
    "val.loss": (None, ":.5f"),
    "val.compute_ips": RATE,
    "val.total_ips": RATE,
    "val.data_time": TIME,
    "val.compute_latency": TIME,
    "val.compute_latency_at": TIME,
    "data.bad_files": COUNT,
    "gpu.utilization": ("%", ":.0f"),
    "gpu.memory": ("GiB", ":.2f"),
    "gpu.power": ("W", ":.0f"),
}


class Backend(Protocol):
    """One output; the interface of DLLogger's backends."""

    def metadata(
        self, timestamp: datetime, elapsedtime: float, metric: str, metadata: Data, /
    ) -> None:
        """Take note of a metric's unit and format."""

    def log(self, timestamp: datetime, elapsedtime: float, step: Step, data: Data, /) -> None:
        """Write one record."""

    def flush(self) -> None:
        """Hand everything written so far to the operating system."""


def default_metadata(metric: str, further: Formats | None = None) -> tuple[str | None, str] | None:
    """Return (unit, format) of a metric of the harness; None for a name it does not know.

    Args:
        metric: Its name.
        further: Formats of metrics that are joined from outside.
    """
    known = {**_METRICS, **(further or {})}
    name = re.sub(r"^val_ema\.", "val.", metric)
    name = re.sub(r"^(val\.top|val\.compute_latency_at)\d+$", r"\1", name)
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return known.get(name)


def open_raport(path: Path, *, append: bool) -> Backend:
    """Open a raport file, new or to be continued.

    Its directory is made when it is missing. A last line that a crash cut off is ended, so that
    the next record starts a line of its own.

    Raises:
        ValueError: in one line, the file cannot be written and why.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if append:
            _end_last_line(path)
        library = _dllogger()
        if library is None:
            return JsonFile(path, append=append)
        backend: Backend = library.JSONStreamBackend(
            library.Verbosity.VERBOSE, str(path), append=append
        )
        return backend
    except OSError as error:
        raise ValueError(
            f"cannot write the raport {path}: {error.strerror}; choose another --raport-file or "
            "--workspace"
        ) from error


def close_raport(raport: Backend) -> None:
    """Write out and close what `open_raport` opened."""
    assert hasattr(raport, "file")  # JsonFile has it, and so has DLLogger's class
    raport.file.close()


def open_console() -> Backend:
    """Return the output on standard output."""
    library = _dllogger()
    if library is None:
        return Console()
    backend: Backend = library.StdOutBackend(
        library.Verbosity.DEFAULT,
        step_format=step_text,
        metric_format=metric_text,
        prefix_format=prefix_text,
    )
    return backend


class JsonFile:
    """A raport file: one line `DLLL {json}` per record. Not-a-number is written as NaN."""

    def __init__(self, path: Path, *, append: bool) -> None:
        self.file = path.open("a" if append else "w", encoding="utf-8")

    def metadata(
        self, timestamp: datetime, elapsedtime: float, metric: str, metadata: Data
    ) -> None:
        record = {
            "timestamp": str(timestamp.timestamp()),
            "elapsedtime": str(elapsedtime),
            "datetime": str(timestamp.astimezone()),
            "type": "METADATA",
            "metric": metric,
            "metadata": metadata,
        }
        self.file.write(f"DLLL {json.dumps(record)}\n")

    def log(self, timestamp: datetime, elapsedtime: float, step: Step, data: Data) -> None:
        record = {
            "timestamp": str(timestamp.timestamp()),
            "datetime": str(timestamp.astimezone()),
            "elapsedtime": str(elapsedtime),
            "type": "LOG",
            "step": step,
            "data": data,
        }
        self.file.write(f"DLLL {json.dumps(record)}\n")

    def flush(self) -> None:
        self.file.flush()


class Console:
    """Standard output: one line `DLL <time> - <step> <name> : <value> <unit> ...` per record."""

    def __init__(self) -> None:
        self._metadata: dict[str, Data] = {}

    def metadata(
        self, timestamp: datetime, elapsedtime: float, metric: str, metadata: Data
    ) -> None:
        self._metadata[metric] = metadata

    def log(self, timestamp: datetime, elapsedtime: float, step: Step, data: Data) -> None:
        metrics = [metric_text(m, self._metadata.get(m, {}), v) for m, v in data.items()]
        print(f"{prefix_text(timestamp)}{step_text(step)} {' '.join(metrics)}")

    def flush(self) -> None:
        """Do nothing: the logger flushes standard output."""


def prefix_text(timestamp: datetime) -> str:
    """Return the head of a console line."""
    return f"DLL {timestamp} - "


def step_text(step: Step) -> str:
    """Name the step of a record: iteration of an epoch, epoch, or the run's summary."""
    if isinstance(step, str):
        return step
    names = ("Epoch", "Iteration", "Validation Iteration")
    return " ".join(f"{name}: {n}" for name, n in zip(names, step, strict=False)) or "Summary:"


def metric_text(metric: str, metadata: Data, value: object) -> str:
    """Return `name : value unit`; the format applies to numbers, a missing unit leaves no trace."""
    text = number_text(value, metadata.get("format"))
    unit = metadata.get("unit")
    return f"{metric} : {text} {unit}" if unit else f"{metric} : {text}"


def number_text(value: object, format: str | None) -> str:
    """Return a number in a format such as ":.2f", anything else as it is."""
    return f"{{{format or ''}}}".format(value) if isinstance(value, int | float) else str(value)


def _dllogger() -> Any | None:
    try:
        import dllogger
    except ModuleNotFoundError:
        return None
    return dllogger


def _end_last_line(path: Path) -> None:
    if not path.is_file() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, 2)
        if file.read() != b"\n":
            file.write(b"\n")
