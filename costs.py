"""Cost of sparse networks: `python costs.py --arch resnet50 --distribution erk --sparsity 0.9`.

Prints FLOPs, training FLOPs and bytes per layer and in total; `--table` sets the published tables
beside our own figures, `--plot` draws accuracy against cost.
"""

from image_classification import versions

if __name__ == "__main__":
    versions.require()

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cli.architecture_costs import format_report, report_network
from cli.program import Program
from image_classification.flags import flag
from sparse import costs


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
    include: list[str] | None = flag(
        None, "further weights to make sparse", nargs="*", metavar="GLOB"
    )
    block: list[int] | None = flag(
        None, "outputs and inputs that are active together: 1 4", nargs="*"
    )
    method: str | None = flag(None, "of training, as main.py --sparse-method (rigl, or dense)")
    delta_t: int = flag(100, "rigl, granet and srigl: steps between updates")
    multiplier: float = flag(1.0, "training length")
    prune_start: int = flag(10_000, "gmp: first step of the ramp")
    prune_end: int = flag(25_000, "gmp and granet: end of the ramp")
    prune_every: int = flag(1_000, "gmp: steps between prunings")
    total_steps: int = flag(32_000, "gmp, granet, acdc and gap: steps at length 1")
    epochs: int = flag(100, "acdc and gap: epochs at length 1")
    convention: costs.Convention = flag("published", "how to count")
    rounding: Literal["floor", "ceil"] = flag("floor", "of ERK's budget; ceil: 2019")
    json: bool = flag(False, "print the report as one JSON object")
    table: Literal["rigl", "port", "acdc", "gap", "granet", "srigl", "compare"] | None = flag(
        None, "print published rows beside our figures; compare: methods under one recipe"
    )
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
    if method == "dense" and args.block:
        raise ValueError("--block has no effect with --method dense: leave it out")
    if args.multiplier <= 0:
        raise ValueError(f"--multiplier must be above 0, got {args.multiplier}")
    stretched = "prune_start", "prune_end", "total_steps", "epochs"  # with the run
    steps = {name: round(getattr(args, name) * args.multiplier) for name in stretched}
    return report_network(
        args.arch,
        image_size=args.image_size,
        num_classes=args.num_classes,
        sparsity=args.sparsity,
        distribution=args.distribution,
        dense_layers=args.dense_layers,
        include=args.include,
        rounding=args.rounding,
        method=method,
        block=args.block,
        settings={"delta_t": args.delta_t, "prune_every": args.prune_every, **steps},
        convention=args.convention,
        multiplier=args.multiplier,
        total_steps=steps["total_steps"],
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
