"""Find the prunable weights of a model, under the names the bare model gives them."""

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
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
        ValueError: The model has no such weight, or one that is sharded, not yet created, computed
            from other parameters, or no floating-point tensor of 16, 32 or 64 bits.
    """
    model = unwrap(model)
    owners = _owners(model)
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        _refuse_fsdp(name, module)
        if not _is_prunable(module):
            continue
        weight_name = clean_name(f"{name}.weight" if name else "weight")
        weight = _own_weight(weight_name, module)
        if id(weight) not in seen and all(map(_is_prunable, owners[id(weight)])):
            seen.add(id(weight))
            found[weight_name] = weight
    if not found:
        raise ValueError("the model has no convolution or linear layer to make sparse")
    return found


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


def _own_weight(name: str, module: nn.Module) -> nn.Parameter:
    weight = module._parameters.get("weight")
    if weight is None:
        raise ValueError(f"{name} is computed from other parameters; remove its parametrization")
    if isinstance(weight, nn.UninitializedParameter):
        raise ValueError(
            f"{name} has no shape yet; run the lazy model once before making it sparse"
        )
    if weight.dtype not in _DTYPES:
        raise ValueError(f"{name} has dtype {weight.dtype}; masks need 16, 32 or 64-bit floats")
    if _is_dtensor(weight):
        raise ValueError(f"{name} is a DTensor; sharded parameters are not supported, use DDP")
    return weight


def _is_dtensor(weight: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # not importable in builds without distributed

    return isinstance(weight, DTensor)


def _refuse_fsdp(name: str, module: nn.Module) -> None:
    # By name: the class flattens the weights, so there is nothing to find by looking at them.
    if type(module).__name__ == "FullyShardedDataParallel":
        raise ValueError(
            f"{name or 'the model'} is sharded by FSDP, which is not supported, use DDP"
        )
