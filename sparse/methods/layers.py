"""Find the prunable weights of a model, under the names the bare model gives them."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim.swa_utils import AveragedModel

from ..errors import SparsityError
from ..topology.shards import is_sharded

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LARGE = 0.05  # share of the parameters
_WRAPPERS = (DistributedDataParallel, DataParallel, AveragedModel)


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """List the weights that sparsity applies to, in traversal order.

    These are the weights of convolutions (transposed ones too) and linear layers. Left out: bare
    parameters such as the input projection of nn.MultiheadAttention, biases, normalization layers,
    embeddings, depthwise convolutions (as many groups as input channels), and any weight shared
    with a module that is not prunable. A weight shared by several prunable layers is listed once,
    under its first name. The prefixes of DistributedDataParallel, DataParallel, AveragedModel and
    torch.compile are left out of the names. Works on the meta device.

    Returns:
        Name, for example "layer1.0.conv1.weight" -> parameter.

    Raises:
        ValueError: The model has no such weight, or one that is not yet created, computed
            from other parameters, or no floating-point tensor of 16, 32 or 64 bits.
    """
    modules = prunable_modules(model)
    return parameters_only({name: weight_of(name, module) for name, module in modules.items()})


def prunable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """List the modules that own the weights of `prunable`, under the names of the weights.

    Modules whose weight is computed from other parameters are among them.

    Raises:
        ValueError: The model has none, or is sharded by FSDP's first version.
    """
    model = unwrap(model)
    owners = _owners(model)
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        _refuse_fsdp(name, module)
        if not _is_prunable(module):
            continue
        weight = module._parameters.get("weight")
        if id(weight) not in seen and all(map(_is_prunable, owners.get(id(weight), ()))):
            found[clean_name(f"{name}.weight" if name else "weight")] = module
            if weight is not None:
                seen.add(id(weight))
    if not found:
        raise ValueError("the model has no convolution or linear layer to make sparse")
    return found


def weight_of(name: str, module: nn.Module) -> Tensor:
    """Give the weight of a module: a parameter, or a stand-in where it is computed from others.

    The stand-in has the shape of the weight and takes no memory. The weight is not computed,
    because computing it may change the state it is computed from, as in spectral normalization.

    Raises:
        ValueError: The weight is not yet created, or no floating-point tensor of 16, 32 or
            64 bits.
    """
    weight = module._parameters.get("weight")
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


def check_owned(modules: Mapping[str, nn.Module], weights: Mapping[str, nn.Parameter]) -> None:
    """Refuse modules that no longer have the weights they had.

    Raises:
        SparsityError: Names the first one.
    """
    for name, module in modules.items():
        if module._parameters.get("weight") is not weights[name]:
            raise SparsityError(
                f"{name} was replaced by another tensor since it was made sparse; make optimizer "
                "and sparsifier when the model is complete (after fully_shard, too, whose "
                "set_reshard_after_backward must stay on)"
            )


def warn_of_dense_weights(model: nn.Module) -> None:
    """Warn if a large share of the parameters stays dense though nobody asked for it.

    Embeddings and depthwise convolutions do not count: they are dense in all published work.
    """
    model, left = unwrap(model), {}
    for prefix, module in model.named_modules():
        if not isinstance(module, (nn.Linear, _ConvNd, nn.Embedding, ParametrizationList)):
            for name, parameter in module.named_parameters(prefix, recurse=False):
                if parameter.dim() > 1:
                    left[clean_name(name)] = parameter.numel()
    share = sum(left.values()) / sum(parameter.numel() for parameter in model.parameters())
    if share < _LARGE:
        return
    largest = sorted(left, key=lambda name: -left[name])[:3]
    others = f" and {len(left) - 3} others" if len(left) > 3 else ""
    warnings.warn(
        f"{share:.0%} of the parameters stay dense: {', '.join(largest)}{others} belong neither to "
        "a convolution nor to a linear layer, and only these become sparse",
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


def _is_prunable(module: nn.Module) -> bool:
    if isinstance(module, _ConvNd):
        return not 1 < module.in_channels == module.groups
    return isinstance(module, nn.Linear)


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """List the modules that hold each parameter, by the parameter's id."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(module)
    return owners


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
