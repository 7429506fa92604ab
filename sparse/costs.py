"""What a sparse network costs: FLOPs of a forward pass, FLOPs of a training run, bytes of a file.

Operations are those of the weights of convolutions and linear layers, for one image. The geometry
and the conventions of counting come from `sparse.geometry`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sparse.geometry import CONVENTIONS, Convention, LayerCost, trace_layers

__all__ = [
    "CONVENTIONS",
    "Convention",
    "Densities",
    "LayerCost",
    "gmp_mean_ramp",
    "inference_flops",
    "report",
    "size_bytes",
    "trace_layers",
    "training_ratio",
]

Densities = Mapping[str, float]
"""Parameter name -> share of active weights in [0, 1]; a layer without an entry is dense."""


def inference_flops(
    layers: Sequence[LayerCost],
    densities: Densities | None = None,
    convention: Convention = "published",
) -> float:
    """Return the operations of one forward pass of one image (multiply-accumulates for "macs").

    Raises:
        ValueError: A density outside [0, 1], a name that is no layer, or an unknown convention.
    """
    densities = _checked(layers, densities, convention)
    return sum(layer.flops(densities.get(layer.name, 1.0), convention) for layer in layers)


def size_bytes(
    layers: Sequence[LayerCost],
    densities: Densities | None = None,
    convention: Convention = "published",
) -> float:
    """Return the bytes of the weights: 32-bit values, a 1-bit mask per sparse layer, biases.

    Normalization layers are not included. Real densities give fractions of a byte, as published.

    Raises:
        ValueError: As for `inference_flops`.
    """
    densities = _checked(layers, densities, convention)
    bits = (layer.size_bits(densities.get(layer.name, 1.0), convention) for layer in layers)
    return sum(bits) / 8


def _checked(
    layers: Sequence[LayerCost], densities: Densities | None, convention: str
) -> Densities:
    if convention not in CONVENTIONS:
        raise ValueError(f"convention {convention!r} is none of {', '.join(CONVENTIONS)}")
    known = {layer.name for layer in layers}
    for name, density in (densities or {}).items():
        if name not in known:
            raise ValueError(f"density of {name!r}: the traced model has no such layer")
        if not 0 <= density <= 1:
            raise ValueError(f"density of {name!r} must be in [0, 1], got {density}")
    return densities or {}


def training_ratio(
    method: str,
    ratio: float,
    *,
    delta_t: int = 100,
    multiplier: float = 1.0,
    mean_ramp: float | None = None,
) -> float:
    """Return the FLOPs of a training run, relative to a dense run of length 1.

    A dense step costs 3 forward passes: one forward, two backward. Let f be the inference ratio of
    the sparse network. A step costs 3 f with fixed masks or random growth. A step of SNFS costs
    2 f + 1, because it needs the dense weight gradient. RigL needs the dense gradient in one step
    of delta_t + 1, which gives (3 f delta_t + 2 f + 1) / (delta_t + 1) on average; this is
    amortized over the whole run, as in the published tables. Gradual pruning starts dense;
    operations are linear in the density, so its mean cost follows from the mean of its ramp. The
    single dense gradient of SNIP is not counted.

    Args:
        method: dense, static, set, snip, rigl_reset, snfs, rigl or gmp.
        ratio: Inference operations relative to dense, in [0, 1].
        delta_t: RigL's optimizer steps between updates.
        multiplier: Training length in units of the dense run's.
        mean_ramp: Result of `gmp_mean_ramp` for gmp, which needs it; ignored by the others.

    Raises:
        ValueError: An unknown method, or gmp without `mean_ramp`.

    Source: RigL, appendix on FLOPs (Evci et al. 2020).
    """
    if method == "dense":
        return multiplier
    if method in ("static", "set", "snip", "rigl_reset"):
        return multiplier * ratio
    if method == "snfs":
        return multiplier * (2 * ratio + 1) / 3
    if method == "rigl":
        return multiplier * (3 * ratio * delta_t + 2 * ratio + 1) / (3 * (delta_t + 1))
    if method == "gmp":
        if mean_ramp is None:
            raise ValueError("the cost of gmp depends on its ramp: pass mean_ramp")
        return multiplier * (1 - mean_ramp * (1 - ratio))
    raise ValueError(f"no training cost is known for method {method!r}")


def gmp_mean_ramp(*, start: int, end: int, every: int, total_steps: int) -> float:
    """Return the mean of sparsity / final sparsity over a run of gradual pruning.

    Between two prunings the sparsity does not change. After t steps it is the sparsity of the last
    pruning, at step t': the share 1 - (1 - p)^3 of the final sparsity, with
    p = (t' - start) / (end - start).

    Args:
        start: Step of the first pruning, which removes nothing.
        end: Step at which the ramp ends.
        every: Steps between prunings.
        total_steps: Length of the run; steps at and after `end` have the final sparsity.

    Raises:
        ValueError: Unless 0 <= start < end, every >= 1 and total_steps >= 1.
    """
    if not 0 <= start < end or every < 1 or total_steps < 1:
        raise ValueError(
            f"no ramp: start={start}, end={end}, every={every}, total_steps={total_steps}"
        )
    total = 0.0
    ramp_end = min(end, total_steps)
    for step in range(start, ramp_end, every):
        share = 1 - (1 - (step - start) / (end - start)) ** 3
        total += share * (min(step + every, ramp_end) - step)
    return (total + max(0, total_steps - end)) / total_steps


def report(
    layers: Sequence[LayerCost],
    densities: Densities | None = None,
    *,
    method: str = "static",
    convention: Convention = "published",
    delta_t: int = 100,
    multiplier: float = 1.0,
    mean_ramp: float | None = None,
    num_active: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return all costs of a network and its training, ready for `json.dumps`.

    Args:
        layers: Result of `trace_layers`.
        densities: Final density per parameter; layers left out are dense.
        method: As for `training_ratio`, like `delta_t`, `multiplier` and `mean_ramp`.
        convention: How operations and bytes are counted.
        num_active: Exact numbers of active weights; rounded from the densities by default. Only
            `num_active` and `overall_sparsity` depend on them.

    Returns:
        inference_flops: Operations of one forward pass of one image.
        inference_ratio: The same relative to the dense network.
        training_ratio: See `training_ratio`.
        size_mb: Stored bytes in units of 10^6.
        overall_sparsity: Share of inactive weights over all layers, dense ones included.
        layers: The same per layer.
        convention, dense_flops, macs, dense_macs, dense_size_mb: For comparison.
    """
    densities = _checked(layers, densities, convention)
    rows = [_layer_report(layer, densities, convention, num_active or {}) for layer in layers]
    flops = inference_flops(layers, densities, convention)
    dense = inference_flops(layers, None, convention)
    total = sum(layer.num_weights for layer in layers)
    return {
        "convention": convention,
        "inference_flops": flops,
        "dense_flops": dense,
        "inference_ratio": flops / dense,
        "training_ratio": training_ratio(
            method, flops / dense, delta_t=delta_t, multiplier=multiplier, mean_ramp=mean_ramp
        ),
        "macs": inference_flops(layers, densities, "macs"),
        "dense_macs": inference_flops(layers, None, "macs"),
        "size_mb": size_bytes(layers, densities, convention) / 1e6,
        "dense_size_mb": size_bytes(layers, None, convention) / 1e6,
        "overall_sparsity": 1 - sum(row["num_active"] for row in rows) / total,
        "layers": rows,
    }


def _layer_report(
    layer: LayerCost,
    densities: Densities,
    convention: Convention,
    num_active: Mapping[str, int],
) -> dict[str, Any]:
    density = densities.get(layer.name, 1.0)
    return {
        "name": layer.name,
        "shape": list(layer.shape),
        "num_weights": layer.num_weights,
        "num_active": num_active.get(layer.name, round(layer.num_weights * density)),
        "density": density,
        "dense_flops": layer.flops(1.0, convention),
        "flops": layer.flops(density, convention),
        "macs": layer.flops(density, "macs"),
        "size_bytes": layer.size_bits(density, convention) / 8,
    }
