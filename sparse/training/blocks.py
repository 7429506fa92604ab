"""Let a method choose masks of blocks of weights.

A method does not know of blocks. It sees a network in which a layer has one weight per block: the
sum of the magnitudes of the block's weights, and of its gradients. With one weight per block these
are the weights and gradients as every method ranks them. The sum estimates what a block contributes
to the output, and how much the loss would change with it; the norm of squares would prefer blocks
with a single large weight. What the method returns, a mask of blocks, is spread over the weights.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ..methods.base import Allocated, Method, Tensors
from ..methods.pruning import Pruning
from ..topology.flat import all_true
from ..topology.rng import Draw


def in_blocks(method: Method) -> Method:
    """Return what chooses masks for a method: the method itself, or `InBlocks` if it has blocks.

    Ask for each update anew: `InBlocks` remembers the tensors of one.
    """
    if isinstance(method, Allocated) and method.block is not None:
        return InBlocks(method)
    return method


def check_whole(method: Method, masks: Tensors, whose: str) -> None:
    """Refuse masks with blocks that are active in part; see `Blocks.check_whole`."""
    if isinstance(method, Allocated):
        method.allocation.blocks.check_whole(masks, whose)


class InBlocks(Method):
    """A method for a network of one weight per block.

    Attributes:
        blocks: What is active or inactive as a whole.
    """

    def __init__(self, method: Allocated) -> None:
        self.blocks = blocks = method.allocation.blocks
        begun = method.begins_with and blocks.counted(method.begins_with)
        counted = method.allocation.in_blocks()
        self._rule = dataclasses.replace(method, allocation=counted, begins_with=begun, block=None)
        self._ranks_products = isinstance(method, Pruning) and method.ranks_products
        self._seen: tuple[Tensors, Tensors] | None = None  # masks and weights, block by block

    def due(self, step: int) -> bool:
        return self._rule.due(step)

    def first_masks(
        self,
        draws: Mapping[str, Draw],
        num_active: Mapping[str, int],
        among: Tensors,
        weights: Tensors,
    ) -> Tensors:
        seen, counts = self.blocks.added(weights), self.blocks.counted(num_active)
        draws = {name: Draw(tuple(seen[name].shape), draw.key) for name, draw in draws.items()}
        chosen = self._rule.first_masks(draws, counts, all_true(seen), seen)
        return self.blocks.spread(chosen, among)

    def survivors(self, masks: Tensors, weights: Tensors, step: int) -> Tensors:
        seen, added = self._see(masks, weights)
        return self._spread(self._rule.survivors(seen, added, step), seen, masks)

    def update(
        self, masks: Tensors, weights: Tensors, grads: Tensors, step: int, state: dict[str, Tensor]
    ) -> Tensors:
        seen, added = self._see(masks, weights)
        slopes = self.blocks.added(grads)
        if self._ranks_products:
            products = {name: weights[name] * gradient for name, gradient in grads.items()}
            added = {**added, **self.blocks.added(products)}
            slopes = {name: torch.ones_like(gradient) for name, gradient in slopes.items()}
        new = self._rule.update(seen, added, slopes, step, state)
        return self._spread(new, seen, masks)

    def _see(self, masks: Tensors, weights: Tensors) -> tuple[Tensors, Tensors]:
        if self._seen is None:
            self._seen = self.blocks.first(masks), self.blocks.added(weights)
        return self._seen

    def _spread(self, chosen: Tensors, seen: Tensors, masks: Tensors) -> Tensors:
        """Spread masks of blocks over the weights, but those that are as they were seen."""
        changed = {name: mask for name, mask in chosen.items() if mask is not seen[name]}
        return {name: masks[name] for name in chosen} | self.blocks.spread(changed, masks)
