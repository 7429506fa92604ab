"""The sparse flags of main.py, derived from the methods' settings, and the methods they give."""

import argparse
import dataclasses
import importlib
import inspect
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import yaml

from image_classification.config import Config
from image_classification.flags import flag, ineffective, spelling
from sparse import METHODS, Allocated
from sparse.methods.beginning import begin_with
from sparse.methods.settings import Setting, settings_of


@dataclass(frozen=True, kw_only=True)
class SparseFlags:
    """How the network is made and kept sparse; `sparse_flags` adds the methods' settings."""

    sparse_method: str | None = flag(
        None,
        f"how the network becomes sparse: dense (default), {', '.join(METHODS)}, or a class of "
        "your own, package.module:Class",
    )
    static_topo: int = flag(0, "1: --sparse-method static (spelling of the earlier port)")
    dense_allocation: float | None = flag(None, "1 - sparsity (spelling of the earlier port)")
    t_end_fraction: float = flag(
        0.75, "share of all steps after which the topology is frozen", "--T-end-percent"
    )
    from_sparse: str | None = flag(
        None,
        "checkpoint or compact file whose weights and masks training starts from: kept by static, "
        "moved by set, rigl, snfs, srigl and gap, pruned further by gmp, snip and granet",
    )
    drop_masks: bool = flag(
        False,
        "take the weights of a sparse --resume or --pretrained-from-file without its masks",
    )
    grad_compress: Literal["none", "active", "bf16", "active+bf16"] = flag(
        "none", "what several processes send of their gradients: active weights only, or bfloat16"
    )


RETIRED = {  # flags of the earlier port that are refused -> what to use instead
    "--grad-accumulation-n": "growth always uses the gradient of the whole optimizer batch",
    "--T-end-epochs": "use --t-end-fraction",
}
SPELLINGS = {  # further spellings of settings, those of the earlier port
    "distribution": ("--sp-distribution",),
    "power_scale": ("--erk-power-scale",),
    "delta_t": ("--delta",),
    "drop_fraction": ("--alpha",),
    "scope": ("--snip-scope", "--gmp-scope"),
}


def sparse_flags(methods: Iterable[type[Allocated]] = METHODS.values()) -> type[SparseFlags]:
    """Return `SparseFlags` with a flag for every setting of some methods.

    A setting that several methods have is one flag. Its default is None where theirs differ, or
    where the setting must be given.
    """
    found: dict[str, dict[str, Setting]] = {}
    for method in methods:
        for name, known in settings_of(method).items():
            found.setdefault(name, {})[method.name if hasattr(method, "name") else ""] = known
    shared = {name: _shared(known) for name, known in found.items()}
    declared = [(flag_name(name, known), *_declare(name, known)) for name, known in shared.items()]
    return dataclasses.make_dataclass(
        "SparseFlags", declared, bases=(SparseFlags,), frozen=True, kw_only=True
    )


def _shared(users: Mapping[str, Setting]) -> Setting:
    """Return the setting that stands for those of several methods: what most of them say first."""
    known = list(users.values())[-1]
    alike = all(other.default == known.default for other in users.values())
    texts: dict[str, list[str]] = {}
    for method, other in users.items():
        text = _help(other)
        if not alike and other.default is not None and "by default" not in text:
            text += f"; by default {other.default}"
        texts.setdefault(text, []).append(method)
    most, *others = sorted(texts, key=lambda text: -len(texts[text]))
    help = "; ".join([most, *(f"{', '.join(texts[text])}: {text}" for text in others)])
    return dataclasses.replace(known, help=help, default=known.default if alike else None)


def _help(known: Setting) -> str:
    """Return what a setting means, and what it is in a run where it is not given."""
    if known.epochs is not None:
        return known.help.replace("optimizer steps", "epochs")
    if known.is_end:
        return f"{known.help}; by default --t-end-fraction of all steps"
    if known.share is not None:
        part = "all steps" if known.share == 1.0 else f"{known.share} of all steps"
        return f"{known.help}; by default {part}"
    return known.help


def flag_name(name: str, known: Setting) -> str:
    """Return the name of the flag of a setting."""
    return name if known.epochs is None else f"{name}_epochs"


def _declare(name: str, known: Setting) -> tuple[Any, Any]:
    """Return type and dataclass field of the flag of a setting."""
    kind, help = known.type, known.help
    if known.epochs is not None:
        return float, flag(known.epochs, help)
    nargs: Literal["*"] | None = None
    default = None if known.default is MISSING else known.default
    if _is(kind, Mapping):
        kind, help = str, f"YAML file of {help}"
    elif _is(kind, Sequence) and kind is not str:
        kind, nargs = list[typing.get_args(kind)[0]], "*"  # type: ignore[misc]
    hint = kind if default is not None else kind | None
    return hint, flag(default, help, *SPELLINGS.get(name, ()), nargs=nargs)


