# Written by `python scripts/derive.py` from the records of the methods.

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from .training.sparsifier import Sparsifier

__all__ = [
    "acdc",
    "gap",
    "gmp",
    "granet",
    "magnitude",
    "rigl",
    "rigl_reset",
    "set",
    "snfs",
    "snip",
    "srigl",
    "static",
]

def acdc(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    sparsity: float,
    distribution: Literal["uniform", "er", "erk"] | None = None,
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    sparsity_map: Mapping[str, float] | None = None,
    include: Sequence[str] | None = None,
    block: Sequence[int] | None = None,
    scope: Literal["layer", "global"] = "layer",
    total_steps: int,
    dense_warmup: int,
    sparse_phase: int,
    dense_phase: int,
    last_dense: int,
    last_sparse: int,
    hooks: bool = True,
    track_exploration: bool = False,
    process_group: ProcessGroup | None = None,
) -> Sparsifier:
    """AC/DC: train sparse and dense in turn, and sparse in the end (Peste et al. 2021).

    A compression keeps the largest weights, a decompression makes all weights active again: the
    pruned ones begin at 0, and the optimizer's state of all parameters is reset. Of n weights a
    compression keeps ceil(n * (1 - s)) - 1, as the original does.

    Attributes:
        events: Step -> whether the network is sparse from this step on, or else dense.

    Args:
        sparsity: Fraction of zero weights, in [0, 1).
        distribution: How sparsity is spread over layers; erk by default.
        power_scale: Exponent of the ERK ratio.
        dense_layers: Globs of layers kept dense; by default uniform's first layer.
        sparsity_map: Layer globs and their sparsities.
        include: Globs of further weights to make sparse.
        block: Outputs and inputs that are active together: 1 4.
        scope: Rank weights within layers or over all.
        total_steps: Optimizer steps of acdc's run.
        dense_warmup: Optimizer steps before acdc's first compression, at least 1.
        sparse_phase: Optimizer steps from acdc's compression to decompression, at least 1.
        dense_phase: Optimizer steps from acdc's decompression to compression, at least 1.
        last_dense: Optimizer steps of acdc's last dense phase, at least 1.
        last_sparse: Optimizer steps of acdc's last sparse phase, at least 1.
        hooks: Whether to hook the optimizer's steps; see `Sparsifier`.
        track_exploration: Whether to record which weights were ever active.
        process_group: The processes that train this model, where neither DistributedDataParallel
            nor sharded weights tell it; see `Sparsifier`.
    """

def gap(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    sparsity: float = ...,
    distribution: Literal["uniform", "er", "erk"] | None = "erk",
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    sparsity_map: Mapping[str, float] | None = None,
    include: Sequence[str] | None = None,
    block: Sequence[int] | None = None,
    partitions: Sequence[str] | None = None,
    phase: int,
    mask_init: Literal["random", "magnitude"] = "random",
    num_phases: int = 8,
    masks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    hooks: bool = True,
    track_exploration: bool = False,
    process_group: ProcessGroup | None = None,
) -> Sparsifier:
    """GaP: one partition of the layers is dense at a time, in turn (Ma et al. 2022, C-GaP).

    After every phase the dense partition is pruned by magnitude, layer by layer, and the next one
    grows to dense: its pruned weights begin at 0. The optimizer begins anew with every phase. After
    the last phase all layers are sparse, and the masks stay. Layers in no partition are dense.

    Attributes:
        members: The layers of every partition.

    Args:
        sparsity: Fraction of zero weights, in [0, 1).
        distribution: How sparsity is spread over layers; erk by default.
        power_scale: Exponent of the ERK ratio.
        dense_layers: Globs of layers kept dense; by default uniform's first layer.
        sparsity_map: Layer globs and their sparsities.
        include: Globs of further weights to make sparse.
        block: Outputs and inputs that are active together: 1 4.
        partitions: Globs of gap's partitions in turn, those of one joined by commas; by default the
            stages of a ResNet.
        phase: Optimizer steps that gap trains with a partition dense, at least 1.
        mask_init: Masks gap begins with: random, or the largest weights.
        num_phases: Phases of gap, at least 1; what is left of the run is sparse.
        masks: Bool masks to begin with, by name; layers without one begin dense, and sparsity may
            be left out.
        seed: Seed of masks and all other random choices; the same on all ranks.
        hooks: Whether to hook the optimizer's steps; see `Sparsifier`.
        track_exploration: Whether to record which weights were ever active.
        process_group: The processes that train this model, where neither DistributedDataParallel
            nor sharded weights tell it; see `Sparsifier`.
    """

