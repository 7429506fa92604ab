"""Write what follows from results/table.csv: `python scripts/rows.py`.

A row of the table is one line. This program fills in the costs that we compute, and writes the
script of each row and the tables of results/README.md. A new line may leave the computed columns
(`COMPUTED`) empty.
"""

import csv
import re
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout

import costs
from results import published

ROOT = Path(__file__).resolve().parents[1]
COMPUTED = ("train", "inference", "size", "overall_sparsity")

Row = Mapping[str, str]

ARCHES = {"resnet50": "ResNet-50", "mobilenet_v1": "MobileNet-v1"}
PUBLISHERS = {"rigl": "RigL", "port": "the earlier port"}
METHODS = {
    "static": "A random mask that never changes",
    "set": "SET (random growth)",
    "rigl": "RigL",
    "snfs": "SNFS (momentum growth, redistribution)",
    "snip": "SNIP (mask from the first gradient)",
    "gmp": "Gradual magnitude pruning from dense",
}
DISTRIBUTIONS = {"erk": "ERK", "er": "ER", "uniform": "uniform"}


def percent(share: str, digits: int = 1) -> str:
    """Return a share as a percentage without trailing zeros."""
    return f"{round(100 * float(share), digits):.10g}%"


def title(row: Row) -> str:
    """Return what a row trains and the accuracy that was published for it, in one line."""
    parts = []
    if row["method"] == "dense":
        parts = [f"Dense {ARCHES[row['arch']]}"]
    else:
        if row["arch"] != "resnet50":
            parts = [ARCHES[row["arch"]]]
        parts += [METHODS.get(row["method"], row["method"]), DISTRIBUTIONS[row["distribution"]]]
        parts += [f"{percent(row['sparsity'])} sparse"]
    by_length = row["recipe"] == "rigl"
    parts += [f"{row['length']}x training" if by_length else f"{row['epochs']} epochs"]
    if float(row["label_smoothing"]) == 0:
        parts += ["no label smoothing"]
    if row["published_top1"]:
        publisher = PUBLISHERS[row["source"]]
        result = f". Top-1 published by {publisher}: {row['published_top1']}."
    else:
        result = ": a baseline."
    return ", ".join(parts) + result


def dense_layers(row: Row) -> list[str]:
    """Return a line that says which layers of a sparse row are dense, if there are any."""
    layers = row["dense_layers"].split()
    if not layers:
        return []
    if row["arch"] == "mobilenet_v1":
        layers.append("the depthwise kernels")
    verb = "is" if len(layers) == 1 else "are"
    return [
        f"{' and '.join(layers)} {verb} dense. The rest is {percent(row['sparsity'])} sparse: "
        f"{percent(row['overall_sparsity'], 2)} of all weights are zero."
    ]


def flags(row: Row) -> list[str]:
    """Return the flags of a row with their values."""
    found = [f"--epochs {row['epochs']}", f"--label-smoothing {row['label_smoothing']}"]
    if row["method"] != "dense":
        names = {"sparse-method": "method", "distribution": "distribution", "sparsity": "sparsity"}
        found += [f"--{flag} {row[column]}" for flag, column in names.items()]
    found += ["--" + entry.replace("=", " ") for entry in row["schedule"].split()]
    if row["dense_layers"]:
        found += [f"--dense-layers {row['dense_layers']}"]
    return found


def wrap(words: list[str]) -> list[str]:
    """Return words in lines of the usual width; a flag and its values stay together."""
    text = " ".join(word.replace(" ", "\0") for word in words)
    lines = textwrap.wrap(text, width=92, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def script(row: Row) -> str:
    """Return the script of a row."""
    path = Path(row["script"])
    recipe = "../" * (len(path.parts) - 2) + f"recipes/{row['recipe']}.sh"
    arguments = [path.stem, row["optimizer_batch_size"], row["arch"]]
    if row["recipe"] == "rigl":
        arguments += [row["length"]]
    origin = "Written by scripts/rows.py from results/table.csv."
    call = f'exec bash "$(dirname "${{BASH_SOURCE[0]}}")/{recipe}" {" ".join(arguments)}'
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *(f"# {line}" for line in (title(row), *dense_layers(row), origin)),
            "set -euo pipefail",
            " \\\n    ".join([call, *wrap([*flags(row), '"$@"'])]),
            "",
        ]
    )


def computed(row: Row) -> dict[str, str]:
    """Return the columns of a row that we compute."""
    report = published.row_report(costs.report_network, row)
    found = {name: f"{value:.6g}" for name, value in published.figures(report, row).items()}
    return {**found, "overall_sparsity": f"{report['overall_sparsity']:.6f}"}


def page(text: str) -> str:
    """Return results/README.md with its tables replaced by those of costs.py."""
    for source in ("rigl", "port"):
        table = published.table(source, costs.report_network)
        heading = rf"(## .*`python costs\.py --table {source}`.*\n\n)"
        paragraph = r"(?:.+\n)+"  # one of the table, one of its legend
        pattern = rf"{heading}{paragraph}\n{paragraph}"
        text, found = re.subn(pattern, lambda m, t=table: f"{m[1]}{t}\n", text)
        assert found == 1, f"results/README.md has no heading for the table of {source}"
    return text


def main() -> None:
    """Write the table, the scripts and the page."""
    rows = [{**row, **computed(row)} for row in published.read_rows()]
    with published.ROWS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        (ROOT / row["script"]).write_text(script(row))
    readme = ROOT / "results/README.md"
    readme.write_text(page(readme.read_text()))


if __name__ == "__main__":
    main()
