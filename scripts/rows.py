"""Write what follows from results/table.csv: `python scripts/rows.py`.

A row of the table is one line. This program fills in the costs that we compute, and writes the
script of each row and the tables of results/README.md. A new line may leave the computed columns
(`COMPUTED`) empty.
"""

import csv
import re
import shlex
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
PUBLISHERS = {
    "rigl": "RigL",
    "port": "the earlier port",
    "acdc": "AC/DC",
    "gap": "GaP",
    "granet": "GraNet",
    "srigl": "SRigL",
}
UNPUBLISHED = {
    "ours": ": a baseline.",
    "granet": ". No accuracy is quoted (docs/reproducing.md).",
    "compare": ", recipe of the port.",
}
METHODS = {
    "static": "A random mask that never changes",
    "set": "SET (random growth)",
    "rigl": "RigL",
    "snfs": "SNFS (momentum growth, redistribution)",
    "snip": "SNIP (mask from the first gradient)",
    "gmp": "Gradual magnitude pruning from dense",
    "acdc": "AC/DC",
    "gap": "GaP, cyclic",
    "granet": "GraNet",
    "srigl": "SRigL",
}
DISTRIBUTIONS = {"erk": "ERK", "er": "ER", "uniform": "uniform"}
TABLES = [*PUBLISHERS, "compare"]


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
        parts += [METHODS.get(row["method"], row["method"]), *variant(row)]
        parts += [f"{percent(row['sparsity'])} sparse"]
    by_length = row["recipe"] == "rigl"
    parts += [f"{row['length']}x training" if by_length else f"{row['epochs']} epochs"]
    if by_length and float(row["label_smoothing"]) == 0:
        parts += ["no label smoothing"]
    if row["published_top1"]:
        publisher = PUBLISHERS[row["source"]]
        result = f". Top-1 published by {publisher}: {row['published_top1']}."
    else:
        result = UNPUBLISHED[row["source"]]
    return ", ".join(parts) + result


def variant(row: Row) -> list[str]:
    """Return which form of a method a row has, and how sparsity is spread."""
    found, settings = [], published.schedule(row)
    if "initial_sparsity" in settings:
        first = settings["initial_sparsity"]
        found += [f"from {percent(first)} sparse by ERK" if first else "from dense"]
    if settings.get("min_salient") == 0:
        found += ["without ablation"]
    if settings.get("scope") == "global":
        found += ["all layers together"]
    return [*found, *(DISTRIBUTIONS[name] for name in [row["distribution"]] if name)]


def remarks(row: Row) -> list[str]:
    """Return a line that says what is to be known of the published accuracy, if anything is."""
    letter = published.notes(row).get("top1")
    return [f"{row['published_top1']} is {published.REASONS[letter]}."] if letter else []


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
        found += [f"--{flag} {row[column]}" for flag, column in names.items() if row[column]]
    for entry in row["schedule"].split():
        flag, _, text = entry.partition("=")
        found += [f"--{flag} {shlex.join(text.split('|'))}"]
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
    name = path.relative_to("scripts").with_suffix("")
    arguments = [str(name), row["optimizer_batch_size"], row["arch"]]
    if row["recipe"] == "rigl":
        arguments = [path.stem, *arguments[1:], row["length"]]
    origin = "Written by scripts/rows.py from results/table.csv."
    call = f'exec bash "$(dirname "${{BASH_SOURCE[0]}}")/{recipe}" {" ".join(arguments)}'
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *(f"# {line}" for line in (title(row), *remarks(row), *dense_layers(row), origin)),
            "set -euo pipefail",
            " \\\n    ".join([call, *wrap([*flags(row), '"$@"'])]),
            "",
        ]
    )


def computed(row: Row) -> dict[str, str]:
    """Return the columns of a row that we compute."""
    report = published.row_report(costs.report_network, row)
    values = published.figures(report, row)
    found = {name: "" if value is None else f"{value:.6g}" for name, value in values.items()}
    return {**found, "overall_sparsity": f"{report['overall_sparsity']:.6f}"}


def page(text: str) -> str:
    """Return results/README.md with its tables replaced by those of costs.py."""
    for source in TABLES:
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
        (ROOT / row["script"]).parent.mkdir(exist_ok=True)
        (ROOT / row["script"]).write_text(script(row))
    readme = ROOT / "results/README.md"
    readme.write_text(page(readme.read_text()))


if __name__ == "__main__":
    main()
