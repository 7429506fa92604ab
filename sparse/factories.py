"""Make a model sparse with one call: a factory per method.

Arguments that several factories share mean the same in all of them:

* sparsity, distribution, power_scale, dense_layers, sparsity_map: see `layer_sparsities`.
* delta_t, t_start, t_end: the topology is updated at the optimizer steps t_start,
  t_start + delta_t, ... <= t_end, counted from 0 (see `Window`).
* drop_fraction, drop_anneal, drop_power: the share of active connections an update replaces, and
  how it falls (see `DropFraction`).
* drop_noise: standard deviation of normal noise on |w| when dropping. The RigL repository breaks
  ties with a noise of 1e-5; here the lower index wins a tie, so that no noise is needed.
* grow_init: weight of new connections, "zeros", "gradient" or "random" (see `NewConnections`).
* seed: seed of masks and all other random choices; the same on all ranks.
* hooks, track_exploration: see `Sparsifier`.

Every factory returns a `Sparsifier` and raises ValueError for an invalid argument.
"""

from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from sparse.errors import check_integer, check_number
from sparse.methods.allocation import Plan, plan_layers
from sparse.methods.base import Gmp, GradientMomentum, Method, Rigl, RiglReset, Set, Snip, Static
from sparse.methods.snfs import Snfs
from sparse.topology.schedules import DropFraction, Window
from sparse.training.connections import NewConnections
from sparse.training.sparsifier import Sparsifier


def static(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    sparsity: float,
    distribution: str = "erk",
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    sparsity_map: Mapping[str, float] | None = None,
    seed: int = 0,
    hooks: bool = True,
) -> Sparsifier:
    """Train with a random mask that never changes."""
    plan = plan_layers(model, sparsity, distribution, power_scale, dense_layers, sparsity_map)
    return Sparsifier(
        model, optimizer, Static(), num_active=plan.num_active, seed=seed, hooks=hooks
    )


def set_(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    sparsity: float,
    distribution: str = "erk",
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    sparsity_map: Mapping[str, float] | None = None,
    delta_t: int = 100,
    t_start: int = 0,
    t_end: int,
    drop_fraction: float = 0.3,
    drop_anneal: str = "cosine",
    drop_power: float | None = None,
    drop_noise: float = 0.0,
    grow_init: str = "zeros",
    seed: int = 0,
    hooks: bool = True,
    track_exploration: bool = False,
) -> Sparsifier:
    """Sparse Evolutionary Training: drop by magnitude, grow at random (Mocanu et al. 2018)."""
    plan = plan_layers(model, sparsity, distribution, power_scale, dense_layers, sparsity_map)
    window = Window(delta_t, t_start, t_end)
    drop = DropFraction(drop_fraction, t_start, t_end, drop_anneal, drop_power)
    method = Set(plan.num_active, window, drop, drop_noise, seed)
    return Sparsifier(
        model,
        optimizer,
        method,
        num_active=plan.num_active,
        new_connections=NewConnections(grow_init, seed=seed),
        seed=seed,
        hooks=hooks,
        track_exploration=track_exploration,
    )


def rigl(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    sparsity: float,
    distribution: str = "erk",
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    sparsity_map: Mapping[str, float] | None = None,
    delta_t: int = 100,
    t_start: int = 0,
    t_end: int,
    drop_fraction: float = 0.3,
    drop_anneal: str = "cosine",
    drop_power: float | None = None,
    drop_noise: float = 0.0,
    grow_init: str = "zeros",
    initial_acc_scale: float = 0.0,
    seed: int = 0,
    hooks: bool = True,
    track_exploration: bool = False,
) -> Sparsifier:
    """RigL: drop by magnitude, grow by the dense gradient (Evci et al. 2020).

    An update takes the place of an optimizer step: no weight moves, the step counts.

    Args:
        initial_acc_scale: SGD's momentum of new connections, in units of their gradient.
    """
    check_number("initial_acc_scale", initial_acc_scale)
    plan = plan_layers(model, sparsity, distribution, power_scale, dense_layers, sparsity_map)
    window = Window(delta_t, t_start, t_end)
    drop = DropFraction(drop_fraction, t_start, t_end, drop_anneal, drop_power)
    method = Rigl(plan.num_active, window, drop, drop_noise, seed)
    return Sparsifier(
        model,
        optimizer,
        method,
        num_active=plan.num_active,
        new_connections=NewConnections(grow_init, initial_acc_scale, seed),
        seed=seed,
        hooks=hooks,
        track_exploration=track_exploration,
    )


def rigl_reset(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    sparsity: float,
    distribution: str = "erk",
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    sparsity_map: Mapping[str, float] | None = None,
    delta_t: int = 100,
    t_start: int = 0,
    t_end: int,
    drop_fraction: float = 0.3,
    drop_anneal: str = "cosine",
    drop_power: float | None = None,
    drop_noise: float = 0.0,
    seed: int = 0,
    hooks: bool = True,
) -> Sparsifier:
    """Reset the weakest weights at every update and keep the masks: a control for RigL.

    The RigL repository calls this method "static".
    """
    plan = plan_layers(model, sparsity, distribution, power_scale, dense_layers, sparsity_map)
    window = Window(delta_t, t_start, t_end)
    drop = DropFraction(drop_fraction, t_start, t_end, drop_anneal, drop_power)
    method = RiglReset(plan.num_active, window, drop, drop_noise, seed)
    return Sparsifier(
        model,
        optimizer,
        method,
        num_active=plan.num_active,
        maskable=plan.maskable,
        seed=seed,
        hooks=hooks,
    )


