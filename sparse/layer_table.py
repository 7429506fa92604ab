"""A table of the layers of a model: how dense each of them is, and what it costs."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .costs import LayerCost, inference_flops, trace_layers
from .methods.layers import included, prunable_modules, unwrap, weights_of
from .topology.flat import count_nonzero
from .training.masked import MaskedModel

_HEAD = ("layer", "shape", "density", "active")


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """One prunable weight."""

    name: str
    shape: tuple[int, ...]
    num_active: int
    flops_share: float | None
    """Its share of the FLOPs of the model as it is, in [0, 1]; None without an input shape."""

    @property
    def num_weights(self) -> int:
        """Number of weights, active or not."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What `summary` returns: print it, or let a notebook show it."""

    layers: tuple[LayerSummary, ...]
    num_other_parameters: int
    """Parameters that are never sparse: biases, normalization, embeddings and so on."""
    flops: float | None
    """Multiplies and adds of a forward pass of one input; None without an input shape."""
    dense_flops: float | None
    """The same if all weights were active."""

    @property
    def sparsity(self) -> float:
        """Share of inactive weights over all prunable layers, as `metrics()` gives it."""
        return 1.0 - self._num_active / self._num_weights

    @property
    def _num_active(self) -> int:
        return sum(layer.num_active for layer in self.layers)

    @property
    def _num_weights(self) -> int:
        return sum(layer.num_weights for layer in self.layers)

    def __str__(self) -> str:
        rows = [self._head(), *self._body(), *self._totals()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
            cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
            lines.append("  ".join(cells).rstrip())
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:], *self._cost()])

    def _repr_html_(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

        body = "".join(row(cells, "td") for cells in self._body())
        totals = "".join(row(cells, "th") for cells in self._totals())
        table = f"<thead>{row(self._head(), 'th')}</thead><tbody>{body}</tbody>"
        note = "".join(f"<p>{line}</p>" for line in self._cost())
        return f"<table>{table}<tfoot>{totals}</tfoot></table>{note}"

    def _head(self) -> list[str]:
        return [*_HEAD, *(["FLOPs"] if self.flops is not None else [])]

    def _body(self) -> list[list[str]]:
        return [
            [
                layer.name,
                " x ".join(map(str, layer.shape)),
                *_counts(layer.num_active, layer.num_weights),
                *([] if layer.flops_share is None else [f"{layer.flops_share:.1%}"]),
            ]
            for layer in self.layers
        ]

    def _totals(self) -> list[list[str]]:
        shares = [layer.flops_share for layer in self.layers if layer.flops_share is not None]
        active, weights, others = self._num_active, self._num_weights, self.num_other_parameters
        totals = [
            [f"{len(self.layers)} layers", "", *_counts(active, weights)],
            ["all parameters", "", *_counts(active + others, weights + others)],
        ]
        if self.flops is not None:
            totals = [[*totals[0], f"{sum(shares):.1%}"], [*totals[1], "100.0%"]]
        return totals

    def _cost(self) -> list[str]:
        if self.flops is None or self.dense_flops is None:
            return []
        ratio = self.flops / self.dense_flops
        return [f"{self.flops:.3g} FLOPs for one input, {ratio:.1%} of the dense model's"]


def summary(
    model: nn.Module | MaskedModel,
    input_shape: tuple[int, int, int] | None = None,
    *,
    inputs: Sequence[Any] | None = None,
    include: Sequence[str] | None = None,
) -> Summary:
    """Tabulate the prunable layers of a model: shape, density, active weights, share of the FLOPs.

    The table has FLOPs only if it is told what goes into the model. These are the multiplies and
    adds in the real geometry, the convention "true" of `sparse.costs`.

    Args:
        model: A sparsifier, whose masks say what is active, or a model, in which every weight that
            is not 0 counts as active.
        input_shape: Channels and sides of one square image, such as (3, 224, 224).
        inputs: Positional arguments of the model in place of an image, see `trace_layers`.
        include: Globs of further weights of a model, see `prunable`. A sparsifier knows its own.

    Raises:
        ValueError: The model has no prunable layer, or an argument makes no sense.
    """
    if isinstance(model, MaskedModel):
        if include is not None:
            raise ValueError("include has no effect with a sparsifier, which knows its weights")
        network, active = unwrap(model.model), model.num_active
        include = list(active)
        weights = weights_of(prunable_modules(network, active))
    else:
        network = unwrap(model)
        weights = weights_of(prunable_modules(network, included(network, include)))
        active = _count_nonzero(weights)
    shares: Mapping[str, float] = {}
    flops = dense_flops = None
    if input_shape is not None or inputs is not None:
        traced = _trace(network, input_shape, inputs, include, list(weights))
        densities = {name: active[name] / weight.numel() for name, weight in weights.items()}
        densities = {layer.name: densities.get(layer.name, 1.0) for layer in traced}
        flops = inference_flops(traced, densities, "true")
        dense_flops = inference_flops(traced, None, "true")
        shares = {c.name: c.flops(densities[c.name], "true") / flops for c in traced}
    layers = tuple(
        LayerSummary(
            name=name,
            shape=tuple(weight.shape),
            num_active=active[name],
            flops_share=None if flops is None else shares[name],
        )
        for name, weight in weights.items()
    )
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    return Summary(
        layers=layers,
        num_other_parameters=num_parameters - sum(layer.num_weights for layer in layers),
        flops=flops,
        dense_flops=dense_flops,
    )


def _trace(
    network: nn.Module,
    shape: tuple[int, int, int] | None,
    inputs: Sequence[Any] | None,
    include: Sequence[str] | None,
    names: list[str],
) -> list[LayerCost]:
    if shape is None:
        traced = trace_layers(network, inputs=inputs, include=include)
    elif inputs is not None or len(shape) != 3 or shape[1] != shape[2]:
        also = ", without inputs" if inputs is not None else ""
        raise ValueError(f"input_shape must be (channels, side, side){also}, got {shape}")
    else:
        traced = trace_layers(network, shape[1], in_channels=shape[0], include=include)
    for name in set(names) - {layer.name for layer in traced}:
        raise ValueError(
            f"the FLOPs of {name} are unknown, as it is computed from other parameters: leave the "
            "input out"
        )
    return traced


def _count_nonzero(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Count weights that are not 0. What is computed from other parameters is dense."""
    parameters = {name: w.detach() for name, w in weights.items() if isinstance(w, nn.Parameter)}
    counts = count_nonzero(parameters).tolist() if parameters else []
    return {name: w.numel() for name, w in weights.items()} | dict(
        zip(parameters, counts, strict=True)
    )


def _counts(active: int, total: int) -> list[str]:
    return [f"{active / total:.1%}", f"{active:,} of {total:,}"]
