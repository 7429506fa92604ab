"""Turn finished runs into a table: `python -m cli.report RAPORT...`.

Runs that differ in their seed alone are one row: mean and sample standard deviation over them.
"""

from image_classification import versions

if __name__ == "__main__":
    versions.require()

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cli.program import Program
from image_classification.config import Config
from image_classification.flags import argument, flag

# Flags that may differ between two runs of one experiment.
_NOT_THE_EXPERIMENT = {
    *("seed", "data", "workers", "prefetch", "print_freq", "workspace", "raport_file"),
    *("tensorboard", "resume", "run_epochs", "save_checkpoints", "checkpoint_filename"),
    *("gather_checkpoints", "batch_size", "prof", "dry_run", "version", "console"),
}


@dataclass(frozen=True)
class Run:
    """What a raport file says."""

    path: Path
    parameters: Mapping[str, Any]
    epochs: Mapping[int, Mapping[str, float]]
    """Epoch (from 0) -> its metrics; those of a repeated epoch are the last ones."""

    def experiment(self) -> dict[str, Any]:
        """Return the flags that define the experiment."""
        first = next(iter(Config.__dataclass_fields__))
        names = list(self.parameters)
        # what stands before the flags describes the machine, not the experiment
        flags = names[names.index(first) :] if first in names else names
        return {k: self.parameters[k] for k in flags if k not in _NOT_THE_EXPERIMENT}

    def values(self, metric: str) -> list[float]:
        """Return a metric of all epochs that have it, in order.

        Raises:
            ValueError: None has; names the file.
        """
        found = [data[metric] for _, data in sorted(self.epochs.items()) if metric in data]
        if not found:
            raise ValueError(f"{self.path} has no epoch with {metric}")
        return found


def read_raport(path: Path) -> Run:
    """Read a raport file, which may be that of an interrupted or resumed run.

    Raises:
        ValueError: One line: the file is missing or a line of it is no record.
    """
    parameters: dict[str, Any] = {}
    epochs: dict[int, dict[str, float]] = {}
    for record in _records(path):
        step = record.get("step")
        if step == "PARAMETER":
            parameters.update(record["data"])
        elif isinstance(step, list) and len(step) == 1:
            epochs.setdefault(step[0], {}).update(record["data"])
    return Run(path, parameters, epochs)


def _records(path: Path) -> Iterable[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        try:
            if not line.startswith("DLLL "):
                raise ValueError
            record = json.loads(line.removeprefix("DLLL "))
        except ValueError:
            # a line that a crash cut off is the last of its session
            following = lines[number : number + 1]
            if not following or '"PARAMETER"' in following[0]:
                continue
            raise ValueError(f"{path}: line {number} is no record of a raport") from None
        yield record


def group(runs: Iterable[Run]) -> list[list[Run]]:
    """Put runs of one experiment together, in order of appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.experiment(), sort_keys=True), []).append(run)
    return list(groups.values())


def labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Name each group by the flags in which the groups differ; a single one by its file."""
    if len(groups) == 1:
        return [str(groups[0][0].path)]
    flags = [runs[0].experiment() for runs in groups]
    names = dict.fromkeys(name for of_group in flags for name in of_group)
    differing = [n for n in names if len({json.dumps(f.get(n)) for f in flags}) > 1]
    return [
        ", ".join(f"{n} {f[n]}" for n in differing if f.get(n) is not None) or "defaults"
        for f in flags
    ]


def table(groups: Sequence[Sequence[Run]], metric: str = "val.top1") -> str:
    """Return a Markdown table with a row per group.

    Args:
        groups: Result of `group`.
        metric: Metric of an epoch; "best" is its highest value.

    Raises:
        ValueError: A run has no epoch with the metric.
    """
    head = ["experiment", "runs", "epochs", f"{metric} last", "best", "sparsity", "images/s"]
    lines = ["| " + " | ".join([*head, "commit"]) + " |", "|" + "---|" * (len(head) + 1)]
    for label, runs in zip(labels(groups), groups, strict=True):
        series = [run.values(metric) for run in runs]
        cells = [
            label,
            str(len(runs)),
            _epochs(runs),
            _mean([values[-1] for values in series], 2),
            _mean([max(values) for values in series], 2),
            _mean(_last(runs, "sparse.sparsity"), 4),
            _mean(_last(runs, "train.total_ips"), 0),
            ", ".join(dict.fromkeys(str(r.parameters.get("git_commit", ""))[:10] for r in runs)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(groups: Sequence[Sequence[Run]], path: Path, metric: str = "val.top1") -> None:
    """Draw a metric over the epochs: the mean of each group and the range of its runs."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for label, runs in zip(labels(groups), groups, strict=True):
        series = [run.values(metric) for run in runs]
        columns = list(zip(*series, strict=False))  # up to the shortest run
        at = range(1, len(columns) + 1)
        (line,) = axis.plot(at, [statistics.mean(c) for c in columns], label=label)
        lowest, highest = [min(c) for c in columns], [max(c) for c in columns]
        axis.fill_between(at, lowest, highest, color=line.get_color(), alpha=0.2, lw=0)
    axis.set(xlabel="epoch", ylabel=metric)
    axis.grid(alpha=0.25)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _last(runs: Sequence[Run], metric: str) -> list[float]:
    found = [[d[metric] for _, d in sorted(r.epochs.items()) if metric in d] for r in runs]
    return [values[-1] for values in found if values]


def _epochs(runs: Sequence[Run]) -> str:
    done = min(max(run.epochs, default=-1) + 1 for run in runs)
    wanted = runs[0].parameters.get("epochs", done)
    return str(done) if done == wanted else f"{done} of {wanted}"


def _mean(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Turn finished runs into a table."""

    raports: list[Path] = argument("raport files", nargs="+", metavar="RAPORT")
    metric: str = flag("val.top1", "metric of an epoch")
    plot: Path | None = flag(None, "draw the metric over the epochs", metavar="PNG")


def run(given: Flags) -> str:
    """Return the table, and draw the picture that is asked for.

    Raises:
        ValueError: A user's mistake, in one line.
    """
    groups = group(map(read_raport, given.raports))
    text = table(groups, given.metric)
    if given.plot:
        plot(groups, given.plot, given.metric)
    return text


PROGRAM = Program("python -m cli.report", Flags, run)
main = PROGRAM.main


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
