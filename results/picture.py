"""The picture of the published rows: accuracy against inference and training cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from results.published import ReportNetwork, notes, read_rows, row_report, schedule, training_flops

COLORS = {
    ("rigl", "resnet50", "erk"): ("tab:blue", "ResNet-50, ERK (RigL)"),
    ("rigl", "resnet50", "uniform"): ("tab:orange", "ResNet-50, uniform (RigL)"),
    ("port", "resnet50", "erk"): ("tab:green", "ResNet-50, ERK (port)"),
    ("port", "resnet50", "uniform"): ("tab:red", "ResNet-50, uniform (port)"),
    ("rigl", "mobilenet_v1", "erk"): ("tab:purple", "MobileNet-v1, ERK (RigL)"),
    ("rigl", "mobilenet_v1", "uniform"): ("tab:brown", "MobileNet-v1, uniform (RigL)"),
    ("acdc", "resnet50", "uniform"): ("tab:pink", "ResNet-50, uniform (AC/DC)"),
    ("gap", "resnet50", "uniform"): ("tab:cyan", "ResNet-50, uniform (GaP)"),
    ("srigl", "resnet50", "erk"): ("tab:olive", "ResNet-50, ERK (SRigL)"),
    ("rigl", "resnet50", ""): ("black", "dense ResNet-50"),
    ("rigl", "mobilenet_v1", ""): ("dimgray", "dense MobileNet-v1"),
}
LENGTHS, SHAPES = ("1", "2", "5", "9.9", "10", "12", "40", "50", "100"), "opsX^DvP*"
MARKERS = dict(zip(LENGTHS, SHAPES, strict=True))
"""Training length in units of the dense run's."""


def plot(path: Path, report: ReportNetwork) -> None:
    """Draw published top-1 against our inference and training FLOPs, one panel each.

    Rows that differ in their sparsity alone are joined. Hollow: without label smoothing. Rows whose
    costs depend on training, or whose distribution is not the published one, are left out.

    Args:
        path: Where to write; the suffix chooses the format.
        report: As for `results.published.table`.
    """
    figure = Figure(figsize=(12, 6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    rows = [row for row in read_rows() if row["published_top1"] and _series(row)[:3] in COLORS]
    rows = [row for row in rows if notes(row).get("top1") != "h"]
    reports = {row["script"]: row_report(report, row) for row in rows}
    for row in rows:  # joined in the order of sparsity
        same = [r for r in rows if _series(r) == _series(row)]
        if row is same[0]:
            same.sort(key=lambda r: float(r["sparsity"]))
            top1 = [float(r["published_top1"]) for r in same]
            flops = [_costs(reports[r["script"]], r) for r in same]
            for axis, x in zip(panels, zip(*flops, strict=True), strict=True):
                axis.plot(x, top1, **_style(row))
                if _series(row) == ("rigl", "resnet50", "erk", "5", "0.1", ""):
                    _name_points(axis, same, x, top1)
    panels[0].set(xlabel="inference, $10^9$ FLOPs per image (multiplies + adds)", ylabel="top-1, %")
    panels[1].set(xlabel="training, $10^{18}$ FLOPs (multiplies + adds)")
    for axis in panels:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(which="both", alpha=0.2)
    colors = [Line2D([], [], color=c, marker="o", label=text) for c, text in COLORS.values()]
    lengths = [
        Line2D([], [], color="gray", marker=m, ls="", label=f"{n}x training")
        for n, m in MARKERS.items()
    ]
    hollow = Line2D([], [], color="gray", marker="o", mfc="none", ls="", label="no label smoothing")
    dotted = Line2D([], [], color="gray", ls=":", label="without ablation")
    figure.legend(handles=[*colors, *lengths, hollow, dotted], loc="outside lower center", ncols=4)
    figure.suptitle("Published top-1 on ImageNet against cost (published counting, computed here)")
    figure.savefig(path, dpi=120)


def _series(row: Mapping[str, str]) -> tuple[str, ...]:
    names = "source", "arch", "distribution", "length", "label_smoothing"
    return (*(row[name] for name in names), str(schedule(row).get("min_salient", "")))


def _costs(report: Mapping[str, Any], row: Mapping[str, str]) -> tuple[float, float]:
    return report["inference_flops"] / 1e9, training_flops(report, row) / 1e18


def _style(row: Mapping[str, str]) -> dict[str, Any]:
    color, _ = COLORS[row["source"], row["arch"], row["distribution"]]
    fill = "none" if row["label_smoothing"] == "0.0" else color
    line = ":" if schedule(row).get("min_salient") == 0 else "-"
    return {
        "color": color,
        "ls": line,
        "marker": MARKERS[row["length"]],
        "mfc": fill,
        "lw": 1,
        "ms": 6,
    }


def _name_points(
    axis: Axes, rows: list[dict[str, str]], x: Sequence[float], y: list[float]
) -> None:
    for row, position in zip(rows, zip(x, y, strict=True), strict=True):
        axis.annotate(
            f"{float(row['sparsity']):.1%}".replace(".0%", "%"),
            position,
            xytext=(6, -11),
            textcoords="offset points",
            fontsize="small",
        )
