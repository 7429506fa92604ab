"""Turn a sparsity into numbers of active weights of the layers of a model."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from ..topology.blocks import Blocks, blocks_of, check_block
from ..topology.distributions import count_active, fixed_sparsities, layer_sparsities
from .layers import included, parameters_only, prunable_modules, weights_of


@dataclass(frozen=True)
class Allocation:
    """How a sparsity is shared out among the prunable layers of a model.

    Attributes:
        sizes: Name -> number of weights, of every prunable layer in order.
        num_active: Name -> number of active weights.
        sparsities: Name -> sparsity.
        maskable: The layers that are not dense by choice; a distribution may fill some of them.
        blocks: What is active or inactive as a whole.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    num_active: dict[str, int] = field(default_factory=dict)
    sparsities: Mapping[str, float] = field(default_factory=dict)
    maskable: tuple[str, ...] = ()
    blocks: Blocks = field(default_factory=lambda: Blocks({}))

    def in_blocks(self) -> "Allocation":
        """Count blocks instead of weights."""
        sizes, num_active = map(self.blocks.counted, (self.sizes, self.num_active))
        return Allocation(sizes, num_active, self.sparsities, self.maskable)

    @property
    def sparsity(self) -> float:
        """Share of inactive weights in all layers."""
        return 1.0 - sum(self.num_active.values()) / sum(self.sizes.values())


def unless_included(
    dense_layers: Sequence[str] | None, names: Iterable[str], extra: Collection[str]
) -> Sequence[str] | None:
    """Give `dense_layers`; none where its default would keep dense what `include` names.

    Args:
        dense_layers: Globs, or None.
        names: All prunable weights in order; the default may keep the first one dense.
        extra: Those that only `include` names.
    """
    return () if dense_layers is None and next(iter(names)) in extra else dense_layers


def allocate_layers(
    model: nn.Module,
    sparsity: float,
    distribution: str | None = "erk",
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    sparsity_map: Mapping[str, float] | None = None,
    include: Sequence[str] | None = None,
    *,
    scope: str = "layer",
    block: Sequence[int] | None = None,
) -> Allocation:
    """Share a sparsity out among the layers of a model.

    Args:
        model: The model.
        sparsity: See `layer_sparsities` for this and the rest.
        distribution: "erk" if None.
        power_scale: Exponent of the ERK ratio.
        dense_layers: Globs.
        sparsity_map: Glob -> sparsity.
        include: Globs of further weights, see `prunable`.
        scope: "layer", or "global" for methods that rank the weights of all layers together. With
            "global" all layers share one sparsity, and arguments about single layers are refused.
        block: What is active or inactive as a whole. The counts are those of whole blocks.

    Raises:
        ValueError: An argument is out of range or has no effect.
    """
    extra = included(model, include)
    weights = weights_of(prunable_modules(model, extra))
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if scope == "global":
        if distribution is not None or power_scale != 1.0 or sparsity_map:
            raise ValueError(
                "distribution, power_scale and sparsity_map have no effect with the global scope, "
                "which ranks all weights together"
            )
        distribution, dense_layers = "uniform", dense_layers or ()
    distribution = distribution or "erk"
    dense_layers = unless_included(dense_layers, weights, extra)
    sparsities = layer_sparsities(
        shapes,
        sparsity=sparsity,
        distribution=distribution,
        power_scale=power_scale,
        dense_layers=dense_layers,
        sparsity_map=sparsity_map,
    )
    fixed = fixed_sparsities(shapes, distribution, dense_layers, sparsity_map)
    parameters_only({name: w for name, w in weights.items() if fixed.get(name) != 0.0})
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    blocks = blocks_of(shapes, check_block(block))
    return Allocation(
        sizes=sizes,
        num_active={
            name: count_active(size, sparsities[name], blocks.numel(name))
            for name, size in sizes.items()
        },
        sparsities=sparsities,
        maskable=tuple(name for name in shapes if fixed.get(name) != 0.0),
        blocks=blocks,
    )


def allocation_of(
    model: nn.Module,
    num_active: Mapping[str, int],
    include: Sequence[str] | None = None,
    block: Sequence[int] | None = None,
) -> Allocation:
    """Take the numbers of active weights from masks; layers that have none are dense.

    Args:
        model: The model.
        num_active: Name -> number of active weights, of the layers that have a mask.
        include: Globs of further weights, see `prunable`.
        block: What is active or inactive as a whole.

    Raises:
        ValueError: A mask belongs to no layer.
    """
    weights = weights_of(prunable_modules(model, included(model, include)))
    sizes = {name: weight.numel() for name, weight in weights.items()}
    check_named(num_active, sizes)
    counts = {**sizes, **num_active}
    masked = {name: weights[name] for name in sizes if counts[name] < sizes[name]}
    parameters_only(masked)
    return Allocation(
        sizes=sizes,
        num_active=counts,
        sparsities={name: 1.0 - counts[name] / size for name, size in sizes.items()},
        maskable=tuple(masked),
        blocks=blocks_of({n: weight.shape for n, weight in weights.items()}, check_block(block)),
    )


def check_prunable(masked: Iterable[str], found: Allocation) -> None:
    """Refuse masks that are to be pruned further, if they belong to no layer that is pruned.

    Args:
        masked: Names of the layers that have a mask.
        found: What the layers are to become.

    Raises:
        ValueError: A mask belongs to no layer, or to one that is to be dense.
    """
    masked = list(masked)
    check_named(masked, found.sizes)
    for name in masked:
        if name not in found.maskable:
            raise ValueError(f"{name} has a mask, but is to be dense: prune it, too")


def check_named(masked: Iterable[str], names: Collection[str]) -> None:
    """Refuse masks that belong to no layer.

    Raises:
        ValueError: Names the first one.
    """
    for name in masked:
        if name not in names:
            raise ValueError(
                f"there is a mask for {name}, which is no weight that is made sparse here: name it "
                "in include, or leave its mask out"
            )
