"""Distribute a sparsity over layers: from shapes to exact numbers of active weights."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, get_args

from ..errors import check_number
from .blocks import blocks_of, check_block

Distribution = Literal["uniform", "er", "erk"]
Rounding = Literal["floor", "ceil"]
Shape = Sequence[int]


def allocate(
    shapes: Mapping[str, Shape],
    *,
    sparsity: float,
    distribution: str = "erk",
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    sparsity_map: Mapping[str, float] | None = None,
    rounding: str = "floor",
    block: Sequence[int] | None = None,
) -> dict[str, int]:
    """Give every layer its number of active weights.

    A layer of n weights at sparsity s has exactly floor(s * n) zeros (double arithmetic), as in the
    RigL repository. The arguments are those of `layer_sparsities`, and `block`: outputs and inputs
    of the blocks of weights that are active together. Layers that it divides have whole blocks.

    Returns:
        Layer name -> number of active weights, in the order of `shapes`.
    """
    per_layer = layer_sparsities(
        shapes,
        sparsity=sparsity,
        distribution=distribution,
        power_scale=power_scale,
        dense_layers=dense_layers,
        sparsity_map=sparsity_map,
        rounding=rounding,
    )
    blocks = blocks_of(shapes, check_block(block))
    return {
        name: count_active(math.prod(shape), per_layer[name], blocks.numel(name))
        for name, shape in shapes.items()
    }


def count_active(numel: int, sparsity: float, block: int = 1) -> int:
    """Compute numel - floor(sparsity * numel), the active weights of a layer.

    Where a block has several weights, it is the number of blocks that is computed so.
    """
    num_blocks = numel // block
    return block * (num_blocks - math.floor(sparsity * num_blocks))


def layer_sparsities(
    shapes: Mapping[str, Shape],
    *,
    sparsity: float,
    distribution: str = "erk",
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    sparsity_map: Mapping[str, float] | None = None,
    rounding: str = "floor",
) -> dict[str, float]:
    """Give every layer its sparsity, a fraction of zeros in [0, 1).

    Args:
        shapes: Layer name -> weight shape in PyTorch's order (outputs, inputs, kernel...).
        sparsity: Wanted fraction of zeros in [0, 1) over the layers that are neither dense nor in
            `sparsity_map`.
        distribution: "uniform" gives every layer the same sparsity; "erk" (Erdos-Renyi-Kernel,
            Evci et al. 2020, section 3) makes density proportional to sum(shape) / prod(shape);
            "er" (Mocanu et al. 2018) to (n_in + n_out) / (n_in * n_out), whatever the kernel size.
        power_scale: Exponent of the ERK ratio; only ERK has one.
        dense_layers: Globs of layers that stay dense and take no part in the budget. None means the
            default of the distribution: the first layer for "uniform", none for "er" and "erk".
            A glob is compared with the name, with and without a trailing ".weight".
        sparsity_map: Glob -> fixed sparsity in [0, 1). These layers take no part in the budget
            either. If globs overlap, the later one counts.
        rounding: How the zeros are rounded in the ER and ERK budget equation: "floor" as in the
            RigL repository today, or "ceil" as before October 2020 (for its published tables).

    Returns:
        Layer name -> sparsity, in the order of `shapes`. Layers whose ER or ERK density would
        exceed one are dense (0.0). The other layers then get a higher sparsity.

    Raises:
        ValueError: A value is out of range, or a glob matches no layer.
    """
    _check(sparsity, distribution, power_scale, rounding)
    fixed = fixed_sparsities(shapes, distribution, dense_layers, sparsity_map)
    free = {name: tuple(shape) for name, shape in shapes.items() if name not in fixed}
    if distribution == "uniform":
        solved = dict.fromkeys(free, float(sparsity))
    else:
        ratio = _er_ratio if distribution == "er" else _erk_ratio
        raw = {name: ratio(shape) ** power_scale for name, shape in free.items()}
        sizes = {name: math.prod(shape) for name, shape in free.items()}
        solved = _solve_budget(raw, sizes, sparsity, rounding)
    return {name: fixed[name] if name in fixed else solved[name] for name in shapes}


def _check(sparsity: float, distribution: str, power_scale: float, rounding: str) -> None:
    check_sparsity(sparsity)
    check_number("power_scale", power_scale)
    if distribution not in get_args(Distribution):
        raise ValueError(f"distribution must be uniform, er or erk, got {distribution!r}")
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding must be floor or ceil, got {rounding!r}")
    if power_scale != 1.0 and distribution != "erk":
        raise ValueError(f"power_scale has no effect with distribution {distribution!r}, only erk")
    if power_scale < 0.0:
        raise ValueError(f"power_scale must not be negative, got {power_scale}")


def check_sparsity(sparsity: float) -> None:
    """Refuse a sparsity that is out of range.

    Raises:
        ValueError: Names the value.
    """
    check_number("sparsity", sparsity)
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")


def fixed_sparsities(
    shapes: Mapping[str, Shape],
    distribution: str,
    dense_layers: Sequence[str] | None,
    sparsity_map: Mapping[str, float] | None,
) -> dict[str, float]:
    """List the layers that take no part in the budget, with their sparsities (0 for dense ones).

    The arguments are those of `layer_sparsities`.

    Raises:
        ValueError: A glob matches no layer, a layer is named twice, or a sparsity is out of range.
    """
    if isinstance(dense_layers, str) or not all(isinstance(g, str) for g in dense_layers or ()):
        raise ValueError(f"dense_layers must be a sequence of globs, got {dense_layers!r}")
    if not isinstance(sparsity_map, Mapping | None):
        raise ValueError(f"sparsity_map must map globs to sparsities, got {sparsity_map!r}")
    mapped: dict[str, float] = {}
    for glob, value in (sparsity_map or {}).items():
        check_number(f"sparsity_map: the sparsity of {glob!r}", value)
        if not 0.0 <= value < 1.0:
            raise ValueError(
                f"sparsity_map: the sparsity of {glob!r} must be in [0, 1), got {value}"
            )
        mapped.update(dict.fromkeys(match_layers(glob, shapes, "sparsity_map"), float(value)))
    if dense_layers is None:
        first = list(shapes)[:1] if distribution == "uniform" else []
        return dict.fromkeys(first, 0.0) | mapped
    dense = {name for glob in dense_layers for name in match_layers(glob, shapes, "dense_layers")}
    for name in dense & mapped.keys():
        raise ValueError(f"{name!r} is in dense_layers and in sparsity_map; keep one of them")
    return dict.fromkeys(dense, 0.0) | mapped


def matches(glob: str, name: str) -> bool:
    """Say whether a glob matches a name, with or without its trailing ".weight"."""
    return fnmatchcase(name, glob) or fnmatchcase(name.removesuffix(".weight"), glob)


def match_layers(glob: str, names: Mapping[str, object], source: str) -> list[str]:
    """List the names that a glob matches, with or without their trailing ".weight".

    Raises:
        ValueError: Nothing matches. The message names `source`, the argument that had the glob.
    """
    found = [name for name in names if matches(glob, name)]
    if not found:
        raise ValueError(
            f"{source}: {glob!r} matches no prunable layer; the first ones are "
            + ", ".join(list(names)[:3])
        )
    return found


def _erk_ratio(shape: tuple[int, ...]) -> float:
    return sum(shape) / math.prod(shape)


def _er_ratio(shape: tuple[int, ...]) -> float:
    return (shape[0] + shape[1]) / (shape[0] * shape[1])


def _solve_budget(
    raw: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, rounding: str
) -> dict[str, float]:
    """Find the factor that turns raw ratios into densities which together meet the sparsity.

    If a density would exceed one, the layers with the largest ratio become dense, and the factor is
    computed again for the other layers. The RigL repository does the same.
    """
    round_ = math.floor if rounding == "floor" else math.ceil
    zeros = {name: round_(sparsity * size) for name, size in sizes.items()}
    dense: set[str] = set()
    while len(dense) < len(raw):
        budget = divisor = 0.0
        # One running sum in layer order: the published densities depend on the last bit.
        for name, size in sizes.items():
            if name in dense:
                budget -= zeros[name]
            else:
                budget += size - zeros[name]
                divisor += raw[name] * size
        if divisor == 0.0:
            raise ValueError("power_scale is so large that a layer's density cannot be computed")
        factor = budget / divisor
        largest = max(raw[name] for name in raw if name not in dense)
        if largest * factor <= 1.0:
            return {name: 0.0 if name in dense else 1.0 - factor * raw[name] for name in raw}
        dense |= {name for name in raw if raw[name] == largest}
    return dict.fromkeys(raw, 0.0)  # the sparsity is so small that no layer has a whole zero
