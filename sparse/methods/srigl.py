"""SRigL: RigL with a constant fan-in, and without the neurons that matter least."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ..topology.blocks import check_block
from ..topology.distributions import match_layers
from ..topology.flat import all_true, count_nonzero, vector
from ..topology.rng import Draw
from ..topology.rows import by_layer, count_in_rows, fill_rows, per_row, within_rows
from ..topology.selection import largest_in_layers
from ..topology.shards import part_of
from .after import AfterSteps
from .base import Tensors
from .layers import included, prunable_modules, weights_of
from .settings import setting

FanIn = Literal["sparse", "dense"]


@dataclass(frozen=True, kw_only=True)
class Srigl(AfterSteps):
    """SRigL: RigL with as many weights in every row of a layer (Lasby et al. 2024).

    A row has the weights of one output: of a neuron, or of a filter. A layer drops its smallest
    weights. Rows in which few weights matter are ablated: they become inactive as a whole, and the
    other rows get their share. Every row is then filled where the gradient is largest.

    Attributes:
        budgets: Layer name -> weights that its rows share out among each other.
        whole: The layers whose rows are never ablated.
    """

    name: ClassVar[str] = "srigl"
    title: ClassVar[str] = "SRigL, with or without ablation"
    paper: ClassVar[str] = "[Lasby et al., 2024](https://arxiv.org/abs/2305.02299)"

    min_salient: float = setting(
        0.3, "weights that must matter in a row of srigl; below 1 of its fan-in; 0: no ablation"
    )
    min_salient_of: FanIn = setting("sparse", "fan-in that srigl's min_salient below 1 is of")
    never_ablated: Sequence[str] | None = setting(
        None, "globs of layers whose rows srigl never ablates; by default the last layer"
    )
    gradient_steps: int = setting(1, "last steps whose mean gradient srigl grows by, up to delta_t")
    budgets: Mapping[str, int] = field(default_factory=dict, repr=False)
    whole: Collection[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block(self.block, "srigl gives every row the same number of single weights")
        if self.min_salient < 0.0:
            raise ValueError(f"min_salient must not be negative, got {self.min_salient}")
        if not 1 <= self.gradient_steps <= self.delta_t:
            raise ValueError(
                f"gradient_steps must be in [1, {self.delta_t}], up to delta_t, got "
                f"{self.gradient_steps}"
            )

    @property
    def keeps_counts(self) -> bool:
        return self.min_salient == 0.0

    def due(self, step: int) -> bool:
        return step + 1 < self.t_end and super().due(step)

    def fitted_to(self, model: nn.Module) -> Self:
        fitted = super().fitted_to(model)
        weights = weights_of(prunable_modules(model, included(model, self.include)))
        for name, weight in weights.items():
            if not part_of(weight).has_whole_rows:
                raise ValueError(
                    f"srigl needs the rows of {name} whole, which is spread along other dimensions "
                    "or over several groups of processes: use DDP or FSDP2 alone"
                )
        allocation, rows = fitted.allocation, {n: len(weight) for n, weight in weights.items()}
        budgets, counts = {}, {}
        for name, size in allocation.sizes.items():
            budgets[name] = size - math.ceil(allocation.sparsities[name] * size)
            counts[name] = budgets[name] // rows[name] * rows[name]
            if self.follows_masks:
                budgets[name] = counts[name] = allocation.num_active[name]
            if budgets[name] < rows[name]:
                remedy = "give it more with sparsity_map, or keep it with dense_layers"
                if self.follows_masks:
                    remedy = "leave its mask out, and it is dense"
                raise ValueError(
                    f"{name} would have {budgets[name]} weights for {rows[name]} outputs, less "
                    f"than one each: {remedy}"
                )
        globs = self.never_ablated if self.never_ablated is not None else [list(rows)[-1]]
        whole = {name for glob in globs for name in match_layers(glob, rows, "never_ablated")}
        return dataclasses.replace(
            fitted,
            allocation=dataclasses.replace(allocation, num_active=counts),
            budgets=budgets,
            whole=whole,
        )

    def begin_from(self, masks: Tensors) -> Tensors:
        """Refuse masks without a constant fan-in; rows without weights may be ablated ones."""
        if not masks:
            return masks
        for name, numbers in by_layer(count_in_rows(masks, masks), masks).items():
            mask, counts = masks[name], sorted(set(numbers.tolist()))
            if len(set(counts) - {0}) > 1:
                raise ValueError(
                    f"srigl needs masks with as many weights in every row; rows of {name} have "
                    f"{counts[0]} to {counts[-1]}: begin with masks of srigl, or with the weights "
                    "alone"
                )
            if 0 in counts and self.threshold(name, len(mask), mask.shape[1:].numel()) == 0:
                raise ValueError(
                    f"srigl ablates no rows of {name}, but its mask has rows without weights: give "
                    "min_salient and never_ablated as in the run of the masks"
                )
        return masks

    def first_masks(
        self,
        draws: Mapping[str, Draw],
        num_active: Mapping[str, int],
        among: Tensors,
        weights: Tensors,
    ) -> Tensors:
        counts = per_row([num_active[n] // len(mask) for n, mask in among.items()], among)
        return fill_rows(among, counts, None, draws)

    def threshold(self, name: str, num_rows: int, fan_in: int) -> int:
        """Compute how many weights of a row of a layer have to matter."""
        if name in self.whole or self.min_salient == 0.0:
            return 0
        if self.min_salient >= 1.0:
            return math.ceil(self.min_salient)
        wanted = self.budgets[name] // num_rows if self.min_salient_of == "sparse" else fan_in
        return max(1, int(self.min_salient * wanted))

    def update(
        self, masks: Tensors, weights: Tensors, grads: Tensors, step: int, state: dict[str, Tensor]
    ) -> Tensors:
        seen = {name: mask for name, mask in masks.items() if name in grads}
        if not seen:
            return masks
        active = count_nonzero(seen)
        kept = active - (active.double() * self.fraction_at(step)).long()
        kept = torch.minimum(kept, count_nonzero({name: weights[name] for name in seen}))
        num_kept = dict(zip(seen, kept.unbind(), strict=True))
        num_dropped = dict(zip(seen, (active - kept).unbind(), strict=True))
        stay = {} if self.keeps_counts else largest_in_layers(weights, num_kept, seen)
        counts = self._counts(seen, stay, grads, num_dropped)
        left = within_rows(seen, counts > 0)
        # Where no row is ablated the largest ones are known.
        changed = {n: mask for n, mask in left.items() if n not in stay or mask is not seen[n]}
        stay = {n: stay[n] for n in left if n not in changed}
        stay |= largest_in_layers(weights, num_kept, changed)
        del left, changed  # the next line takes the most memory
        stay = {name: stay[name] for name in seen}  # in the order of the counts
        return {**masks, **fill_rows(stay, counts, weights, grads)}

    def _counts(
        self,
        masks: Tensors,
        largest: Tensors,
        grads: Tensors,
        num_dropped: Tensors,
    ) -> Tensor:
        """Compute how many weights every row shall have, 0 in those that are ablated.

        What matters are the largest weights that the drop leaves, and the largest gradients.
        """
        budgets = [self.budgets[name] for name in masks]
        rows = [len(mask) for mask in masks.values()]
        if self.keeps_counts:
            shares = zip(budgets, rows, strict=True)
            return per_row([budget // number for budget, number in shares], masks)
        every = all_true(masks)
        steepest = largest_in_layers(grads, num_dropped, every)
        salient = count_in_rows(largest, steepest)
        fan_ins = [mask.shape[1:].numel() for mask in masks.values()]
        thresholds = [
            self.threshold(name, number, fan_in)
            for name, number, fan_in in zip(masks, rows, fan_ins, strict=True)
        ]
        layer_of = per_row(range(len(rows)), masks)
        # So many rows stay that none needs more weights than it has.
        floor = [budget // fan_in + 1 for budget, fan_in in zip(budgets, fan_ins, strict=True)]
        saliency = by_layer(salient, masks)
        all_rows = by_layer(torch.ones_like(salient, dtype=torch.bool), masks)
        first = largest_in_layers(saliency, dict(zip(masks, floor, strict=True)), all_rows)
        lowest = salient.masked_fill(~torch.cat(list(first.values())), torch.iinfo(torch.int64).max)
        bound = lowest.new_full((len(rows),), torch.iinfo(torch.int64).max)
        bound = bound.scatter_reduce(0, layer_of, lowest, "amin")
        stays = (salient >= per_row(thresholds, masks)) | (salient >= bound[layer_of])
        number = torch.zeros_like(bound).index_add_(0, layer_of, stays.long())
        share = vector(budgets, number.device, torch.int64) // number
        return torch.where(stays, share[layer_of], 0)

    def step_flops(self, dense: float, sparse: float, total_steps: int | None = None) -> float:
        """Count the dense gradient of the weights in `gradient_steps` of `delta_t` steps."""
        return 3 * sparse + (dense - sparse) * self.gradient_steps / self.delta_t