def gmp(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    sparsity: float,
    distribution: Literal["uniform", "er", "erk"] | None = None,
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    sparsity_map: Mapping[str, float] | None = None,
    include: Sequence[str] | None = None,
    block: Sequence[int] | None = None,
    scope: Literal["layer", "global"] = "layer",
    prune_start: int = 0,
    prune_end: int,
    prune_every: int = 100,
    masks: Mapping[str, Tensor] | None = None,
    hooks: bool = True,
    process_group: ProcessGroup | None = None,
) -> Sparsifier:
    """Gradual magnitude pruning along a cubic ramp (Zhu & Gupta 2017).

    Of n weights, round(n * (1 - s(t))) are kept. Pruned weights do not come back: where fewer are
    left than the ramp asks for, as when a longer one is begun half-way, all of them are kept.

    Args:
        sparsity: Fraction of zero weights, in [0, 1).
        distribution: How sparsity is spread over layers; erk by default.
        power_scale: Exponent of the ERK ratio.
        dense_layers: Globs of layers kept dense; by default uniform's first layer.
        sparsity_map: Layer globs and their sparsities.
        include: Globs of further weights to make sparse.
        block: Outputs and inputs that are active together: 1 4.
        scope: Rank weights within layers or over all.
        prune_start: Optimizer step at which gmp starts.
        prune_end: Step of gmp's final sparsity.
        prune_every: Optimizer steps between gmp's prunings, at least 1.
        masks: Bool masks to begin with, by name; layers without one begin dense.
        hooks: Whether to hook the optimizer's steps; see `Sparsifier`.
        process_group: The processes that train this model, where neither DistributedDataParallel
            nor sharded weights tell it; see `Sparsifier`.
    """

def granet(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    sparsity: float,
    distribution: Literal["uniform", "er", "erk"] | None = "erk",
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    include: Sequence[str] | None = None,
    block: Sequence[int] | None = None,
    delta_t: int = 100,
    t_start: int = 0,
    t_end: int,
    drop_fraction: float = 0.5,
    drop_anneal: Literal["cosine", "constant", "linear", "exponential"] = "cosine",
    drop_power: float | None = None,
    initial_sparsity: float = 0.5,
    prune_end: int,
    drop_fraction_min: float = 0.005,
    masks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    hooks: bool = True,
    track_exploration: bool = False,
    process_group: ProcessGroup | None = None,
) -> Sparsifier:
    """GraNet: prune all layers together along a ramp, and regrow in each (Liu et al. 2021).

    An update prunes the smallest weights of the whole network, down to a number that falls along a
    cubic ramp. Then every layer drops its weakest connections and grows as many where the dense
    gradient is largest. The network begins with an initial sparsity, or dense with 0.

    Args:
        sparsity: Fraction of zero weights, in [0, 1).
        distribution: How sparsity is spread over layers; erk by default.
        power_scale: Exponent of the ERK ratio.
        dense_layers: Globs of layers kept dense; by default uniform's first layer.
        include: Globs of further weights to make sparse.
        block: Outputs and inputs that are active together: 1 4.
        delta_t: Optimizer steps between topology updates, at least 1.
        t_start: Optimizer step of the first topology update.
        t_end: Last optimizer step of a topology update.
        drop_fraction: First share of connections replaced, in [0, 1].
        drop_anneal: How the drop fraction falls.
        drop_power: Exponent of the exponential drop_anneal, above 0.
        initial_sparsity: Granet's fraction of zeros at first, 0 to begin dense.
        prune_end: Step of granet's final sparsity.
        drop_fraction_min: What the cosine of the drop fraction ends at.
        masks: Bool masks to begin with, by name; layers without one begin dense.
        seed: Seed of masks and all other random choices; the same on all ranks.
        hooks: Whether to hook the optimizer's steps; see `Sparsifier`.
        track_exploration: Whether to record which weights were ever active.
        process_group: The processes that train this model, where neither DistributedDataParallel
            nor sharded weights tell it; see `Sparsifier`.
    """

