"""Join a sparse method to the trainer: its log records, its checkpoint state, its costs."""

import glob
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import sparse
from cli.beginning import Beginning
from cli.flags import create_method, record
from image_classification import build, distributed
from image_classification.config import Config
from image_classification.run import Extension
from sparse import costs
from sparse.methods.beginning import check_agreement
from sparse.training.compression import GradientCompression


class Wire:
    """How gradients travel between processes.

    Args:
        mode: --grad-compress.
        sparsifier: Knows which weights are active; None in a dense run.
    """

    def __init__(self, mode: str, sparsifier: sparse.Sparsifier | None) -> None:
        self._mode, self._sparsifier = mode, sparsifier
        self._compression: GradientCompression | None = None

    def prepare(self, model: DistributedDataParallel) -> None:
        """Register the communication hook, if one is wanted."""
        dtype = torch.bfloat16 if "bf16" in self._mode else None
        if "active" in self._mode:
            assert self._sparsifier is not None
            self._compression = sparse.compress_gradients(model, self._sparsifier, dtype=dtype)
        elif dtype is not None:
            model.register_comm_hook(None, bf16_compress_hook)

    def metrics(self) -> dict[str, float]:
        """Return the bytes sent so far per byte that a plain all-reduce would have sent."""
        if self._compression is None or not self._compression.num_dense_bytes:
            return {}
        sent = self._compression.num_bytes / self._compression.num_dense_bytes
        return {"sparse.sent_ratio": sent}


def create_sparsifier(
    model: nn.Module,
    optimizer: Optimizer,
    total_steps: int,
    seed: int,
    *,
    flags: Any,
    epochs: int,
    beginning: Beginning | None = None,
) -> sparse.Sparsifier | None:
    """Hook the sparse method of `flags` to `optimizer`; a dense run is left alone."""
    num_active = None if beginning is None else beginning.num_active
    method = create_method(flags, total_steps, epochs, seed, num_active)
    if method is None:
        return None
    if num_active is not None:
        check_agreement(method, model, num_active)
    return sparse.Sparsifier(
        model,
        optimizer,
        method,
        masks=None if beginning is None else beginning.masks,
        track_exploration=method.grows,
        process_group=distributed.replicas(model),
    )


