"""Sharding with FSDP2: every process holds a part of each weight, its gradient and its state.

The blocks of a network are sharded one by one: their weights are collected before they run, and let
go after it. Whatever else handles weights asks this file what is special about them.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def shard(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Shard a model over all processes, in place.

    Its blocks are the members of its outermost Sequential and ModuleList containers: residual
    blocks, transformer layers.

    Args:
        model: The network on its device, with contiguous weights.
        dtype: Type in which weights are collected and used; None: their own. BatchNorm keeps its
            own. Gradients are added up in float32.
    """
    for block in list(_blocks(model)):
        _shard(block, dtype)
    _shard(model, dtype)
    return model


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, nn.Sequential | nn.ModuleList) and list(child.parameters()):
            yield child
        else:
            yield from _blocks(child)


def _shard(module: nn.Module, dtype: torch.dtype | None) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    own = MixedPrecisionPolicy(cast_forward_inputs=False)
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    inner = [child for child in module.modules() if child is not module and not is_sharded(child)]
    norms: list[nn.Module] = [child for child in inner if isinstance(child, _BatchNorm)]
    if dtype is not None and norms:
        fully_shard(norms, mp_policy=own, reshard_after_forward=True)
    policy = own if isinstance(module, _BatchNorm) else mixed
    fully_shard(module, mp_policy=policy, reshard_after_forward=True)


def is_sharded(module: nn.Module) -> bool:
    """Say whether a module was sharded."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def is_spread(tensor: Any) -> bool:
    """Say whether processes hold a part of a tensor each."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds."""
    return cast(Any, tensor.detach()).to_local() if is_spread(tensor) else tensor


def sync_gradients(model: nn.Module, *, last: bool) -> None:
    """Let the coming backward pass add gradients up over the processes, or only here."""
    cast(Any, model).set_requires_gradient_sync(last)


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Let every process have all weights, so that each may run the model as often as it likes."""
    blocks: list[Any] = [module for module in model.modules() if is_sharded(module)]
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
        block.unshard()
    try:
        yield
    finally:
        for block in blocks:
            block.reshard()
            block.set_reshard_after_forward(True, recurse=False)


def collect(state: Any, *, keep: bool) -> Any:
    """Return a state with whole tensors, on the CPU, in the place of spread ones.

    All processes must call this function together. Where `keep` is False, the tensors are let go
    at once, and None stands for them.
    """
    if isinstance(state, Mapping):
        return {name: collect(value, keep=keep) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(collect(value, keep=keep) for value in state)
    if not is_spread(state):
        return state
    whole = state.full_tensor()
    return whole.cpu() if keep else None


def spread_like(value: Any, like: Any) -> Any:
    """Spread a tensor, of which every process has the whole, as another one of its shape is."""
    same = is_spread(like) and isinstance(value, Tensor) and value.shape == like.shape
    if not same or is_spread(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, whole = like.device_mesh, value.to(like.device)
    return distribute_tensor(whole, mesh, like.placements, src_data_rank=None)


def spread_state(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Spread the tensors of a state as those of the same names are."""
    return {name: spread_like(value, own.get(name)) for name, value in state.items()}


def any_spread(tensors: Iterable[Any]) -> bool:
    """Say whether there is a spread tensor among tensors."""
    return any(map(is_spread, tensors))
