"""Find the prunable weights of a model, under the names the bare model gives them."""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim.swa_utils import AveragedModel

from ..errors import SparsityError
from ..topology.distributions import matches
from ..topology.shards import is_sharded

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LARGE = 0.05  # share of the parameters
_WRAPPERS = (DistributedDataParallel, DataParallel, AveragedModel)


def prunable(model: nn.Module, include: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """List the weights that sparsity applies to, in traversal order.

    These are the weights of convolutions (transposed ones too) and linear layers. Left out, unless
    `include` names them: parameters of other modules, such as the input projection of
    nn.MultiheadAttention and the weights of recurrent layers, normalization layers, embeddings,
    depthwise convolutions (as many groups as input channels), and any weight shared with a module
    that is not prunable. Biases and other vectors are always left out. A shared weight is listed
    once, under its first name. The prefixes of DistributedDataParallel, DataParallel, AveragedModel
    and torch.compile are left out of the names. Works on the meta device.

    Args:
        model: The model.
        include: Globs of names of further floating-point parameters with two or more dimensions,
            with or without a trailing ".weight": ["lstm.weight_*", "embed"].

    Returns:
        Name, for example "layer1.0.conv1.weight" -> parameter.

    Raises:
        ValueError: The model has no such weight, a glob matches none, or a weight is not yet
            created, computed from other parameters, or no floating-point tensor of 16, 32 or 64
            bits.
    """
    return parameters_only(weights_of(prunable_modules(model, included(model, include))))


def included(model: nn.Module, include: Sequence[str] | None) -> list[str]:
    """List the weights that are prunable only because `include` names them; see `prunable`.

    Raises:
        ValueError: A glob matches nothing, or a weight that cannot be masked.
    """
    if isinstance(include, str) or not all(isinstance(glob, str) for glob in include or ()):
        raise ValueError(f"include must be a sequence of globs, got {include!r}")
    if not include:
        return []
    model = unwrap(model)
    usual = _find(model, ())
    slots = _nameable(model, usual)
    extra: dict[str, _Slot] = {}
    for glob in include:
        found = [slot for name, slot in slots.items() if matches(glob, name)]
        if not found:
            others = [n for n, s in slots.items() if s.weight is not None and s.name not in usual]
            known = f"; it could name {', '.join(others[:3])}" if others else ""
            raise ValueError(
                f"include: {glob!r} matches no parameter of two or more dimensions{known}"
            )
        extra |= {slot.name: slot for slot in found if slot.name not in usual}
    for slot in extra.values():
        _refuse_included(slot)
    return list(extra)


def prunable_modules(model: nn.Module, extra: Collection[str] = ()) -> dict[str, nn.Module]:
    """List the modules that own the weights of `prunable`, under the names of the weights.

    Modules whose weight is computed from other parameters are among them.

    Args:
        model: The model.
        extra: Names of further weights, as `included` gives them.

    Raises:
        ValueError: The model has none, or is sharded by FSDP's first version.
    """
    found = _find(unwrap(model), extra)
    if not found:
        raise ValueError(
            "the model has no convolution or linear layer to make sparse; to make other weights "
            "sparse, name them in include"
        )
    return found


def owners_of(
    model: nn.Module, weights: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that hold weights, each with the name of the weight; shared ones, too."""
    names = {id(weight): name for name, weight in weights.items()}
    for module in unwrap(model).modules():
        for parameter in module._parameters.values():
            if id(parameter) in names:
                yield names[id(parameter)], module


def weights_of(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Give the weights of modules: parameters, or stand-ins where they are computed from others.

    A stand-in has the shape of the weight and takes no memory. The weight is not computed,
    because computing it may change the state it is computed from, as in spectral normalization.

    Raises:
        ValueError: A weight is not yet created, or no floating-point tensor of 16, 32 or 64 bits.
    """
    return {name: _weight_of(name, module) for name, module in modules.items()}


def _weight_of(name: str, module: nn.Module) -> Tensor:
    weight = module._parameters.get(_own(name))
    if weight is None:
        like = next(module.parameters())
        return torch.zeros((), dtype=like.dtype, device=like.device).expand(_weight_shape(module))
    if isinstance(weight, nn.UninitializedParameter):
        raise ValueError(
            f"{name} has no shape yet; run the lazy model once before making it sparse"
        )
    if weight.dtype not in _DTYPES:
        raise ValueError(f"{name} has dtype {weight.dtype}; masks need 16, 32 or 64-bit floats")
    if is_sharded(weight) and weight.is_meta:
        raise ValueError(
            f"{name} has no values yet; make it sparse after to_empty and the initialization"
        )
    return weight


def parameters_only(weights: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Refuse weights that are computed from other parameters.

    Raises:
        ValueError: Names the first one.
    """
    parameters: dict[str, nn.Parameter] = {}
    for name, weight in weights.items():
        if not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"{name} is computed from other parameters; remove its parametrization, or keep "
                "the layer dense with dense_layers"
            )
        parameters[name] = weight
    return parameters


def check_owned(
    model: nn.Module, modules: Mapping[str, nn.Module], weights: Mapping[str, nn.Parameter]
) -> None:
    """Refuse a model whose modules no longer have the weights they had, or are no longer in it.

    Raises:
        SparsityError: Names the first weight.
    """
    held = set(map(id, model.parameters()))
    for name, module in modules.items():
        if module._parameters.get(_own(name)) is not weights[name]:
            raise SparsityError(
                f"{name} was replaced by another tensor since it was made sparse; make optimizer "
                "and sparsifier when the model is complete (after fully_shard, too, whose "
                "set_reshard_after_backward must stay on)"
            )
        if id(weights[name]) not in held:
            raise SparsityError(
                f"{name} is no longer in the model: its module was replaced since it was made "
                "sparse; call remove(), and make optimizer and sparsifier of the new model"
            )


def warn_of_dense_weights(model: nn.Module, sparse: Collection[str]) -> None:
    """Warn if a large share of the parameters stays dense though nobody asked for it.

    Embeddings and depthwise convolutions do not count: they are dense in all published work.

    Args:
        model: The model.
        sparse: Names of the weights that sparsity applies to.
    """
    model, left = unwrap(model), {}
    for prefix, module in model.named_modules():
        if not isinstance(module, (nn.Linear, _ConvNd, nn.Embedding, ParametrizationList)):
            for name, parameter in module.named_parameters(prefix, recurse=False):
                if parameter.dim() > 1 and clean_name(name) not in sparse:
                    left[clean_name(name)] = parameter.numel()
    share = sum(left.values()) / sum(parameter.numel() for parameter in model.parameters())
    if share < _LARGE:
        return
    largest = sorted(left, key=lambda name: -left[name])[:3]
    others = f" and {len(left) - 3} others" if len(left) > 3 else ""
    warnings.warn(
        f"{share:.0%} of the parameters stay dense: {', '.join(largest)}{others} belong neither to "
        "a convolution nor to a linear layer; to make them sparse, name them in include",
        stacklevel=4,
    )


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """List all parameters under their clean names, shared ones under each of their names."""
    named = unwrap(model).named_parameters(remove_duplicate=False)
    return {clean_name(name): parameter for name, parameter in named}


def unwrap(model: nn.Module) -> nn.Module:
    """Take off data-parallel, averaging and torch.compile wrappers."""
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def clean_name(name: str) -> str:
    """Take the parts that torch.compile adds out of a parameter's name."""
    return name.replace("_orig_mod.", "")


@dataclass(frozen=True)
class _Slot:
    """A place for a parameter in a module.

    Attributes:
        weight: The parameter; None for a layer's weight that is computed from other parameters.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter | None

    @property
    def key(self) -> int:
        """The same number for all places of a shared weight."""
        return id(self.module if self.weight is None else self.weight)

    @property
    def is_weight_of_layer(self) -> bool:
        return _own(self.name) == "weight" and _is_layer(self.module)

    @property
    def whole(self) -> str | None:
        """The name of the weight that is computed from this parameter and others, if one is.

        Both forms of weight normalization and their like: torch's parametrizations, and hooks that
        replace `weight` by `weight_g` and `weight_v` or by `weight_orig`.
        """
        module, _, own = self.name.rpartition(".")
        if isinstance(self.module, ParametrizationList):
            return "".join(module.rpartition("parametrizations.")[::2])
        whole = own.rpartition("_")[0]
        if isinstance(vars(self.module).get(whole), Tensor):
            return f"{module}.{whole}" if module else whole
        return None


def _slots(model: nn.Module) -> Iterator[_Slot]:
    """Yield the places of all parameters in traversal order."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        _refuse_fsdp(prefix, module)
        computed = {"weight": None} if _is_layer(module) else {}
        for own, parameter in {**computed, **module._parameters}.items():
            slot = _Slot(clean_name(f"{prefix}.{own}" if prefix else own), module, parameter)
            if parameter is not None or slot.is_weight_of_layer:
                yield slot


def _find(model: nn.Module, extra: Collection[str]) -> dict[str, nn.Module]:
    """List weights with their modules: those of layers and nothing else, and `extra` ones."""
    shared: dict[int, list[_Slot]] = {}
    for slot in _slots(model):
        shared.setdefault(slot.key, []).append(slot)
    return {
        slots[0].name: slots[0].module
        for slots in shared.values()
        if slots[0].name in extra or all(slot.is_weight_of_layer for slot in slots)
    }


def _nameable(model: nn.Module, usual: Collection[str]) -> dict[str, _Slot]:
    """List all names that `include` may have, shared weights under each of theirs.

    Returns:
        Name -> the first place of the weight. Places of computed weights have no parameter; the
        parameters that they are computed from are not listed.
    """
    slots: dict[str, _Slot] = {}
    first: dict[int, _Slot] = {}
    for slot in _slots(model):
        found = first.setdefault(slot.key, slot)
        if whole := slot.whole:
            slots.setdefault(whole, _Slot(whole, slot.module, None))
        elif found.name in usual or _is_matrix(slot.weight):
            slots[slot.name] = found
    return slots


def _own(name: str) -> str:
    """Give the name of a parameter within its module."""
    return name.rpartition(".")[2]


def _is_matrix(weight: Tensor | None) -> bool:
    if isinstance(weight, nn.UninitializedParameter):
        return True
    return weight is not None and weight.is_floating_point() and weight.dim() >= 2


def _refuse_included(slot: _Slot) -> None:
    if slot.weight is None:
        raise ValueError(
            f"include: {slot.name} is computed from other parameters; remove its parametrization, "
            "or do not name it"
        )
    if isinstance(slot.module, (nn.Embedding, nn.EmbeddingBag)) and slot.module.sparse:
        raise ValueError(
            f"include: {slot.name} gets sparse gradients; make its module with sparse=False, or do "
            "not name it"
        )


def _is_layer(module: nn.Module) -> bool:
    """Say whether a module is a layer whose weight is prunable without being named."""
    if isinstance(module, _ConvNd):
        return not 1 < module.in_channels == module.groups
    return isinstance(module, nn.Linear)


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, _ConvNd):
        channels = module.out_channels, module.in_channels // module.groups
        if module.transposed:
            channels = module.in_channels, module.out_channels // module.groups
        return *channels, *module.kernel_size
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def _refuse_fsdp(name: str, module: nn.Module) -> None:
    # By name: the class flattens the weights, so there is nothing to find by looking at them.
    if type(module).__name__ == "FullyShardedDataParallel":
        raise ValueError(
            f"{name or 'the model'} is sharded by FullyShardedDataParallel, which hides the "
            "weights; use fully_shard (FSDP2)"
        )
