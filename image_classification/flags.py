"""Command lines declared as dataclasses: a field made by `flag` or `argument` is a flag.

The field's annotation is the flag's type, its name is the flag's name and its key in a YAML file.
"""

import dataclasses
import difflib
import re
import types
import typing
from argparse import SUPPRESS, Action
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jsonargparse


def flag(
    default: Any,
    help: str,
    *names: str,
    switch: str | None = None,
    nargs: Literal["?", "*", "+"] | None = None,
    metavar: str | None = None,
    choices: Iterable[str] | None = None,
    positional: bool = False,
) -> Any:
    """Declare a command-line flag as a dataclass field.

    Args:
        default: Value without the flag. A bool makes a switch that stores its opposite.
        help: One line for `--help`.
        *names: Further spellings; the first is `--<field-name>` unless `switch` is given.
        switch: Spelling of a bool flag whose field is named for the opposite.
        nargs: "*" or "+" for a flag annotated as a list.
        metavar: Name of the value in `--help`.
        choices: Values that a text flag takes, such as the keys of a dict: they are asked for when
            the command line is parsed.
        positional: See `argument`.
    """
    metadata = {"default": default, "help": help, "names": names, "switch": switch, "nargs": nargs}
    metadata |= {"metavar": metavar, "choices": choices, "positional": positional}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def argument(help: str, default: Any = dataclasses.MISSING, **options: Any) -> Any:
    """Declare an argument that is known by its place; without a default it is required."""
    nargs = {} if default is dataclasses.MISSING else {"nargs": "?"}
    return flag(default, help, positional=True, **{**nargs, **options})


def spelling(name: str) -> str:
    """Return the flag of a field's name."""
    return "--" + name.replace("_", "-")


def parse(
    program: str,
    argv: Sequence[str],
    *sections: type,
    description: str,
    config_file: bool = False,
    version: str | None = None,
) -> list[Any]:
    """Return an instance of each of `sections`, made of a command line.

    Args:
        program: What the user types to start the program.
        argv: The command line.
        *sections: Dataclasses. A field that `flag` or `argument` made is a flag of that name.
            Each of several sections has a heading of its own in `--help`.
        description: Head of `--help`.
        config_file: Offer `--config FILE` and `--print_config`, too.
        version: Offer `--version`, which prints the program and this.

    Raises:
        ValueError: One line naming the flag and, where known, the remedy.
    """
    parser = jsonargparse.ArgumentParser(
        prog=program,
        description=description,
        exit_on_error=False,
        allow_abbrev=True,
        formatter_class=_Help,
        version=version,
    )
    if config_file:
        parser.add_argument("--config", action="config", help="YAML file of flags")
    for section in sections:
        hints = flag_types(section)
        group = parser.add_argument_group(section.__name__) if len(sections) > 1 else parser
        for field in dataclasses.fields(section):
            place = parser if field.metadata["positional"] else group
            _add(place, field, hints[field.name])
    try:
        values = vars(parser.parse_args(list(argv)))
    except UnicodeDecodeError as error:  # of the only file that is read here
        raise ValueError(f"--config: the file is no text in UTF-8: {error}") from error
    except Exception as error:  # jsonargparse raises many kinds; each is a user's mistake here
        raise ValueError(_one_line(str(error), parser)) from error
    return [kind(**{f.name: values[f.name] for f in dataclasses.fields(kind)}) for kind in sections]


def flag_types(section: type) -> dict[str, Any]:
    """Return the types of a dataclass's flags by field name, their choices resolved."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        if choices := field.metadata["choices"]:
            chosen: Any = Literal[tuple(choices)]
            optional = type(None) in _members(hints[field.name])
            hints[field.name] = chosen | None if optional else chosen
    return hints


class _Help(jsonargparse.DefaultHelpFormatter):
    """Help texts with their defaults; jsonargparse would add the types of Python, too."""

    def _get_help_string(self, action: Action) -> str:
        is_plain = isinstance(action.default, int | float | str | list)
        if not is_plain or isinstance(action.default, bool) or action.default in ([], SUPPRESS):
            return str(action.help)
        return f"{action.help} (default: %(default)s)"


def _add(place: Any, field: "dataclasses.Field[Any]", hint: Any) -> None:
    meta = field.metadata
    if hint is bool:
        action = "store_false" if meta["default"] else "store_true"
        place.add_argument(*_names(field), dest=field.name, action=action, help=meta["help"])
        return
    if meta["nargs"] in ("*", "+"):
        (hint,) = (typing.get_args(t)[0] for t in _members(hint) if typing.get_origin(t) is list)
    extra = {key: meta[key] for key in ("nargs", "metavar") if meta[key] is not None}
    for member in _members(hint):
        if typing.get_origin(member) is Literal:
            extra.setdefault("metavar", f"{{{','.join(typing.get_args(member))}}}")
    if meta["default"] is not dataclasses.MISSING:
        extra["default"] = meta["default"]
    if not meta["positional"]:
        extra["dest"] = field.name
    place.add_argument(*_names(field), type=hint, help=meta["help"], **extra)


def _names(field: "dataclasses.Field[Any]") -> list[str]:
    """Return a flag's spellings, short ones first, or the name of a positional argument."""
    if field.metadata["positional"]:
        return [field.name]
    names = (field.metadata["switch"] or spelling(field.name), *field.metadata["names"])
    return sorted(names, key=lambda name: name.startswith("--"))


def _members(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def _one_line(text: str, parser: jsonargparse.ArgumentParser) -> str:
    text = " ".join(text.split())
    # name the flag as it is typed, not the parser's key
    text = re.sub(r'Parser key "(\w+)"', lambda m: spelling(m[1]), text)
    known = [name for action in parser._actions for name in action.option_strings]
    for unknown in re.findall(r"--[\w-]+", text) if "unrecognized" in text else ():
        if close := difflib.get_close_matches(unknown, known, n=1):
            text += f" (did you mean {close[0]}?)"
    return text


def ineffective(config: Any, rules: Sequence[tuple[bool, str, str]]) -> list[str]:
    """Return a line for every flag that was changed from its default but has no effect.

    Args:
        config: A dataclass instance made of flags.
        rules: (has an effect, space-separated field names, what it would need) triples.
    """
    defaults = type(config)()
    return [
        f"{spelling(name)} has no effect without {need}"
        for effective, names, need in rules
        for name in names.split()
        if not effective and getattr(config, name) != getattr(defaults, name)
    ]
