"""What a sparse network costs: FLOPs of a forward pass, FLOPs of a training run, bytes of a file.

Operations are those of the weights of convolutions, linear and recurrent layers and attention, for
one image. The geometry and the conventions of counting come from `sparse.geometry`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .geometry import CONVENTIONS, Convention, LayerCost, trace_layers
from .methods.base import Allocated, Method

__all__ = [
    "CONVENTIONS",
    "Convention",
    "Densities",
    "LayerCost",
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
    block: Sequence[int] | None = None,
) -> float:
    """Return the bytes of the weights: 32-bit values, a 1-bit mask per sparse layer, biases.

    With a block, outputs and inputs that are active together, the mask of a layer that the block
    divides has a bit per block. Normalization layers are not included. Real densities give
    fractions of a byte, as published.

    Raises:
        ValueError: As for `inference_flops`, or no block of at least 1 x 1.
    """
    densities = _checked(layers, densities, convention)
    bits = (layer.size_bits(densities.get(layer.name, 1.0), convention, block) for layer in layers)
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
    method: Method | None,
    ratio: float,
    *,
    multiplier: float = 1.0,
    total_steps: int | None = None,
) -> float:
    """Return the FLOPs of a training run, relative to a dense run of length 1.

    A dense step costs 3 forward passes: one forward, two backward. What a step of a sparse method
    costs is said by its `step_flops`.

    Args:
        method: None for training with fixed masks; with a ratio of 1 this is dense training.
        ratio: Inference operations relative to dense, in [0, 1].
        multiplier: Training length in units of the dense run's.
        total_steps: Optimizer steps of the run, which gmp needs.

    Raises:
        ValueError: gmp without `total_steps`.

    Source: RigL, appendix on FLOPs (Evci et al. 2020).
    """
    step = 3.0 * ratio if method is None else method.step_flops(1.0, ratio, total_steps)
    return multiplier * step / 3.0


def report(
    layers: Sequence[LayerCost],
    densities: Densities | None = None,
    *,
    method: Method | None = None,
    convention: Convention = "published",
    multiplier: float = 1.0,
    total_steps: int | None = None,
    num_active: Mapping[str, int] | None = None,
    block: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return all costs of a network and its training, ready for `json.dumps`.

    Args:
        layers: Result of `trace_layers`.
        densities: Final density per parameter; layers left out are dense.
        method: As for `training_ratio`, like `multiplier` and `total_steps`.
        convention: How operations and bytes are counted.
        num_active: Exact numbers of active weights; rounded from the densities by default. Only
            `num_active` and `overall_sparsity` depend on them.
        block: As for `size_bytes`; by default as the method says.

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
    if block is None and isinstance(method, Allocated):
        block = method.block
    active = num_active or {}
    rows = [_layer_report(layer, densities, convention, active, block) for layer in layers]
    flops = inference_flops(layers, densities, convention)
    dense = inference_flops(layers, None, convention)
    total = sum(layer.num_weights for layer in layers)
    return {
        "convention": convention,
        "inference_flops": flops,
        "dense_flops": dense,
        "inference_ratio": flops / dense,
        "training_ratio": training_ratio(
            method, flops / dense, multiplier=multiplier, total_steps=total_steps
        ),
        "macs": inference_flops(layers, densities, "macs"),
        "dense_macs": inference_flops(layers, None, "macs"),
        "size_mb": size_bytes(layers, densities, convention, block) / 1e6,
        "dense_size_mb": size_bytes(layers, None, convention) / 1e6,
        "overall_sparsity": 1 - sum(row["num_active"] for row in rows) / total,
        "layers": rows,
    }


def _layer_report(
    layer: LayerCost,
    densities: Densities,
    convention: Convention,
    num_active: Mapping[str, int],
    block: Sequence[int] | None,
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
        "size_bytes": layer.size_bits(density, convention, block) / 8,
    }