def magnitude(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    sparsity: float,
    distribution: Literal["uniform", "er", "erk"] | None = None,
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    sparsity_map: Mapping[str, float] | None = None,
    include: Sequence[str] | None = None,
    block: Sequence[int] | None = None,
    scope: Literal["layer", "global"] = "layer",
    hooks: bool = True,
    process_group: ProcessGroup | None = None,
) -> Sparsifier:
    """One-shot magnitude pruning: keep the largest weights, then train with these masks.

    The masks are those of the weights that the model has when it is made sparse: load a trained
    network before. They never change. Of n weights, n - floor(s * n) are kept. The scope "layer"
    does this in every layer, "global" over all layers together.

    Args:
        sparsity: Fraction of zero weights, in [0, 1).
        distribution: How sparsity is spread over layers; erk by default.
        power_scale: Exponent of the ERK ratio.
        dense_layers: Globs of layers kept dense; by default uniform's first layer.
        sparsity_map: Layer globs and their sparsities.
        include: Globs of further weights to make sparse.
        block: Outputs and inputs that are active together: 1 4.
        scope: Rank weights within layers or over all.
        hooks: Whether to hook the optimizer's steps; see `Sparsifier`.
        process_group: The processes that train this model, where neither DistributedDataParallel
            nor sharded weights tell it; see `Sparsifier`.
    """

def rigl(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    sparsity: float = ...,
    distribution: Literal["uniform", "er", "erk"] | None = "erk",
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    sparsity_map: Mapping[str, float] | None = None,
    include: Sequence[str] | None = None,
    block: Sequence[int] | None = None,
    delta_t: int = 100,
    t_start: int = 0,
    t_end: int,
    drop_fraction: float = 0.3,
    drop_anneal: Literal["cosine", "constant", "linear", "exponential"] = "cosine",
    drop_power: float | None = None,
    grow_init: Literal["zeros", "gradient", "random"] = "zeros",
    drop_noise: float = 0.0,
    initial_acc_scale: float = 0.0,
    masks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    hooks: bool = True,
    track_exploration: bool = False,
    process_group: ProcessGroup | None = None,
) -> Sparsifier:
    """RigL: drop by magnitude, grow by the dense gradient (Evci et al. 2020, algorithm 1).

    An update takes the place of an optimizer step: no weight moves, the step counts. A layer
    without a gradient at an update (frozen, or not part of this step) keeps its mask.

    Args:
        sparsity: Fraction of zero weights, in [0, 1).
        distribution: How sparsity is spread over layers; erk by default.
        power_scale: Exponent of the ERK ratio.
        dense_layers: Globs of layers kept dense; by default uniform's first layer.
        sparsity_map: Layer globs and their sparsities.
        include: Globs of further weights to make sparse.
        block: Outputs and inputs that are active together: 1 4.
        delta_t: Optimizer steps between topology updates, at least 1.
        t_start: Optimizer step of the first topology update.
        t_end: Last optimizer step of a topology update.
        drop_fraction: First share of connections replaced, in [0, 1].
        drop_anneal: How the drop fraction falls.
        drop_power: Exponent of the exponential drop_anneal, above 0.
        grow_init: Weights of new connections.
        drop_noise: Standard deviation of noise on |w| when dropping.
        initial_acc_scale: Momentum of rigl's new connections per gradient.
        masks: Bool masks to begin with, by name; layers without one begin dense, and sparsity may
            be left out.
        seed: Seed of masks and all other random choices; the same on all ranks.
        hooks: Whether to hook the optimizer's steps; see `Sparsifier`.
        track_exploration: Whether to record which weights were ever active.
        process_group: The processes that train this model, where neither DistributedDataParallel
            nor sharded weights tell it; see `Sparsifier`.
    """

