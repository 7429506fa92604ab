"""Let a method choose masks of blocks of weights.

A method does not know of blocks. It sees a network in which a layer has one weight per block: the
sum of the magnitudes of the block's weights, and of its gradients. With one weight per block these
are the weights and gradients as every method ranks them. The sum estimates what a block contributes
to the output, and how much the loss would change with it; the norm of squares would prefer blocks
with a single large weight. What the method returns, a mask of blocks, is spread over the weights.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ..topology.flat import all_true
from ..topology.rng import Draw

if TYPE_CHECKING:
    from .base import Method

Tensors = Mapping[str, Tensor]


def first_masks(
    method: "Method", draws: Mapping[str, Draw], num_active: Mapping[str, int], weights: Tensors
) -> Tensors:
    """Let a method choose its first masks; see `Method.first_masks`.

    Args:
        method: The method.
        draws: Layer name -> random numbers, one per block.
        num_active: Layer name -> active weights.
        weights: The weights.
    """
    blocks, seen = method.blocks, method.blocks.added(weights)
    counts = {name: num_active[name] // blocks.numel(name) for name in draws}
    return blocks.spread(method.rule.first_masks(draws, counts, all_true(seen), seen), weights)


def new_masks(
    method: "Method",
    masks: Tensors,
    weights: Tensors,
    grads: Tensors,
    step: int,
    state: dict[str, Tensor],
) -> tuple[Tensors, Tensors]:
    """Let a method choose; see `Method.survivors` and `Method.update`, in this order."""
    blocks = method.blocks
    seen = blocks.first(masks)
    ranked = map(blocks.added, method.ranked(weights, grads)) if blocks else (weights, grads)
    in_blocks, slopes = ranked

    def spread(chosen: Tensors) -> Tensors:
        changed = {name: mask for name, mask in chosen.items() if mask is not seen[name]}
        return {name: masks[name] for name in chosen} | blocks.spread(changed, weights)

    survivors = method.rule.survivors(seen, in_blocks, step)
    return spread(survivors), spread(method.rule.update(seen, in_blocks, slopes, step, state))