def _is(kind: Any, abstract: type) -> bool:
    origin = typing.get_origin(kind) or kind
    return isinstance(origin, type) and issubclass(origin, abstract)


def of_command_line(argv: Sequence[str]) -> type[SparseFlags]:
    """Return the flags that a command line may have: with those of a method of the user's own.

    Raises:
        ValueError: The user's own method is not to be had; one line.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--sparse-method")
    parser.add_argument("--config", type=Path)
    try:
        given, _ = parser.parse_known_args(argv)
        content = yaml.safe_load(given.config.read_bytes()) if given.config else {}
    except (argparse.ArgumentError, OSError, UnicodeError, yaml.YAMLError):
        return sparse_flags()  # the real parser says what is wrong
    name = given.sparse_method or (isinstance(content, dict) and content.get("sparse_method"))
    own = [find_method(name)] if isinstance(name, str) and ":" in name else []
    return sparse_flags([*METHODS.values(), *own])


def find_method(name: str) -> type[Allocated]:
    """Return a method by its name, or a class by "package.module:Class".

    Raises:
        ValueError: There is none, or the class is no method; one line.
    """
    if name in METHODS:
        return METHODS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        known = ", ".join(["dense", *METHODS])
        raise ValueError(
            f"--sparse-method {name}: known are {known}, and package.module:Class for a class of "
            "your own"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--sparse-method {name}: {error}; is it on PYTHONPATH?") from error
    if not (isinstance(found, type) and issubclass(found, Allocated)):
        raise ValueError(f"--sparse-method {name}: must be a class derived from sparse.Allocated")
    if inspect.isabstract(found) or not hasattr(found, "name"):
        raise ValueError(f"--sparse-method {name}: the class lacks name, due or update")
    return found


def used_flags(name: str) -> list[str]:
    """List the flags that have an effect with a method, beside those that choose it."""
    if name == "dense":
        return []
    known = settings_of(find_method(name))
    names = [flag_name(name, setting) for name, setting in known.items()]
    return [*names, *(["t_end_fraction"] if any(s.is_end for s in known.values()) else [])]


def resolve(flags: Any, *, resumes: bool = False) -> Any:
    """Return `flags` with the earlier port's spellings replaced and everything checked.

    Args:
        flags: The sparse flags.
        resumes: Whether a checkpoint may say that masks take the place of the sparsity.

    Raises:
        ValueError: A value out of range, a contradiction, or a flag without effect; one line.
    """
    method, sparsity = flags.sparse_method, flags.sparsity
    if flags.dense_allocation is not None:
        if sparsity is not None:
            raise ValueError("--sparsity and --dense-allocation say the same: give one of them")
        sparsity = float(1 - Decimal(str(flags.dense_allocation)))
        method = method or ("static" if flags.static_topo else "rigl")
    if flags.static_topo not in (0, 1):
        raise ValueError(f"--static-topo must be 0 or 1, got {flags.static_topo}")
    if flags.static_topo and method != "static":
        raise ValueError("--static-topo 1 needs --dense-allocation; or use --sparse-method static")
    method = method or "dense"
    used = used_flags(method)
    resolved = dataclasses.replace(flags, sparse_method=method, sparsity=sparsity)
    names = {f.name for f in dataclasses.fields(flags)} - {"sparse_method", "static_topo", *used}
    names -= {"dense_allocation", "from_sparse", "drop_masks", "grad_compress"}
    unused = ineffective(
        resolved, [(False, " ".join(sorted(names)), f"another --sparse-method than {method}")]
    )
    if unused:
        raise ValueError("; ".join(unused))
    if "active" in flags.grad_compress and (reason := _sends_all(method)):
        raise ValueError(
            f"--grad-compress {flags.grad_compress} has no effect with --sparse-method {method}, "
            f"{reason}; use none or bf16"
        )
    if flags.from_sparse is not None and method == "dense":
        raise ValueError("--from-sparse needs a --sparse-method: static keeps its masks")
    if flags.from_sparse is not None and find_method(method).from_masks is None:
        raise ValueError(
            f"--from-sparse: {method} {find_method(method).why_no_masks}; --pretrained-from-file "
            "with --drop-masks starts it from the weights alone"
        )
    if "sparsity" in used and sparsity is None and not resumes and flags.from_sparse is None:
        raise ValueError(f"--sparse-method {method} needs --sparsity")
    if not 0 < flags.t_end_fraction <= 1:
        raise ValueError(f"--t-end-fraction must be in (0, 1], got {flags.t_end_fraction}")
    return resolved


def _sends_all(method: str) -> str | None:
    """Return why sending only active weights saves nothing with a method; None if it does."""
    if method == "dense":
        return "whose weights are all active"
    if find_method(method).gradient_decay is not None:
        return "which needs the gradients of all weights at every step"
    return None


def arguments(flags: Any, total_steps: int, epochs: int) -> dict[str, Any]:
    """Return the settings of the method that `flags` decide; none for a dense run.

    Args:
        flags: The sparse flags.
        total_steps: Optimizer steps of the run.
        epochs: Its epochs.

    Raises:
        ValueError: The topology would change beyond the run, or the sparsity map cannot be read.
    """
    if flags.sparse_method == "dense":
        return {}
    found = {}
    for name, known in settings_of(find_method(flags.sparse_method)).items():
        value = getattr(flags, flag_name(name, known))
        spelled = spelling(flag_name(name, known))
        if known.epochs is not None:
            known = dataclasses.replace(known, epochs=value)
            value = None
        if known.follows_from_length and value is None:
            value = known.steps(total_steps, total_steps / epochs, flags.t_end_fraction)
        elif known.is_end and flags.t_end_fraction != SparseFlags.t_end_fraction:
            raise ValueError(f"{spelled} and --t-end-fraction say the same: give one of them")
        elif (known.is_end or known.share is not None) and value > total_steps:
            raise ValueError(f"{spelled} {value} is beyond the run's {total_steps} steps")
        if _is(known.type, Mapping) and value is not None:
            value = read_map(spelled, Path(value))
        if value is None and name == "sparsity" and flags.from_sparse is not None:
            continue  # the masks tell it, where the method does not prune on
        if value is None and known.default is MISSING:
            raise ValueError(f"--sparse-method {flags.sparse_method} needs {spelled}")
        found[name] = known.default if value is None else value
    return found


def create_method(
    flags: Any,
    total_steps: int,
    epochs: int,
    seed: int = 0,
    begins_with: Mapping[str, int] | None = None,
) -> Allocated | None:
    """Return the method that `flags` decide; None for a dense run.

    Args:
        flags: The sparse flags.
        total_steps: Optimizer steps of the run.
        epochs: Its epochs.
        seed: Of all random choices.
        begins_with: Layer name -> active weights of the masks that the run begins with.

    Raises:
        ValueError: A setting is out of range, or has no effect.
    """
    if flags.sparse_method == "dense":
        return None
    method = find_method(flags.sparse_method)
    given = arguments(flags, total_steps, epochs)
    if "seed" in method.__dataclass_fields__:
        given["seed"] = seed
    if begins_with is None:
        return method(**given)
    if method.from_masks == "prune" and "sparsity" not in given:
        raise ValueError(f"--sparse-method {flags.sparse_method} needs --sparsity: the final one")
    return begin_with(method, begins_with, given)


def settings_kept(flags: Any, total_steps: int, epochs: int) -> dict[str, Any]:
    """Return `arguments` by the names of their flags: what is given in epochs stays so."""
    found = {}
    for name, value in arguments(flags, total_steps, epochs).items():
        known = settings_of(find_method(flags.sparse_method))[name]
        flag_of = flag_name(name, known)
        found[flag_of] = value if known.epochs is None else getattr(flags, flag_of)
    return found


def record(
    flags: Any, total_steps: int, epochs: int, begins_with: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Return the flags that a checkpoint keeps, with what follows from the run's length resolved.

    The sparsity map is there with its content, and `t_end` in place of the fraction. Of a run that
    began with masks, their numbers of active weights are there.
    """
    began = {"from_sparse": flags.from_sparse, "begins_with": dict(begins_with or {})}
    return {
        **(began if begins_with is not None else {}),
        "sparse_method": flags.sparse_method,
        "grad_compress": flags.grad_compress,
        **settings_kept(flags, total_steps, epochs),
    }


def spell(kept: Mapping[str, Any]) -> str:
    """Return what `record` made, among other flags, as words of a command line."""
    words = [f"--sparse-method {kept['sparse_method']}"]
    others = {f.name for kind in (Config, SparseFlags) for f in dataclasses.fields(kind)}
    defaults = vars(sparse_flags()())
    for name, value in kept.items():
        if name in {*others, "begins_with"} or value is None or value == defaults.get(name):
            continue
        if isinstance(value, Mapping):
            value = f"FILE with {dict(value)}"
        elif isinstance(value, list):
            value = " ".join(map(str, value))
        words.append(f"{spelling(name)} {value}")
    return " ".join(words)


def read_map(name: str, path: Path) -> dict[str, float]:
    """Return the numbers that the YAML file of the flag `name` gives to layers, by glob."""
    try:
        content = yaml.safe_load(path.read_bytes())
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ValueError(f"{name} {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(
        isinstance(v, int | float) for v in content.values()
    ):
        raise ValueError(f"{name} {path}: must map layer globs to numbers")
    return {str(glob): float(value) for glob, value in content.items()}