def rigl_reset(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    sparsity: float = ...,
    distribution: Literal["uniform", "er", "erk"] | None = "erk",
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    sparsity_map: Mapping[str, float] | None = None,
    include: Sequence[str] | None = None,
    block: Sequence[int] | None = None,
    delta_t: int = 100,
    t_start: int = 0,
    t_end: int,
    drop_fraction: float = 0.3,
    drop_anneal: Literal["cosine", "constant", "linear", "exponential"] = "cosine",
    drop_power: float | None = None,
    drop_noise: float = 0.0,
    masks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    hooks: bool = True,
    process_group: ProcessGroup | None = None,
) -> Sparsifier:
    """Reset the weakest weights at every update and keep the masks: a control for RigL.

    The RigL repository calls this method "static"; it is not training with a fixed mask, which is
    `Static`.

    Args:
        sparsity: Fraction of zero weights, in [0, 1).
        distribution: How sparsity is spread over layers; erk by default.
        power_scale: Exponent of the ERK ratio.
        dense_layers: Globs of layers kept dense; by default uniform's first layer.
        sparsity_map: Layer globs and their sparsities.
        include: Globs of further weights to make sparse.
        block: Outputs and inputs that are active together: 1 4.
        delta_t: Optimizer steps between topology updates, at least 1.
        t_start: Optimizer step of the first topology update.
        t_end: Last optimizer step of a topology update.
        drop_fraction: First share of connections replaced, in [0, 1].
        drop_anneal: How the drop fraction falls.
        drop_power: Exponent of the exponential drop_anneal, above 0.
        drop_noise: Standard deviation of noise on |w| when dropping.
        masks: Bool masks to begin with, by name; layers without one begin dense, and sparsity may
            be left out.
        seed: Seed of masks and all other random choices; the same on all ranks.
        hooks: Whether to hook the optimizer's steps; see `Sparsifier`.
        process_group: The processes that train this model, where neither DistributedDataParallel
            nor sharded weights tell it; see `Sparsifier`.
    """

def set(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    sparsity: float = ...,
    distribution: Literal["uniform", "er", "erk"] | None = "erk",
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    sparsity_map: Mapping[str, float] | None = None,
    include: Sequence[str] | None = None,
    block: Sequence[int] | None = None,
    delta_t: int = 100,
    t_start: int = 0,
    t_end: int,
    drop_fraction: float = 0.3,
    drop_anneal: Literal["cosine", "constant", "linear", "exponential"] = "cosine",
    drop_power: float | None = None,
    grow_init: Literal["zeros", "gradient", "random"] = "zeros",
    drop_noise: float = 0.0,
    masks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    hooks: bool = True,
    track_exploration: bool = False,
    process_group: ProcessGroup | None = None,
) -> Sparsifier:
    """Sparse Evolutionary Training: drop by magnitude, grow at random (Mocanu et al. 2018).

    Attributes:
        draw: Where the random scores come from: a function of shape and key.

    Args:
        sparsity: Fraction of zero weights, in [0, 1).
        distribution: How sparsity is spread over layers; erk by default.
        power_scale: Exponent of the ERK ratio.
        dense_layers: Globs of layers kept dense; by default uniform's first layer.
        sparsity_map: Layer globs and their sparsities.
        include: Globs of further weights to make sparse.
        block: Outputs and inputs that are active together: 1 4.
        delta_t: Optimizer steps between topology updates, at least 1.
        t_start: Optimizer step of the first topology update.
        t_end: Last optimizer step of a topology update.
        drop_fraction: First share of connections replaced, in [0, 1].
        drop_anneal: How the drop fraction falls.
        drop_power: Exponent of the exponential drop_anneal, above 0.
        grow_init: Weights of new connections.
        drop_noise: Standard deviation of noise on |w| when dropping.
        masks: Bool masks to begin with, by name; layers without one begin dense, and sparsity may
            be left out.
        seed: Seed of masks and all other random choices; the same on all ranks.
        hooks: Whether to hook the optimizer's steps; see `Sparsifier`.
        track_exploration: Whether to record which weights were ever active.
        process_group: The processes that train this model, where neither DistributedDataParallel
            nor sharded weights tell it; see `Sparsifier`.
    """

