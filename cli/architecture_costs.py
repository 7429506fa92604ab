"""Costs of an architecture at a sparsity: FLOPs, training FLOPs and bytes, as numbers and text."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

import sparse
from cli.flags import find_method
from image_classification import models
from sparse import costs
from sparse.methods.allocation import unless_included
from sparse.methods.layers import included
from sparse.methods.settings import complete, names_of
from sparse.topology.blocks import blocks_of, check_block
from sparse.topology.distributions import count_active, layer_sparsities


def report_network(
    arch: str,
    *,
    image_size: int | None = None,
    num_classes: int = 1000,
    sparsity: float = 0.0,
    distribution: str = "erk",
    dense_layers: Sequence[str] | None = None,
    include: Sequence[str] | None = None,
    rounding: str = "floor",
    reshaped: Mapping[str, tuple[int, ...]] | None = None,
    block: Sequence[int] | None = None,
    method: str = "dense",
    settings: Mapping[str, Any] | None = None,
    exact: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Return `sparse.costs.report` of an architecture at a sparsity.

    With `exact` and the counts of layers unknown before training, all costs are None, and only
    `overall_sparsity` is there.

    Args:
        arch: A name that `image_classification.models` knows.
        image_size: Side of the input; the architecture's own by default.
        num_classes: Length of the logits.
        sparsity, distribution, dense_layers, rounding: As for `sparse.allocate`.
        include: As for `sparse.prunable`.
        reshaped: Shapes to give to the distribution in place of a layer's own.
        block: Outputs and inputs that are active together.
        method: Of training, as main.py --sparse-method.
        settings: Of the method, or in epochs under the name of the flag; those that it does not
            have are passed over.
        exact: Count active weights as the method leaves them in the end, as --dry-run does. Another
            rounding and other shapes have counts of their own.
        **options: Further arguments of `sparse.costs.report`.
    """
    layers, model = _trace(arch, image_size, num_classes, tuple(include or ()))
    shapes = {name: tuple(p.shape) for name, p in sparse.prunable(model, include).items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if method != "dense":
        given = {"sparsity": sparsity, "block": block, **(settings or {})}
        options["method"] = _method(method, given)
    if sparsity == 0:
        return costs.report(layers, **options)
    counts: Mapping[str, int] | None = None
    if exact and method != "dense" and rounding == "floor" and not reshaped:
        fitted = dataclasses.replace(
            options["method"], distribution=distribution, dense_layers=dense_layers, include=include
        ).fitted_to(model)
        counts = fitted.final_counts
        if counts is None:
            known = {"overall_sparsity": 1 - fitted.final_total / sum(sizes.values())}
            return dict.fromkeys(UNKNOWN) | known
    solved = layer_sparsities(
        {**shapes, **(reshaped or {})},
        sparsity=sparsity,
        distribution=distribution,
        dense_layers=unless_included(dense_layers, shapes, included(model, include)),
        rounding=rounding,
    )
    blocks = blocks_of(shapes, check_block(block))
    nominal = {
        name: count_active(sizes[name], zeros, blocks.numel(name)) for name, zeros in solved.items()
    }
    return costs.report(
        layers,
        {name: 1 - zeros for name, zeros in solved.items()},
        num_active=counts or nominal,
        **options,
    )


UNKNOWN = ("inference_flops", "inference_ratio", "training_ratio", "size_mb")
"""Costs that depend on how training shares out the weights among the layers."""


def _method(name: str, settings: Mapping[str, Any]) -> sparse.Allocated:
    """Return a method of which only the costs are asked."""
    method = find_method(name)
    given = {name: settings[name] for name in names_of(method) if name in settings}
    steps = settings.get("total_steps", math.inf)
    return method(**complete(method, given, steps, steps / settings.get("epochs", 1), 1.0))


@functools.cache
def _trace(
    arch: str, image_size: int | None, num_classes: int, include: tuple[str, ...]
) -> tuple[list[costs.LayerCost], nn.Module]:
    with torch.device("meta"):
        model = models.create_model(arch, num_classes=num_classes)
    side = image_size or models.default_image_size(arch)
    models.check_image_size(model, arch, side)
    return costs.trace_layers(model, side, include=include), model


def format_report(report: Mapping[str, Any]) -> str:
    """Return the report as text."""
    width = max(len(layer["name"]) for layer in report["layers"])
    unit = "MMACs" if report["convention"] == "macs" else "MFLOPs"
    lines = [
        f"{'':{width}}  {'weights':>10}  {'active':>10}  {'density':>7}  {'dense':>9}  "
        f"{'sparse':>9}  {'size':>9}",
        f"{'layer':{width}}  {'':10}  {'':10}  {'':7}  {unit:>9}  {unit:>9}  {'kB':>9}",
    ]
    lines += [
        f"{x['name']:{width}}  {x['num_weights']:10,}  {x['num_active']:10,}  {x['density']:7.4f}"
        f"  {x['dense_flops'] / 1e6:9.2f}  {x['flops'] / 1e6:9.2f}  {x['size_bytes'] / 1e3:9.1f}"
        for x in report["layers"]
    ]
    ops = "multiply-accumulates" if unit == "MMACs" else "FLOPs (multiplies + adds)"
    lines += [
        "",
        f"inference   {report['inference_flops']:.4e} {ops}, {report['inference_ratio']:.4f} of "
        f"dense; {report['macs']:.4e} multiply-accumulates",
        f"training    {report['training_ratio']:.4f} of a dense run of length 1",
        f"size        {report['size_mb']:.3f} MB, dense {report['dense_size_mb']:.3f} MB",
        f"sparsity    {report['overall_sparsity']:.4f} over all layers",
        f"convention  {report['convention']}",
    ]
    return "\n".join(lines)
