"""Turn finished runs into a table: `python -m cli.report RAPORT...`.

Runs that differ in their seed alone are one row: mean and sample standard deviation over them. With
--compare there is a row per method and sparsity: accuracy against the operations of training.
"""

from image_classification import versions

if __name__ == "__main__":
    versions.require()

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cli.flags import sparse_flags
from cli.metrics import FORMATS
from cli.program import Program
from image_classification.config import PER_INVOCATION, Config
from image_classification.flags import argument, flag
from image_classification.log.records import default_metadata

# What a run starts from is said when it starts; a resumed run need not repeat it.
_START = ("pretrained_from_file", "new_head")
# Flags that may differ between two runs of one experiment: those of an invocation, those that the
# images per step follow from, and the earlier port's spellings, which the log has in ours, too.
_NOT_THE_EXPERIMENT = PER_INVOCATION - {*_START} | {
    *("data", "batch_size", "optimizer_batch_size", "dense_allocation", "static_topo")
}


@dataclass(frozen=True)
class Run:
    """What a raport file says."""

    path: Path
    parameters: Mapping[str, Any]
    epochs: Mapping[int, Mapping[str, float]]
    """Epoch (from 0) -> its metrics; those of a repeated epoch are the last ones."""

    def experiment(self) -> dict[str, Any]:
        """Return the flags that define the experiment, and the images per step."""
        first = next(iter(Config.__dataclass_fields__))
        names = list(self.parameters)
        # what stands before the flags describes the machine, not the experiment
        flags = names[names.index(first) :] if first in names else names
        # a flag that the version of the run did not have yet did nothing, as by default
        values = vars(Config()) | vars(sparse_flags()()) | {k: self.parameters[k] for k in flags}
        values |= {"sparse_method": self.method, "images_per_step": self.images_per_step}
        return {k: v for k, v in values.items() if k not in _NOT_THE_EXPERIMENT}

    @property
    def images_per_step(self) -> int | None:
        """Images of an optimizer step over all processes; None in older raports without a flag."""
        asked_for = self.parameters.get("optimizer_batch_size", -1)
        found = self.parameters.get("images_per_step", asked_for)
        return None if found == -1 else int(found)

    @property
    def method(self) -> str:
        """Name of the method of sparse training, or "dense"."""
        return str(self.parameters.get("sparse_method") or "dense")

    @property
    def is_complete(self) -> bool:
        """Whether all epochs are there."""
        return max(self.epochs, default=-1) + 1 == self.parameters.get("epochs")

    @property
    def dense_training_flops(self) -> float | None:
        """Operations that dense training of the same length takes; None in older raports."""
        names = "epochs", "steps_per_epoch", "images_per_step", "dense_flops"
        if not all(name in self.parameters for name in names):
            return None
        # forward, and backward for the inputs and for the weights
        return 3.0 * math.prod(float(self.parameters[name]) for name in names)

    @property
    def training_flops(self) -> float | None:
        """Operations that the run took; None if it is not complete, or its raport is older."""
        dense, ratio = self.dense_training_flops, 1.0 if self.method == "dense" else None
        ratio = self.last("sparse.training_ratio") or ratio
        return dense * ratio if dense and ratio and self.is_complete else None

    def last(self, metric: str) -> float | None:
        """Return a metric of the last epoch that has it; None: no epoch has."""
        found = [data[metric] for _, data in sorted(self.epochs.items()) if metric in data]
        return found[-1] if found else None

    def by_epoch(self, metric: str) -> dict[int, float]:
        """Return a metric of all epochs that have it, in order.

        Raises:
            ValueError: None has; names the file.
        """
        found = {n: data[metric] for n, data in sorted(self.epochs.items()) if metric in data}
        if not found:
            raise ValueError(f"{self.path} has no epoch with {metric}")
        return found

    def values(self, metric: str) -> list[float]:
        """Return the values of `by_epoch`."""
        return list(self.by_epoch(metric).values())


def read_raport(path: Path) -> Run:
    """Read a raport file, which may be that of an interrupted, resumed or evaluated run.

    Raises:
        ValueError: One line: the file is missing or a line of it is no record.
    """
    parameters: dict[str, Any] = {}
    evaluates = False  # flags of an evaluation say nothing of the run
    epochs: dict[int, dict[str, float]] = {}
    within: dict[int, dict[str, float]] = {}  # the last values of records within an epoch
    for record in _records(path):
        step = record.get("step")
        if step == "PARAMETER":
            evaluates = record["data"].get("evaluate", evaluates)
            if not evaluates:
                start = {name: parameters[name] for name in _START if parameters.get(name)}
                parameters |= record["data"] | start
        elif isinstance(step, list) and len(step) == 1:
            epochs.setdefault(step[0], {}).update(record["data"])
        elif isinstance(step, list) and len(step) == 2:
            within.setdefault(step[0], {}).update(record["data"])
    return Run(path, parameters, {n: within.get(n, {}) | data for n, data in epochs.items()})