def snfs(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    sparsity: float = ...,
    distribution: Literal["uniform", "er", "erk"] | None = "erk",
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    sparsity_map: Mapping[str, float] | None = None,
    include: Sequence[str] | None = None,
    block: Sequence[int] | None = None,
    delta_t: int = 100,
    t_start: int = 0,
    t_end: int,
    drop_fraction: float = 0.3,
    drop_anneal: Literal["cosine", "constant", "linear", "exponential"] = "cosine",
    drop_power: float | None = None,
    grow_init: Literal["zeros", "gradient", "random"] = "zeros",
    drop_fraction_min: float = 0.0,
    redistribution: Literal["momentum", "magnitude", "nonzero", "numel", "none"] = "momentum",
    growth: Literal["momentum", "random"] = "momentum",
    masks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    hooks: bool = True,
    track_exploration: bool = False,
    process_group: ProcessGroup | None = None,
) -> Sparsifier:
    """Sparse Networks from Scratch: grow by gradient momentum (Dettmers & Zettlemoyer 2019).

    Every layer drops by magnitude. The regrowth is shared out among the layers in proportion to
    mean |momentum| or |weight| over their active weights, to their number of nonzero weights, or to
    their size ("numel", which the original calls "none"). With the redistribution "none" every
    layer keeps its count: the RigL repository's "momentum" method. The growth "random" is a
    control: each candidate has equal probability, and counts are met in expectation only.

    Attributes:
        draw: Where random growth takes its numbers, uniform on [0, 1), from: a function of keys and
            of tensors of the layers' shapes, both by name.

    Args:
        sparsity: Fraction of zero weights, in [0, 1).
        distribution: How sparsity is spread over layers; erk by default.
        power_scale: Exponent of the ERK ratio.
        dense_layers: Globs of layers kept dense; by default uniform's first layer.
        sparsity_map: Layer globs and their sparsities.
        include: Globs of further weights to make sparse.
        block: Outputs and inputs that are active together: 1 4.
        delta_t: Optimizer steps between topology updates, at least 1.
        t_start: Optimizer step of the first topology update.
        t_end: Last optimizer step of a topology update.
        drop_fraction: First share of connections replaced, in [0, 1].
        drop_anneal: How the drop fraction falls.
        drop_power: Exponent of the exponential drop_anneal, above 0.
        grow_init: Weights of new connections.
        drop_fraction_min: What the cosine of the drop fraction ends at.
        redistribution: What a layer's share of snfs's growth follows; none: counts stay.
        growth: Where snfs grows.
        masks: Bool masks to begin with, by name; layers without one begin dense, and sparsity may
            be left out.
        seed: Seed of masks and all other random choices; the same on all ranks.
        hooks: Whether to hook the optimizer's steps; see `Sparsifier`.
        track_exploration: Whether to record which weights were ever active.
        process_group: The processes that train this model, where neither DistributedDataParallel
            nor sharded weights tell it; see `Sparsifier`.
    """

def snip(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    sparsity: float,
    distribution: Literal["uniform", "er", "erk"] | None = None,
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    sparsity_map: Mapping[str, float] | None = None,
    include: Sequence[str] | None = None,
    block: Sequence[int] | None = None,
    scope: Literal["layer", "global"] = "layer",
    masks: Mapping[str, Tensor] | None = None,
    hooks: bool = True,
    process_group: ProcessGroup | None = None,
) -> Sparsifier:
    """SNIP: prune once by |gradient * weight| of the first step's batch (Lee et al. 2019).

    The first optimizer step sets the masks from the gradients it finds, moves no weight and does
    not count. Until then the model is dense. The scope "layer" is that of the RigL repository,
    "global" that of the paper. The dense gradient of this step is not counted in the costs.

    Args:
        sparsity: Fraction of zero weights, in [0, 1).
        distribution: How sparsity is spread over layers; erk by default.
        power_scale: Exponent of the ERK ratio.
        dense_layers: Globs of layers kept dense; by default uniform's first layer.
        sparsity_map: Layer globs and their sparsities.
        include: Globs of further weights to make sparse.
        block: Outputs and inputs that are active together: 1 4.
        scope: Rank weights within layers or over all.
        masks: Bool masks to begin with, by name; layers without one begin dense.
        hooks: Whether to hook the optimizer's steps; see `Sparsifier`.
        process_group: The processes that train this model, where neither DistributedDataParallel
            nor sharded weights tell it; see `Sparsifier`.
    """

