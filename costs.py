"""Cost of sparse networks: `python costs.py --arch resnet50 --distribution erk --sparsity 0.9`.

Prints FLOPs, training FLOPs and bytes per layer and in total; `--table` sets the published tables
beside our own figures, `--plot` draws accuracy against cost.
"""

from image_classification import versions

if __name__ == "__main__":
    versions.require()

import functools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import sparse
from cli.flags import find_method
from cli.program import Program
from image_classification import models
from image_classification.flags import flag
from sparse import costs
from sparse.methods.settings import settings_of
from sparse.topology.distributions import layer_sparsities


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Cost of sparse networks."""

    arch: str = flag("resnet50", "as main.py --arch")
    image_size: int | None = flag(None, "side of the input (the model's own)")
    num_classes: int = flag(1000, "length of the logits")
    distribution: Literal["uniform", "er", "erk"] = flag("erk", "how sparsity is spread")
    sparsity: float = flag(0.0, "fraction of zeros, in [0, 1)")
    dense_layers: list[str] | None = flag(
        None, "layers kept dense (uniform: the first)", nargs="*", metavar="GLOB"
    )
    method: str | None = flag(None, "of training, as main.py --sparse-method (rigl, or dense)")
    delta_t: int = flag(100, "rigl: steps between updates")
    multiplier: float = flag(1.0, "training length")
    prune_start: int = flag(10_000, "gmp: first step of the ramp")
    prune_end: int = flag(25_000, "gmp: end of the ramp")
    prune_every: int = flag(1_000, "gmp: steps between prunings")
    total_steps: int = flag(32_000, "gmp: steps at length 1")
    convention: costs.Convention = flag("published", "how to count")
    rounding: Literal["floor", "ceil"] = flag("floor", "of ERK's budget; ceil: 2019")
    json: bool = flag(False, "print the report as one JSON object")
    table: Literal["rigl", "port"] | None = flag(None, "print published rows beside our figures")
    plot: Path | None = flag(None, "draw the published rows: accuracy against cost", metavar="PNG")


def run(args: Flags) -> str:
    """Return what the command line asks for.

    Raises:
        ValueError: A user's mistake, in one line.
    """
    if args.table or args.plot:
        return show_published(args)
    report = report_flags(args)
    return json.dumps(report) if args.json else format_report(report)


PROGRAM = Program("costs.py", Flags, run)
main = PROGRAM.main


def show_published(args: Flags) -> str:
    """Return the published rows as a table and draw them, as the flags ask for.

    Raises:
        ValueError: The rows are not there; one line.
    """
    try:  # in a container a folder for results may be mounted over them
        from results import picture, published
    except ImportError as error:
        raise ValueError(
            f"--table and --plot read results/ of the checkout, which is not there ({error}); "
            "in a container, mount it"
        ) from error
    if args.plot:
        picture.plot(args.plot, report_network)
    if args.table is None:
        return ""
    return published.table(args.table, report_network, rounding=args.rounding)


def report_flags(args: Flags) -> dict[str, Any]:
    """Return the costs that the flags ask for.

    Raises:
        ValueError: A value out of range or a contradiction; one line.
    """
    method = args.method or ("rigl" if args.sparsity else "dense")
    if (method == "dense") != (args.sparsity == 0):
        raise ValueError(f"--method {method} does not go with --sparsity {args.sparsity}")
    if args.multiplier <= 0:
        raise ValueError(f"--multiplier must be above 0, got {args.multiplier}")
    stretched = "prune_start", "prune_end", "total_steps"  # with the run
    steps = {name: round(getattr(args, name) * args.multiplier) for name in stretched}
    return report_network(
        args.arch,
        image_size=args.image_size,
        num_classes=args.num_classes,
        sparsity=args.sparsity,
        distribution=args.distribution,
        dense_layers=args.dense_layers,
        rounding=args.rounding,
        method=method,
        settings={"delta_t": args.delta_t, "prune_every": args.prune_every, **steps},
        convention=args.convention,
        multiplier=args.multiplier,
        total_steps=steps["total_steps"],
    )


def report_network(
    arch: str,
    *,
    image_size: int | None = None,
    num_classes: int = 1000,
    sparsity: float = 0.0,
    distribution: str = "erk",
    dense_layers: Sequence[str] | None = None,
    rounding: str = "floor",
    reshaped: Mapping[str, tuple[int, ...]] | None = None,
    method: str = "dense",
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return `sparse.costs.report` of an architecture at a sparsity.

    Args:
        arch: A name that `image_classification.models` knows.
        image_size: Side of the input; the architecture's own by default.
        num_classes: Length of the logits.
        sparsity, distribution, dense_layers, rounding: As for `sparse.allocate`.
        reshaped: Shapes to give to the distribution in place of a layer's own.
        method: Of training, as main.py --sparse-method.
        settings: Of the method; those that it does not have are passed over.
        **options: Further arguments of `sparse.costs.report`.
    """
    layers, shapes = _trace(arch, image_size, num_classes)
    if method != "dense":
        options["method"] = _method(method, {"sparsity": sparsity, **(settings or {})})
    if sparsity == 0:
        return costs.report(layers, **options)
    solved = layer_sparsities(
        {**shapes, **(reshaped or {})},
        sparsity=sparsity,
        distribution=distribution,
        dense_layers=dense_layers,
        rounding=rounding,
    )
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return costs.report(
        layers,
        {name: 1 - zeros for name, zeros in solved.items()},
        num_active={n: sizes[n] - math.floor(zeros * sizes[n]) for n, zeros in solved.items()},
        **options,
    )


