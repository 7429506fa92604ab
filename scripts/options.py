"""Write docs/options.md, the table of main.py's flags: `python scripts/options.py`.

Everything is read from where the flags are declared: the dataclasses, whose comments head the
groups, and the table of the flags that each sparse method uses.
"""

import dataclasses
import inspect
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout

from cli.flags import METHOD_FLAGS, SparseFlags
from image_classification.config import RETIRED, Config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "options.md"
HEAD = """\
# Options of main.py

<!-- written by `python scripts/options.py`; help texts stand where the flags are declared -->

`python main.py DATA [flags]`, with `DATA/train/<class>/*` and `DATA/val/<class>/*`. This page has
every flag with all of its spellings; `python main.py --help` prints them too. Flags may be cut
short where that is unambiguous. `--config FILE` reads flags from a YAML file, in which they are
written with underscores; `--print_config` writes one. A flag that has no effect in the chosen
combination is refused, and so is a value out of range: one line, exit status 2. `--dry-run` shows
what a command line comes to.

The other programs explain themselves: `python costs.py --help`, and likewise `export.py`,
`classify.py`, `multiproc.py`, `python -m cli.convert` and
`python -m cli.report`.
"""
KINDS = {int: "integer", float: "number", str: "text"}


def groups(section: type) -> dict[str, list[str]]:
    """Return the names of a dataclass's fields under the comments that head them in its source."""
    found: dict[str, list[str]] = {"": []}
    for line in inspect.getsource(section).splitlines():
        if comment := re.match(r"    # (.+)", line):
            found[comment[1]] = []
        elif field := re.match(r"    (\w+):", line):
            list(found.values())[-1].append(field[1])
    return {head: names for head, names in found.items() if names}


def spellings(field: "dataclasses.Field[Any]") -> str:
    """Return a flag's spellings, the first one being what the documents use."""
    first = field.metadata["switch"] or "--" + field.name.replace("_", "-")
    return ", ".join(f"`{name}`" for name in (first, *field.metadata["names"]))


def values(hint: Any) -> str:
    """Return what a flag takes, in words."""
    if hint is bool:
        return "switch"
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = typing.get_args(hint) if is_union else (hint,)
    (kind,) = (k for k in kinds if k is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"{KINDS[typing.get_args(kind)[0]]} ..."
    return KINDS[kind]


def default(field: "dataclasses.Field[Any]") -> str:
    """Return a flag's default; nothing for a switch and for what is decided elsewhere."""
    value = field.metadata["default"]
    if value is None or isinstance(value, bool):
        return ""
    return f"`{' '.join(map(str, value)) if isinstance(value, list) else value}`"


def rows(section: type, names: list[str], *, methods: bool = False) -> list[str]:
    """Return a table of some flags; `methods` adds which sparse methods use them."""
    flags = (f for f in dataclasses.fields(section) if f.metadata)
    fields = {f.name: f for f in flags if not f.metadata["positional"]}
    hints = typing.get_type_hints(section)
    head = ["flag", "takes", "default", "meaning", *(["used by"] if methods else [])]
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in names:
        if name not in fields:
            continue
        field = fields[name]
        cells = [spellings(field), values(hints[name]), default(field)]
        cells.append(field.metadata["help"].replace("|", "\\|"))
        if methods:
            using = [method for method, used in METHOD_FLAGS.items() if name in used.split()]
            every = len(using) == len(METHOD_FLAGS) - 1
            cells.append("all but dense" if every else " ".join(using))
        table.append("| " + " | ".join(cells) + " |")
    return table


def page() -> str:
    """Return the whole page."""
    lines = [HEAD]
    for head, names in groups(Config).items():
        if head:  # DATA stands in front of the first
            lines += [f"## {head.capitalize()}", "", *rows(Config, names), ""]
    lines += ["## Sparsity", "", "[methods.md](methods.md) has the equations.", ""]
    names = [name for group in groups(SparseFlags).values() for name in group]
    lines += [*rows(SparseFlags, names, methods=True), ""]
    lines += [
        "## No longer there",
        "",
        "Refused flags of NVIDIA's harness and of the earlier port:",
    ]
    lines += ["", "| flag | instead |", "|---|---|"]
    lines += [f"| `{name}` | {remedy} |" for name, remedy in RETIRED.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