def srigl(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    sparsity: float = ...,
    distribution: Literal["uniform", "er", "erk"] | None = "erk",
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    sparsity_map: Mapping[str, float] | None = None,
    include: Sequence[str] | None = None,
    block: Sequence[int] | None = None,
    delta_t: int = 100,
    t_start: int = 0,
    t_end: int,
    drop_fraction: float = 0.3,
    drop_anneal: Literal["cosine", "constant", "linear", "exponential"] = "cosine",
    drop_power: float | None = None,
    min_salient: float = 0.3,
    min_salient_of: Literal["sparse", "dense"] = "sparse",
    never_ablated: Sequence[str] | None = None,
    gradient_steps: int = 1,
    masks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    hooks: bool = True,
    track_exploration: bool = False,
    process_group: ProcessGroup | None = None,
) -> Sparsifier:
    """SRigL: RigL with as many weights in every row of a layer (Lasby et al. 2024).

    A row has the weights of one output: of a neuron, or of a filter. A layer drops its smallest
    weights. Rows in which few weights matter are ablated: they become inactive as a whole, and the
    other rows get their share. Every row is then filled where the gradient is largest.

    Attributes:
        budgets: Layer name -> weights that its rows share out among each other.
        whole: The layers whose rows are never ablated.

    Args:
        sparsity: Fraction of zero weights, in [0, 1).
        distribution: How sparsity is spread over layers; erk by default.
        power_scale: Exponent of the ERK ratio.
        dense_layers: Globs of layers kept dense; by default uniform's first layer.
        sparsity_map: Layer globs and their sparsities.
        include: Globs of further weights to make sparse.
        block: Outputs and inputs that are active together: 1 4.
        delta_t: Optimizer steps between topology updates, at least 1.
        t_start: Optimizer step of the first topology update.
        t_end: Last optimizer step of a topology update.
        drop_fraction: First share of connections replaced, in [0, 1].
        drop_anneal: How the drop fraction falls.
        drop_power: Exponent of the exponential drop_anneal, above 0.
        min_salient: Weights that must matter in a row of srigl; below 1 of its fan-in; 0: no
            ablation.
        min_salient_of: Fan-in that srigl's min_salient below 1 is of.
        never_ablated: Globs of layers whose rows srigl never ablates; by default the last layer.
        gradient_steps: Last steps whose mean gradient srigl grows by, up to delta_t.
        masks: Bool masks to begin with, by name; layers without one begin dense, and sparsity may
            be left out.
        seed: Seed of masks and all other random choices; the same on all ranks.
        hooks: Whether to hook the optimizer's steps; see `Sparsifier`.
        track_exploration: Whether to record which weights were ever active.
        process_group: The processes that train this model, where neither DistributedDataParallel
            nor sharded weights tell it; see `Sparsifier`.
    """

def static(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    sparsity: float = ...,
    distribution: Literal["uniform", "er", "erk"] | None = "erk",
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    sparsity_map: Mapping[str, float] | None = None,
    include: Sequence[str] | None = None,
    block: Sequence[int] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    hooks: bool = True,
    process_group: ProcessGroup | None = None,
) -> Sparsifier:
    """Train with a random mask that never changes.

    Args:
        sparsity: Fraction of zero weights, in [0, 1).
        distribution: How sparsity is spread over layers; erk by default.
        power_scale: Exponent of the ERK ratio.
        dense_layers: Globs of layers kept dense; by default uniform's first layer.
        sparsity_map: Layer globs and their sparsities.
        include: Globs of further weights to make sparse.
        block: Outputs and inputs that are active together: 1 4.
        masks: Bool masks to begin with, by name; layers without one begin dense, and sparsity may
            be left out.
        seed: Seed of masks and all other random choices; the same on all ranks.
        hooks: Whether to hook the optimizer's steps; see `Sparsifier`.
        process_group: The processes that train this model, where neither DistributedDataParallel
            nor sharded weights tell it; see `Sparsifier`.
    """