def try_out(
    c: Config,
    flags: Any,
    model: nn.Module,
    total_steps: int,
    beginning: Beginning | None = None,
) -> None:
    """Raise ValueError (one line) if flags do not fit the network or the run.

    Args:
        c: The flags of the trainer.
        flags: The sparse flags.
        model: The network on the meta device, where trying it out costs nothing.
        total_steps: Optimizer steps of the run.
        beginning: Masks that it begins with.
    """
    optimizer = build.stand_in_optimizer(c, model)
    masks = None if beginning is None else beginning.masks
    if beginning is not None:  # the numbers will do, where weights have no values
        beginning = Beginning(beginning.num_active)
    made = create_sparsifier(
        model, optimizer, total_steps, 0, flags=flags, epochs=c.epochs, beginning=beginning
    )
    if made is not None and masks is not None and isinstance(made.method, sparse.Allocated):
        made.method.begin_from(masks)


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    total_steps: int,
    seed: int,
    *,
    flags: Any,
    epochs: int,
    layers: Sequence[costs.LayerCost],
    beginning: Beginning | None = None,
) -> Extension:
    """Join the sparse method of `flags` to training.

    At the end of an epoch the raport gets the costs of the whole run as if its layers ended as
    sparse as they are then: "sparse.training_ratio" and "sparse.inference_ratio" to dense.

    Args:
        model: The model, like `optimizer`, `total_steps` and `seed` as the trainer hands them over.
        optimizer: Its optimizer.
        total_steps: Optimizer steps of the run.
        seed: Of all random choices.
        flags: The sparse flags.
        epochs: Epochs of the run.
        layers: Geometry of the model's layers.
        beginning: Masks that the run begins with.
    """
    sparsifier = create_sparsifier(
        model, optimizer, total_steps, seed, flags=flags, epochs=epochs, beginning=beginning
    )
    wire = Wire(flags.grad_compress, sparsifier)
    kept = record(flags, total_steps, epochs, None if beginning is None else beginning.num_active)
    if sparsifier is None:
        return Extension(prepare_ddp=wire.prepare, flags=kept)

    def metrics(*, per_layer: bool) -> dict[str, float]:
        values = sparsifier.metrics().items()
        return {f"sparse.{k}": v for k, v in values if k.startswith("sparsity.") == per_layer}

    sizes = {layer.name: layer.num_weights for layer in layers}

    def epoch_metrics() -> dict[str, float]:
        counts = sparsifier.num_active
        report = costs.report(
            layers,
            {name: counts[name] / sizes[name] for name in counts},
            method=sparsifier.method,
            total_steps=total_steps,
        )
        ratios = {f"sparse.{k}": report[k] for k in ("training_ratio", "inference_ratio")}
        return {**metrics(per_layer=True), **ratios}

    masked_at = -1

    def prepare_ema(averaged: nn.Module) -> None:
        # While the masks do not change, averages of zero weights stay zero.
        nonlocal masked_at
        if sparsifier.num_updates != masked_at:
            sparsifier.apply_to(averaged)
            masked_at = sparsifier.num_updates

    return Extension(
        metrics=lambda: {**metrics(per_layer=False), **wire.metrics()},
        epoch_metrics=epoch_metrics,
        bar=("sparse.sparsity",),
        prepare_ema=prepare_ema,
        prepare_ddp=wire.prepare,
        state={"sparse": sparsifier},
        flags=kept,
    )


class CheckpointCosts:
    """Sparsity and costs of a checkpoint's network; dense where it has no masks.

    Args:
        model: The network of the checkpoint.
        image_size: Side of its input.
        num_active: Layer name -> number of active weights, of the layers that have a mask.
        block: Outputs and inputs of the blocks of the masks, if they have such.
    """

    SHOWN = ("inference_flops", "inference_ratio", "size_mb")

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int,
        num_active: Mapping[str, int],
        block: Sequence[int] | None,
    ) -> None:
        masked = [glob.escape(name) for name in num_active]  # also those of --include
        self._layers = costs.trace_layers(model, image_size, include=masked)
        self._sizes = {name: p.numel() for name, p in sparse.prunable(model, masked).items()}
        self._active = {**self._sizes, **num_active}
        self._block = block

    def metrics(self) -> dict[str, float]:
        """Return overall sparsity, FLOPs and size, in the published convention."""
        densities = {name: count / self._sizes[name] for name, count in self._active.items()}
        report = costs.report(self._layers, densities, num_active=self._active, block=self._block)
        overall = 1 - sum(self._active.values()) / sum(self._sizes.values())
        return {
            "sparse.sparsity": overall,
            **{f"sparse.{name}": report[name] for name in self.SHOWN},
        }

    def layers(self) -> dict[str, float]:
        """Return the sparsity of every layer."""
        return {
            f"sparse.sparsity.{name.removesuffix('.weight')}": 1 - count / self._sizes[name]
            for name, count in self._active.items()
        }


def report_costs(
    model: nn.Module,
    optimizer: Optimizer,
    total_steps: int,
    seed: int,
    *,
    image_size: int,
    num_active: Mapping[str, int],
    block: Sequence[int] | None,
) -> Extension:
    """Let an evaluation report the sparsity and the costs of its checkpoint."""
    found = CheckpointCosts(model, image_size=image_size, num_active=num_active, block=block)
    bar = [f"sparse.{name}" for name in ("sparsity", *CheckpointCosts.SHOWN)]
    return Extension(metrics=found.metrics, epoch_metrics=found.layers, bar=bar)
