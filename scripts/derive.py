"""Write what derives from flags and methods: `python scripts/derive.py`.

docs/options.md has the flags of main.py, README.md a table of the methods, sparse/factories.pyi
the signatures of their factories for editors and type checkers, and sparse/version.py the version.
Everything is read from where it is declared: the dataclasses of the flags, whose comments head the
groups, those of the methods, and the newest heading of CHANGELOG.md.
"""

import dataclasses
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout

from cli import flags as cli_flags
from cli.flags import sparse_flags, used_flags
from image_classification.config import RETIRED, Config
from image_classification.flags import flag_types
from sparse import METHODS, factories

ROOT = Path(__file__).resolve().parents[1]
HEAD = """\
# Options of main.py

<!-- written by `python scripts/derive.py`; help texts stand where the flags are declared -->

`python main.py DATA [flags]`, with `DATA/train/<class>/*` and `DATA/val/<class>/*`. This page has
every flag with all of its spellings; `python main.py --help` prints them too. Flags may be cut
short where that is unambiguous. `--config FILE` reads flags from a YAML file, in which they are
written with underscores; `--print_config` writes one. A flag that has no effect in the chosen
combination is refused, and so is a value out of range: one line, exit status 2. `--dry-run` shows
what a command line comes to.

The other programs explain themselves: `python costs.py --help`, and likewise `export.py`,
`classify.py`, `multiproc.py`, `python -m cli.convert`, `python -m cli.combine` and
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
    hints = flag_types(section)
    head = ["flag", "takes", "default", "meaning", *(["used by"] if methods else [])]
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in names:
        if name not in fields:
            continue
        field = fields[name]
        cells = [spellings(field), values(hints[name]), default(field)]
        cells.append(field.metadata["help"].replace("|", "\\|"))
        if methods:
            using = [method for method in METHODS if name in used_flags(method)]
            cells.append("all but dense" if len(using) == len(METHODS) else " ".join(using))
        table.append("| " + " | ".join(cells) + " |")
    return table


def options() -> str:
    """Return docs/options.md."""
    lines = [HEAD]
    for head, names in groups(Config).items():
        if head:  # DATA stands in front of the first
            lines += [f"## {head.capitalize()}", "", *rows(Config, names), ""]
    lines += ["## Sparsity", "", "[methods.md](methods.md) has the equations.", ""]
    flags = sparse_flags()
    names = [field.name for field in dataclasses.fields(flags)]
    lines += [*rows(flags, names, methods=True), ""]
    lines += [
        "## No longer there",
        "",
        "Refused flags of NVIDIA's harness and of the earlier port:",
    ]
    lines += ["", "| flag | instead |", "|---|---|"]
    lines += [f"| `{name}` | {remedy} |" for name, remedy in (RETIRED | cli_flags.RETIRED).items()]
    return "\n".join(lines) + "\n"


def readme() -> str:
    """Return README.md with the table of the methods."""
    head = "| method | call | paper |"
    lines = (ROOT / "README.md").read_text().split("\n")
    begin = lines.index(head)
    end = next(i for i in range(begin, len(lines)) if not lines[i].startswith("|"))
    table = [f"| {m.title} | `sparse.{m.name}` | {m.paper} |" for m in METHODS.values()]
    return "\n".join([*lines[:begin], head, "|---|---|---|", *table, *lines[end:]])


def stub() -> str:
    """Return sparse/factories.pyi."""
    known = "\n".join(f'    "{name}",' for name in METHODS)
    functions = [_function(name, getattr(factories, name)) for name in METHODS]
    return STUB + f"\n__all__ = [\n{known}\n]\n\n" + "\n".join(functions)


STUB = """\
# Written by `python scripts/derive.py` from the records of the methods.

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from .training.sparsifier import Sparsifier
"""


def _function(name: str, factory: Callable[..., Any]) -> str:
    lines = [f"def {name}("]
    for parameter in inspect.signature(factory).parameters.values():
        if parameter.name == "optimizer":
            lines += ["    optimizer: Optimizer,", "    *,"]
            continue
        default = parameter.default
        value = "" if default is parameter.empty else f" = {_literal(default)}"
        lines.append(f"    {parameter.name}: {_annotation(parameter.annotation)}{value},")
    doc = []
    for line in inspect.cleandoc(factory.__doc__ or "").split("\n"):
        deeper = "    " + " " * (len(line) - len(line.lstrip()))
        doc += textwrap.wrap(
            line,
            100,
            initial_indent="    ",
            subsequent_indent=deeper + "    ",
            drop_whitespace=True,
            replace_whitespace=False,
        ) or [""]
    doc[0] = f'    """{doc[0].strip()}'
    return "\n".join([*lines, ") -> Sparsifier:", *doc, '    """', ""])


def _literal(value: Any) -> str:
    if value is ...:
        return "..."
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _annotation(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return f"Literal[{', '.join(map(_literal, typing.get_args(hint)))}]"
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " | ".join(map(_annotation, typing.get_args(hint)))
    if isinstance(hint, str):
        return hint
    if hint is type(None):
        return "None"
    if hint is nn.Module:
        return "nn.Module"
    if arguments := typing.get_args(hint):
        return f"{hint.__origin__.__name__}[{', '.join(map(_annotation, arguments))}]"
    return str(hint.__name__)


def version() -> str:
    """Return sparse/version.py: the newest version of the change log.

    A heading is "## 1.2.0 (2030-01-31)", or "## 1.2.0 (unreleased)", which is version 1.2.0.dev0.
    """
    text = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (.*)$", text, re.MULTILINE)
    parts = newest and re.fullmatch(r"(\d+\.\d+\.\d+) \((unreleased|\d{4}-\d\d-\d\d)\)", newest[1])
    if not parts:
        raise ValueError(f"CHANGELOG.md: the newest heading is no version and date: {newest}")
    number = parts[1] + (".dev0" if parts[2] == "unreleased" else "")
    return f'''\
"""The version. Written by `python scripts/derive.py` from the newest heading of CHANGELOG.md."""

__version__ = "{number}"
'''


def derived() -> dict[Path, str]:
    """Return what each file has to contain."""
    return {
        ROOT / "docs" / "options.md": options(),
        ROOT / "README.md": readme(),
        ROOT / "sparse" / "factories.pyi": stub(),
        ROOT / "sparse" / "version.py": version(),
    }


def main() -> None:
    """Write the files."""
    for path, content in derived().items():
        path.write_text(content)


if __name__ == "__main__":
    main()
