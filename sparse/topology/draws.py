"""The random numbers of `rng` for all layers, on a device in a fixed number of operations."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from . import rng
from .flat import Layout, apart, batched, by_device, join, layout_for
from .radix import drawn
from .rng import Draw
from .shards import any_sharded, local, part_like

Tensors = Mapping[str, Tensor]
Keys = Mapping[str, tuple[int, ...]]


def uniform(keys: Keys, like: Tensors) -> dict[str, Tensor]:
    """Draw numbers as `rng.uniform` does.

    Args:
        keys: Layer name -> key of its stream.
        like: Layer name -> tensor of the layer's shape, for all keys and perhaps more.

    Returns:
        Layer name -> numbers, spread over processes as the tensors are.
    """
    return _of_layers(keys, like, rng.uniform, lambda fractions: fractions())


def normal(keys: Keys, like: Tensors) -> dict[str, Tensor]:
    """Draw numbers as `rng.normal` does; arguments and result are those of `uniform`."""
    return _of_layers(keys, like, rng.normal, rng.box_muller)


def noisy_magnitudes(values: Tensors, keys: Keys, deviation: float) -> dict[str, Tensor]:
    """Add normal noise to the magnitudes of layers, and six deviations, which it never exceeds.

    As nothing is negative, ranking by magnitude is ranking by value.

    Args:
        values: Layer name -> values.
        keys: Layer name -> key of the noise.
        deviation: Standard deviation of the noise, not negative.
    """
    noise = normal(keys, values)
    for names in by_device(noise):
        sums = [local(noise[name]) for name in names]
        torch._foreach_add_(sums, 6.0)
        torch._foreach_mul_(sums, deviation)
        magnitudes = join([local(values[name]) for name in names]).abs_()
        if magnitudes.dtype != torch.float64:
            magnitudes = magnitudes.float()
        torch._foreach_add_(
            sums, list(apart(magnitudes, dict(zip(names, sums, strict=True))).values())
        )
    return noise


def _of_layers(
    keys: Keys,
    like: Tensors,
    alone: Callable[..., Tensor],
    of_fractions: Callable[[Callable[..., Tensor]], Tensor],
) -> dict[str, Tensor]:
    """Draw layer by layer, or on a device from fractions of all layers."""
    made: dict[str, Tensor] = {}
    for names in by_device({name: like[name] for name in keys}):
        tensors = {name: like[name] for name in names}
        if batched(tensors[names[0]]) and not any_sharded(tensors.values()):
            flat = of_fractions(functools.partial(_fractions, keys, tensors))
            made |= _layout(tensors).by_layer(flat, names, tensors)
        else:
            made |= {n: part_like(alone(t.shape, keys[n], t.device), t) for n, t in tensors.items()}
    return {name: made[name] for name in keys}


def _fractions(keys: Keys, like: Tensors, *more: int) -> Tensor:
    """Draw uniform numbers of layers of one device in a flat tensor; `more` ends all keys."""
    streams = [Draw(tuple(tensor.shape), (*keys[name], *more)) for name, tensor in like.items()]
    device = next(iter(like.values())).device
    return rng.fractions(drawn(streams, _layout(like), device))


def _layout(like: Tensors) -> Layout:
    return layout_for(like.values())
