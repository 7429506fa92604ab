"""What methods share that start dense and prune: what is pruned does not come back."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from torch import nn

from ..topology.blocks import check_block
from ..topology.distributions import Distribution
from ..topology.selection import largest_in_layers, largest_together
from .allocation import check_prunable
from .base import Allocated, Tensors
from .settings import setting

Scope = Literal["layer", "global"]


@dataclass(frozen=True, kw_only=True)
class Pruning(Allocated):
    """Methods that start dense and prune: per layer, or all layers together.

    Attributes:
        ranks_products: Whether they rank |w g|, which blocks of weights then add up, instead of |w|
            and |g|.
    """

    from_masks: ClassVar[Literal["counts", "prune"] | None] = "prune"
    ranks_products: ClassVar[bool] = False

    distribution: Distribution | None = setting(
        None, "how sparsity is spread over layers; erk by default"
    )
    scope: Scope = setting("layer", "rank weights within layers or over all")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope == "global":
            check_block(self.block, "the global scope ranks the single weights of all layers")

    def fitted_to(self, model: nn.Module) -> Self:
        fitted = super().fitted_to(model)
        if self.begins_with:
            check_prunable(self.begins_with, fitted.allocation)
            fitted._check_enough({n: fitted.num_active[n] for n in fitted.allocation.maskable})
        return fitted

    @property
    def num_active(self) -> Mapping[str, int]:
        return {**self.allocation.sizes, **(self.begins_with or {})}

    @property
    def final_counts(self) -> Mapping[str, int] | None:
        if self.scope == "global":
            return None
        zeros, sizes = self.allocation.sparsities, self.allocation.sizes
        found = {n: self._num_final(n, sizes[n], zeros[n]) for n in self.allocation.maskable}
        return {**sizes, **found}

    def _num_final(self, name: str, size: int, sparsity: float) -> int:
        """Count the weights of a layer in the end: those of whole blocks."""
        block = self.allocation.blocks.numel(name)
        return self.num_final(size // block, sparsity) * block

    @property
    def final_total(self) -> int:
        if self.final_counts is not None:
            return sum(self.final_counts.values())
        pruned = sum(self.allocation.sizes[name] for name in self.allocation.maskable)
        whole = sum(self.allocation.sizes.values())
        return whole - pruned + self.num_final(pruned, self.sparsity)

    def prune(
        self, scores: Tensors, masks: Tensors, num_kept: Callable[[int, float], int]
    ) -> Tensors:
        """Keep the active entries of largest |score|, in every layer or in all of them together.

        Args:
            scores: What to rank.
            masks: The masks before.
            num_kept: How many entries to keep, if as many are active: a function of the number of
                entries and the sparsity.
        """
        if self.scope == "layer":
            counts = {
                name: num_kept(mask.numel(), self.allocation.sparsities[name])
                for name, mask in masks.items()
            }
            return largest_in_layers(scores, counts, masks)
        numel = sum(mask.numel() for mask in masks.values())
        return largest_together(scores, num_kept(numel, self.sparsity), masks)

    @abstractmethod
    def num_final(self, numel: int, sparsity: float) -> int:
        """Compute how many of some weights are left in the end."""

    def check_left(self, num_left: Mapping[str, int]) -> None:
        self._check_enough(num_left, exact=self.timing == "once")

    def _check_enough(self, num_left: Mapping[str, int], *, exact: bool = False) -> None:
        sizes = {name: self.allocation.sizes[name] for name in num_left}
        zeros = self.allocation.sparsities
        if self.scope == "global":
            num_left, sizes = {"all": sum(num_left.values())}, {"all": sum(sizes.values())}
            zeros = {"all": self.sparsity}
        for name, left in num_left.items():
            wanted = self._num_final(name, sizes[name], zeros[name])
            if left < wanted or (exact and left > wanted):
                where = "the network" if self.scope == "global" else name
                raise ValueError(
                    f"{where} has {left} weights left, this run would keep {wanted}, and what is "
                    "pruned does not come back"
                )