def _method(name: str, settings: Mapping[str, Any]) -> sparse.Allocated:
    """Return a method of which only the costs are asked."""
    method = find_method(name)
    given = {}
    for key, known in settings_of(method).items():
        if key in settings:
            given[key] = settings[key]
        elif known.is_end:
            given[key] = settings["total_steps"]
    return method(**given)


@functools.cache
def _trace(
    arch: str, image_size: int | None, num_classes: int
) -> tuple[list[costs.LayerCost], dict[str, tuple[int, ...]]]:
    with torch.device("meta"):
        model = models.create_model(arch, num_classes=num_classes)
    side = image_size or models.default_image_size(arch)
    models.check_image_size(model, arch, side)
    layers = costs.trace_layers(model, side)
    return layers, {name: tuple(p.shape) for name, p in sparse.prunable(model).items()}


def format_report(report: Mapping[str, Any]) -> str:
    """Return the report as text."""
    width = max(len(layer["name"]) for layer in report["layers"])
    unit = "MMACs" if report["convention"] == "macs" else "MFLOPs"
    lines = [
        f"{'':{width}}  {'weights':>10}  {'active':>10}  {'density':>7}  {'dense':>9}  "
        f"{'sparse':>9}  {'size':>9}",
        f"{'layer':{width}}  {'':10}  {'':10}  {'':7}  {unit:>9}  {unit:>9}  {'kB':>9}",
    ]
    lines += [
        f"{x['name']:{width}}  {x['num_weights']:10,}  {x['num_active']:10,}  {x['density']:7.4f}"
        f"  {x['dense_flops'] / 1e6:9.2f}  {x['flops'] / 1e6:9.2f}  {x['size_bytes'] / 1e3:9.1f}"
        for x in report["layers"]
    ]
    ops = "multiply-accumulates" if unit == "MMACs" else "FLOPs (multiplies + adds)"
    lines += [
        "",
        f"inference   {report['inference_flops']:.4e} {ops}, {report['inference_ratio']:.4f} of "
        f"dense; {report['macs']:.4e} multiply-accumulates",
        f"training    {report['training_ratio']:.4f} of a dense run of length 1",
        f"size        {report['size_mb']:.3f} MB, dense {report['dense_size_mb']:.3f} MB",
        f"sparsity    {report['overall_sparsity']:.4f} over all layers",
        f"convention  {report['convention']}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
