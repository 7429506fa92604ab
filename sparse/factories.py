"""Make a model sparse with one call: a function per method, `sparse.rigl(model, optimizer, ...)`.

The functions are made from the records of the methods, which have the settings with their meaning.
factories.pyi spells the signatures out for editors and type checkers; `python scripts/derive.py`
writes it.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from inspect import Parameter, Signature
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .methods import METHODS, Allocated
from .methods.beginning import begin_with, check_agreement, sparse_only
from .methods.settings import settings_of
from .training.sparsifier import Sparsifier

ARGUMENTS = {
    "masks": "bool masks to begin with, by name; layers without one begin dense",
    "hooks": "whether to hook the optimizer's steps; see `Sparsifier`",
    "track_exploration": "whether to record which weights were ever active",
    "seed": "seed of masks and all other random choices; the same on all ranks",
    "process_group": "the processes that train this model, where neither DistributedDataParallel "
    "nor sharded weights tell it; see `Sparsifier`",
}
"""What is no setting -> its meaning."""


def factory(method: type[Allocated]) -> Callable[..., Sparsifier]:
    """Return the function that makes a model sparse with a method.

    The function takes the model, its optimizer and the settings of the method by name. It returns a
    `Sparsifier` and raises ValueError for an invalid argument.
    """
    signature = signature_of(method)

    def make(*args: Any, **kwargs: Any) -> Sparsifier:
        given = dict(signature.bind(*args, **kwargs).arguments)
        names = ("hooks", "track_exploration", "process_group")
        others = {name: given.pop(name) for name in names if name in given}
        model, optimizer = given.pop("model"), given.pop("optimizer")
        if given.get("masks") is None:
            given.pop("masks", None)
            return Sparsifier(model, optimizer, method(**given), **others)
        sizes = {name: mask.numel() for name, mask in given["masks"].items()}
        masks, num_active = sparse_only(given.pop("masks"))
        made = begin_with(method, num_active, given)
        check_agreement(made, model, {**sizes, **num_active})
        return Sparsifier(model, optimizer, made, masks=masks, **others)

    make.__name__ = make.__qualname__ = method.name
    make.__doc__ = describe(method)
    make.__signature__ = signature  # type: ignore[attr-defined]
    return make


def signature_of(method: type[Allocated]) -> Signature:
    """Return the signature of a method's factory."""
    parameters = [
        Parameter("model", Parameter.POSITIONAL_OR_KEYWORD, annotation=nn.Module),
        Parameter("optimizer", Parameter.POSITIONAL_OR_KEYWORD, annotation=Optimizer),
    ]
    for name, known in settings_of(method).items():
        default = Parameter.empty if known.default is MISSING else known.default
        hint = known.type | None if known.optional else known.type
        if name == "sparsity" and method.from_masks == "counts":
            default = ...  # masks tell it
        parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=hint))
    if method.from_masks is not None:
        hint = Mapping[str, Tensor] | None
        parameters.append(Parameter("masks", Parameter.KEYWORD_ONLY, default=None, annotation=hint))
    others: dict[str, Any] = {"hooks": True}
    if "seed" in method.__dataclass_fields__:
        others = {"seed": 0, **others}
    if method.grows:
        others["track_exploration"] = False
    for name, default in others.items():
        kind = type(default)
        parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind))
    group = "ProcessGroup | None"  # not importable in builds without distributed
    name = "process_group"
    parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=group))
    return Signature(parameters, return_annotation=Sparsifier)


def describe(method: type[Allocated]) -> str:
    """Return the docstring of a method's factory: the method's own, and its arguments."""
    helps = {name: known.help for name, known in settings_of(method).items()} | ARGUMENTS
    if method.from_masks == "counts":
        helps["masks"] += ", and sparsity may be left out"
    parameters = [name for name in signature_of(method).parameters if name in helps]
    lines = [f"    {name}: {helps[name][:1].upper()}{helps[name][1:]}." for name in parameters]
    return "\n".join([inspect.getdoc(method) or "", "", "Args:", *lines])


__all__ = list(METHODS)
globals().update({name: factory(method) for name, method in METHODS.items()})