def snfs(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    sparsity: float,
    distribution: str = "erk",
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    sparsity_map: Mapping[str, float] | None = None,
    delta_t: int = 100,
    t_start: int = 0,
    t_end: int,
    drop_fraction: float = 0.3,
    drop_anneal: str = "cosine",
    drop_power: float | None = None,
    drop_fraction_min: float = 0.0,
    redistribution: str = "momentum",
    growth: str = "momentum",
    grow_init: str = "zeros",
    seed: int = 0,
    hooks: bool = True,
    track_exploration: bool = False,
) -> Sparsifier:
    """Sparse Networks from Scratch: grow by gradient momentum (Dettmers & Zettlemoyer 2019).

    Args:
        drop_fraction_min: What the cosine falls to; the paper's code ends at 0.005.
        redistribution: What a layer's share of the regrowth is proportional to: "momentum" (the
            paper), "magnitude", "nonzero" or "numel"; or "none": every layer keeps its count, the
            RigL repository's "momentum" method.
        growth: "momentum", or "random" as a control; with "none" it must be "momentum".
    """
    plan = plan_layers(model, sparsity, distribution, power_scale, dense_layers, sparsity_map)
    window = Window(delta_t, t_start, t_end)
    drop = DropFraction(drop_fraction, t_start, t_end, drop_anneal, drop_power, drop_fraction_min)
    method: GradientMomentum | Snfs
    if redistribution == "none":
        if growth != "momentum":
            raise ValueError(f"growth {growth!r} has no effect with redistribution 'none'; use set")
        method = GradientMomentum(plan.num_active, window, drop, seed=seed)
    else:
        counts = {name: plan.num_active[name] for name in plan.maskable}
        method = Snfs(
            sum(counts.values()),
            window,
            drop,
            tuple(plan.num_active),
            redistribution,
            growth,
            seed,
            num_active=counts,
        )
    return Sparsifier(
        model,
        optimizer,
        method,
        num_active=plan.num_active,
        maskable=None if redistribution == "none" else plan.maskable,
        new_connections=NewConnections(grow_init, seed=seed),
        seed=seed,
        hooks=hooks,
        track_exploration=track_exploration,
    )


def snip(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    sparsity: float,
    distribution: str | None = None,
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    sparsity_map: Mapping[str, float] | None = None,
    scope: str = "layer",
    hooks: bool = True,
) -> Sparsifier:
    """SNIP: prune once by |gradient * weight| of the first step's batch (Lee et al. 2019).

    The first optimizer step sets the masks from the gradients it finds, moves no weight and does
    not count. Until then the model is dense.

    Args:
        distribution: Shares of the layers, "erk" if None; not for the global scope.
        scope: "layer" ranks within layers, "global" over all of them.
    """
    layers = (sparsity, distribution, power_scale, dense_layers, sparsity_map)
    plan = plan_layers(model, *layers, scope=scope)
    method = Snip({name: plan.sparsities[name] for name in plan.maskable}, scope)
    return _from_dense(model, optimizer, method, plan, hooks)


def gmp(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    sparsity: float,
    distribution: str | None = None,
    power_scale: float = 1.0,
    dense_layers: Sequence[str] | None = None,
    sparsity_map: Mapping[str, float] | None = None,
    scope: str = "layer",
    prune_start: int = 0,
    prune_end: int,
    prune_every: int = 100,
    hooks: bool = True,
) -> Sparsifier:
    """Gradual magnitude pruning along a cubic ramp (Zhu & Gupta 2017).

    Args:
        distribution: Final shares of the layers, "erk" if None; not for the global scope.
        scope: "layer" prunes each layer to its sparsity, "global" ranks all weights together.
        prune_start: First step at which to prune; the ramp begins there.
        prune_end: Step at which the final sparsity is reached.
        prune_every: Steps between two prunings.
    """
    layers = (sparsity, distribution, power_scale, dense_layers, sparsity_map)
    plan = plan_layers(model, *layers, scope=scope)
    for name, value in (
        ("prune_start", prune_start),
        ("prune_end", prune_end),
        ("prune_every", prune_every),
    ):
        check_integer(name, value)
    if not 0 <= prune_start < prune_end or prune_every < 1:
        raise ValueError(
            f"prune_start {prune_start}, prune_end {prune_end} and prune_every {prune_every} must "
            "satisfy 0 <= prune_start < prune_end and prune_every >= 1"
        )
    window = Window(prune_every, prune_start, prune_end, at_end=True)
    method = Gmp({name: plan.sparsities[name] for name in plan.maskable}, window, scope)
    return _from_dense(model, optimizer, method, plan, hooks)


def _from_dense(
    model: nn.Module, optimizer: Optimizer, method: Method, plan: Plan, hooks: bool
) -> Sparsifier:
    return Sparsifier(
        model, optimizer, method, num_active=plan.sizes, maskable=plan.maskable, hooks=hooks
    )
