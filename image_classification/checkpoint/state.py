"""State in and out of objects: checked before anything is changed, errors that name the entry."""

import random
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from image_classification import sharding

# Exact types: subclasses such as numpy.float64 and enumerations are pickled as code.
_PLAIN_TYPES = (str, bytes, int, float, bool, type(None), torch.Tensor, torch.nn.Parameter)


class Loadable(Protocol):
    """Anything that takes its state back."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Take the state; raise when it does not fit."""


def entry(state: Mapping[str, Any], key: str, path: Path) -> Any:
    """Return an entry of a checkpoint; None stands for an entry that the run did not have.

    Raises:
        ValueError: one line naming the file and the key that it lacks.
    """
    if state.get(key) is None:
        raise ValueError(f"{path} has no entry '{key}': the run that wrote it did not have one")
    return state[key]


def restore(targets: Mapping[str, Loadable], state: Mapping[str, Any], path: Path) -> None:
    """Give each target the entry of its name.

    All entries are looked up, and modules and optimizers are compared with theirs, before the
    first target is changed. Entries that have no target are left alone. An optimizer takes over
    its state and its present learning rate, and keeps its settings (weight decay, momentum and so
    on), for those are flags.

    Args:
        targets: entry name -> module, optimizer or other object with `load_state_dict`.
        state: a loaded checkpoint.
        path: its file, for messages.

    Raises:
        ValueError: in one line, the file, the entry, and what is missing or does not fit; for a
            module the first offending parameter and both shapes.
    """
    check(targets, state, path)
    entries = {name: entry(state, name, path) for name in targets}
    for name, target in targets.items():
        try:
            if isinstance(target, Optimizer):
                _load_optimizer(target, entries[name])
            elif isinstance(target, nn.Module):
                own = target.state_dict()
                target.load_state_dict(sharding.spread_state(entries[name], own))
            else:
                target.load_state_dict(entries[name])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: entry '{name}' does not fit: {reason}") from error


def check(targets: Mapping[str, Loadable], state: Mapping[str, Any], path: Path) -> None:
    """Compare modules and optimizers, on any device, with the entries of their names.

    Raises:
        ValueError: as `restore` does.
    """
    for name, target in targets.items():
        problem = _misfit(target, entry(state, name, path))
        if problem:
            raise ValueError(f"{path}: entry '{name}' does not fit: {problem}")


def require_plain(value: object, key: str) -> None:
    """Check that `torch.load(weights_only=True)` can rebuild an entry.

    Raises:
        TypeError: names the first part, below `key`, that only code could rebuild.
    """
    if type(value) in (dict, OrderedDict):
        assert isinstance(value, dict)
        for name, part in value.items():
            if type(name) not in (str, int):
                raise TypeError(f"checkpoint entry {key} has a key of type {type(name).__name__}")
            require_plain(part, f"{key}.{name}")
    elif type(value) in (list, tuple):
        assert isinstance(value, list | tuple)
        for index, part in enumerate(value):
            require_plain(part, f"{key}[{index}]")
    elif type(value) not in _PLAIN_TYPES:
        raise TypeError(
            f"checkpoint entry {key} is a {type(value).__module__}.{type(value).__qualname__}; "
            "only tensors, numbers, strings and their lists, tuples and dicts can be saved"
        )
    elif type(value) is bytes and not value:
        raise TypeError(f"checkpoint entry {key} is an empty bytes object, which cannot be loaded")


def rng_state() -> dict[str, Any]:
    """Return the state of this process's random generators, as plain numbers and tensors.

    Python's and torch's CPU generators always, NumPy's legacy global one if NumPy is imported, and
    the one of the current GPU if CUDA is in use.
    """
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "torch": torch.get_rng_state(),
    }
    if "numpy" in sys.modules:
        algorithm, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [str(algorithm), [int(key) for key in keys], *rest]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Set this process's generators to what `rng_state` returned.

    A generator that is absent from `state`, or that this process does not use, keeps its state.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(tuple(state["numpy"]))
    if "cuda" in state and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.set_rng_state(state["cuda"])


def _load_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Load what an optimizer gathered; keep its settings, and lay tensors out as its parameters.

    torch takes the settings over from the checkpoint, so that a flag would have no effect, and
    keeps the saved layout, in which a fused step reads the entries in another order than the
    parameter's: on a CPU that computes wrong weights without a word.
    """
    settings = [
        {name: value for name, value in group.items() if name not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    before = {parameter: dict(values) for parameter, values in optimizer.state.items()}
    optimizer.load_state_dict({**saved, "state": _spread_state(optimizer, saved)})
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for parameter, values in before.items():  # made before the first step, as fused SGD needs it
        kept = {name: v for name, v in optimizer.state[parameter].items() if v is not None}
        optimizer.state[parameter] = values | kept
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = _laid_out_like(parameter, value)


def _numbered(optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[int, Tensor]:
    """Give the parameters by the numbers that a saved state has for them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in saved["param_groups"] for n in group["params"]]
    return dict(zip(numbers, parameters, strict=True))


def _spread_state(optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[int, Any]:
    """Spread the saved state of every parameter as the parameter is."""
    like = _numbered(optimizer, saved)
    return {
        number: {name: sharding.spread_like(value, like[number]) for name, value in values.items()}
        for number, values in saved["state"].items()
    }


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    if value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _misfit(target: Loadable, saved: Any) -> str | None:
    """Say why `saved` does not fit a module or an optimizer; None if it does or cannot be told."""
    if isinstance(target, nn.Module):
        return _module_misfit(target.state_dict(), saved)
    if isinstance(target, Optimizer):
        return _optimizer_misfit(target, saved)
    return None


def _module_misfit(own: Mapping[str, Any], saved: Any) -> str | None:
    if not isinstance(saved, Mapping):
        return f"a {type(saved).__name__} is not a state dict"
    for name, value in own.items():
        if name not in saved:
            return f"'{name}' is missing"
        if isinstance(value, Tensor) and value.shape != getattr(saved[name], "shape", None):
            return f"'{name}' is {_shape(saved[name])}, this model has {_shape(value)}"
    unexpected = [name for name in saved if name not in own]
    return f"this model has no '{unexpected[0]}'" if unexpected else None


def _optimizer_misfit(optimizer: Optimizer, saved: Any) -> str | None:
    """Compare the shapes, which torch's optimizers load without looking."""
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        return "it is not the state of an optimizer"
    groups = [len(group["params"]) for group in optimizer.param_groups]
    saved_groups = [len(group["params"]) for group in saved["param_groups"]]
    if groups != saved_groups:
        return f"parameter groups of {saved_groups} tensors, this optimizer has {groups}"
    for own, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for name, value in own.items():  # torch adds switches with time, numbers make an algorithm
            is_number = isinstance(value, int | float | tuple) and not isinstance(value, bool)
            if is_number and name not in theirs:
                return f"it is the state of another optimizer, which has no '{name}'"
    for number, parameter in _numbered(optimizer, saved).items():
        for name, value in saved["state"].get(number, {}).items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape != parameter.shape:
                return f"'{name}' of parameter {number} is {_shape(value)}, " + (
                    f"the parameter is {_shape(parameter)}"
                )
    return None


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
