"""Let a method choose masks of blocks of weights.

A method does not know of blocks. It sees a network in which a layer has one weight per block: the
sum of the magnitudes of the block's weights, and of its gradients. With one weight per block these
are the weights and gradients as every method ranks them. The sum estimates what a block contributes
to the output, and how much the loss would change with it; the norm of squares would prefer blocks
with a single large weight. What the method returns, a mask of blocks, is spread over the weights.
"""

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from ..topology import rng
from ..topology.blocks import Blocks
from ..topology.flat import all_true
from .base import Allocated, Method

Tensors = Mapping[str, Tensor]


class MaskRule:
    """How a method chooses masks: by itself, or for a network of one weight per block.

    Attributes:
        blocks: What is active or inactive as a whole.
    """

    def __init__(self, method: Method) -> None:
        self.blocks, self._method, self._rule = Blocks({}), method, method
        if isinstance(method, Allocated) and method.allocation.blocks:
            self.blocks = method.allocation.blocks
            begun = method.begins_with and self._counted(method.begins_with)
            counted = method.allocation.in_blocks()
            self._rule = dataclasses.replace(
                method, allocation=counted, begins_with=begun, block=None
            )

    def _counted(self, numbers: Mapping[str, int]) -> dict[str, int]:
        return {name: number // self.blocks.numel(name) for name, number in numbers.items()}

    def first_masks(
        self, keys: Mapping[str, tuple[int, ...]], num_active: Mapping[str, int], weights: Tensors
    ) -> Tensors:
        """Choose the first masks; see `Method.first_masks`.

        Args:
            keys: Layer name -> key of its random numbers.
            num_active: Layer name -> active weights.
            weights: The weights.
        """
        seen = self.blocks.added(weights)
        draws = {name: rng.Draw(tuple(seen[name].shape), key) for name, key in keys.items()}
        counts = self._counted({name: num_active[name] for name in keys})
        return self.blocks.spread(
            self._rule.first_masks(draws, counts, all_true(seen), seen), weights
        )

    def new_masks(
        self, masks: Tensors, weights: Tensors, grads: Tensors, step: int, state: dict[str, Tensor]
    ) -> tuple[Tensors, Tensors]:
        """Choose the survivors and the new masks; see `Method.survivors` and `Method.update`."""
        seen = self.blocks.first(masks)
        if self.blocks:
            weights, grads = map(self.blocks.added, self._method.ranked(weights, grads))

        def spread(chosen: Tensors) -> Tensors:
            changed = {name: mask for name, mask in chosen.items() if mask is not seen[name]}
            return {name: masks[name] for name in chosen} | self.blocks.spread(changed, masks)

        survivors = self._rule.survivors(seen, weights, step)
        return spread(survivors), spread(self._rule.update(seen, weights, grads, step, state))