def find_raports(paths: Iterable[Path]) -> list[Path]:
    """Return raport files; a folder stands for all `*raport.json` in it and below.

    Raises:
        ValueError: A folder has none; names it.
    """
    found = []
    for path in paths:
        below = sorted(path.rglob("*raport.json")) if path.is_dir() else [path]
        if not below:
            raise ValueError(f"{path} has no file *raport.json: name the files of its runs")
        found += below
    return list(dict.fromkeys(found))


def _records(path: Path) -> Iterable[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        # a line that a crash cut off is the last of its session
        following = lines[number : number + 1]
        if record is None and following and '"PARAMETER"' not in following[0]:
            raise ValueError(f"{path}: line {number} is no record of a raport")
        if record is not None:
            yield record


def _record(line: str) -> dict[str, Any] | None:
    """Return what a line holds; None: it is no record, or not all of one."""
    try:
        record = json.loads(line.removeprefix("DLLL ")) if line.startswith("DLLL ") else None
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    needs_data = "step" in record
    return record if isinstance(record.get("data", None if needs_data else {}), dict) else None


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
    names = _differing(flags)
    return [_spell(f, names).removeprefix(", ") or "defaults" for f in flags]


def _differing(flags: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the flags in which experiments differ."""
    names = dict.fromkeys(name for of_group in flags for name in of_group)
    return [n for n in names if len({json.dumps(f.get(n)) for f in flags}) > 1]


def _spell(flags: Mapping[str, Any], names: Sequence[str]) -> str:
    return "".join(f", {n} {flags[n]}" for n in names if flags.get(n) is not None)


def table(groups: Sequence[Sequence[Run]], metric: str = "val.top1") -> str:
    """Return a Markdown table with a row per group.

    Args:
        groups: Result of `group`.
        metric: Metric of an epoch; "best" is its highest value, of a loss the lowest.

    Raises:
        ValueError: A run has no epoch with the metric.
    """
    best, digits = _style(metric)
    head = ["experiment", "runs", "epochs", f"{metric} last", "best", "sparsity", "images/s"]
    lines = ["| " + " | ".join([*head, "commit"]) + " |", "|" + "---|" * (len(head) + 1)]
    for label, runs in zip(labels(groups), groups, strict=True):
        series = [run.values(metric) for run in runs]
        cells = [
            label,
            str(len(runs)),
            _epochs(runs),
            _mean([values[-1] for values in series], digits),
            _mean([best(values) for values in series], digits),
            _mean(_last(runs, "sparse.sparsity"), 4),
            _mean(_last(runs, "train.total_ips"), 0),
            ", ".join(dict.fromkeys(str(r.parameters.get("git_commit", ""))[:10] for r in runs)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(groups: Sequence[Sequence[Run]], path: Path, metric: str = "val.top1") -> None:
    """Draw a metric over the epochs: the mean of each group and the range of its runs.

    An epoch is drawn if all runs of the group have it.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for label, runs in zip(labels(groups), groups, strict=True):
        series = [run.by_epoch(metric) for run in runs]
        shared = sorted(set.intersection(*map(set, series)))
        columns = [[values[epoch] for values in series] for epoch in shared]
        at = [epoch + 1 for epoch in shared]
        marker = "o" if len(at) == 1 else None  # a line of one point cannot be seen
        (line,) = axis.plot(at, [statistics.mean(c) for c in columns], marker=marker, label=label)
        lowest, highest = [min(c) for c in columns], [max(c) for c in columns]
        axis.fill_between(at, lowest, highest, color=line.get_color(), alpha=0.2, lw=0)
    axis.set(xlabel="epoch", ylabel=metric)
    axis.grid(alpha=0.25)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def comparison(groups: Sequence[Sequence[Run]], metric: str = "val.top1") -> str:
    """Return a Markdown table with a row per method and sparsity: accuracy and cost.

    Args:
        groups: Result of `group`.
        metric: As for `table`.

    Raises:
        ValueError: A run has no epoch with the metric.
    """
    best, digits = _style(metric)
    head = ["method", "sparsity", "runs", "epochs", f"{metric} last", "best", "training FLOPs"]
    head += ["of dense", "inference of dense"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for label, runs in _by_method(groups):
        series = [run.values(metric) for run in runs]
        flops = _known(run.training_flops for run in runs)
        dense = _known(run.dense_training_flops for run in runs)
        cells = [
            label,
            f"{_mean_last(runs, 'sparse.sparsity', 0.0):.4f}",
            str(len(runs)),
            _epochs(runs),
            _mean([values[-1] for values in series], digits),
            _mean([best(values) for values in series], digits),
            f"{statistics.mean(flops):.3e}" if flops else "",
            f"{statistics.mean(flops) / statistics.mean(dense):.3f}" if flops else "",
            f"{_mean_last(runs, 'sparse.inference_ratio', 1.0):.3f}" if dense else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_comparison(groups: Sequence[Sequence[Run]], path: Path, metric: str = "val.top1") -> None:
    """Draw the last value of a metric against the operations of training, a line per method.

    Bars are the sample standard deviation. Runs whose operations are not known are left out.

    Raises:
        ValueError: Of no run are they known.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for label, runs in _by_method(groups):
        if flops := _known(run.training_flops for run in runs):
            last = [run.values(metric)[-1] for run in runs]
            spread = statistics.stdev(last) if len(last) > 1 else 0.0
            point = statistics.mean(flops), statistics.mean(last), spread
            lines.setdefault(label, []).append(point)
    if not lines:
        raise ValueError(
            "--compare --plot: no run is complete and has its operations in the raport; "
            "leave out --plot"
        )
    for label, points in lines.items():
        x, y, spread_of = zip(*points, strict=True)
        axis.errorbar(x, y, yerr=spread_of, marker="o", capsize=3, label=label)
    axis.set(xlabel="training, FLOPs (multiplies + adds)", ylabel=metric, xscale="log")
    axis.grid(which="both", alpha=0.25)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _by_method(groups: Sequence[Sequence[Run]]) -> list[tuple[str, Sequence[Run]]]:
    """Name groups by their method, and by what else differs between groups of one method.

    Ordered by sparsity within a method. Its sparsity is no part of a name.
    """
    methods = dict.fromkeys(runs[0].method for runs in groups)
    found = []
    for method in methods:
        of_method = [runs for runs in groups if runs[0].method == method]
        of_method.sort(key=lambda runs: _mean_last(runs, "sparse.sparsity", 0.0))
        seen: dict[Any, int] = {}
        for runs in of_method:
            sparsity = runs[0].parameters.get("sparsity")
            seen[sparsity] = seen.get(sparsity, 0) + 1
        flags = [runs[0].experiment() for runs in of_method]
        names = _differing(flags) if max(seen.values()) > 1 else []
        names = [name for name in names if name not in ("sparsity", "dense_allocation")]
        found += [(f"{method}{_spell(f, names)}", r) for f, r in zip(flags, of_method, strict=True)]
    return found


def _known(numbers: Iterable[float | None]) -> list[float]:
    """Return the numbers; none if any of them is missing."""
    found = list(numbers)
    return [] if None in found else [number for number in found if number is not None]


def _last(runs: Sequence[Run], metric: str) -> list[float]:
    return [value for value in (run.last(metric) for run in runs) if value is not None]


def _mean_last(runs: Sequence[Run], metric: str, of_dense: float) -> float:
    return statistics.mean(_last(runs, metric) or [of_dense])


def _epochs(runs: Sequence[Run]) -> str:
    done = min(max(run.epochs, default=-1) + 1 for run in runs)
    wanted = runs[0].parameters.get("epochs", done)
    return str(done) if done == wanted else f"{done} of {wanted}"


def _style(metric: str) -> tuple[Callable[[Sequence[float]], float], int]:
    """Return what is best among values of a metric, and the digits that the log writes of it."""
    _, format = default_metadata(metric, FORMATS) or (None, ":.4f")
    digits = int(format.removeprefix(":.").removesuffix("f"))
    return (min if metric.endswith("loss") else max), digits


def _mean(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Turn finished runs into a table."""

    raports: list[Path] = argument(
        "raport files, or folders with some", nargs="+", metavar="RAPORT"
    )
    metric: str = flag("val.top1", "metric of an epoch")
    compare: bool = flag(False, "a row per method and sparsity: accuracy and training FLOPs")
    plot: Path | None = flag(
        None, "draw the metric over the epochs; with --compare over training FLOPs", metavar="PNG"
    )


def run(given: Flags) -> str:
    """Return the table, and draw the picture that is asked for.

    Raises:
        ValueError: A user's mistake, in one line.
    """
    groups = group(map(read_raport, find_raports(given.raports)))
    write, draw = (comparison, plot_comparison) if given.compare else (table, plot)
    text = write(groups, given.metric)
    if given.plot:
        draw(groups, given.plot, given.metric)
    return text


PROGRAM = Program("python -m cli.report", Flags, run)
main = PROGRAM.main


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
