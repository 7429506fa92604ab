"""What a method of sparse training is: one record with its settings, its rule and its costs.

A method is a frozen dataclass. Its fields made by `setting` are its settings: the arguments of its
factory (`sparse.rigl`), the flags of `main.py` and the tables of the documents derive from them.
A method sees the whole network as dicts of tensors and returns new masks; it changes no tensor.
`Sparsifier` owns the masks, applies them and keeps counters, weights and optimizer state in order.
"""

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import ClassVar, Literal, Self

from torch import Tensor, nn

from ..topology import rng
from ..topology.blocks import check_block
from ..topology.distributions import Distribution
from ..topology.draws import noisy_magnitudes
from ..topology.masks import drop_and_grow_layers
from ..topology.rng import Draw
from ..topology.schedules import Anneal, DropFraction, Window, num_dropped
from ..topology.selection import Scores, largest_in_layers
from .allocation import Allocation, allocate_layers, allocation_of
from .settings import check_types, setting

Tensors = Mapping[str, Tensor]
Timing = Literal["after", "instead", "once"]
GrowInit = Literal["zeros", "gradient", "random"]


class Method(ABC):
    """What every method has; its own class overrides what is different there.

    Attributes:
        name: Name of the method, written to checkpoints.
        title: What the documents call it.
        paper: Its source, as a link in Markdown.
        timing: When an update happens: "after" the optimizer step, "instead" of one (no weight
            moves, the step counts), or "once" before training (no weight moves, no step counts).
        gradient_decay: None: the method sees the dense gradient of the batch, except "after" the
            step, when inactive gradients are gone and it sees none. A number d in [0, 1): it sees
            the average G <- d * G + (1 - d) * gradient, kept over all steps (from 0, no debias).
        gradient_steps: "After" the step, the method sees the mean of the dense gradients of so many
            steps, the last one included; at most as many as there are from update to update.
        grows: Whether connections that were inactive can become active.
        grow_init: Weight of new connections, see `NewConnections`; also `initial_acc_scale`.
        seed: Seed of masks and of all other random choices; the same on all ranks.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str] = "-"
    timing: ClassVar[Timing] = "after"
    gradient_decay: ClassVar[float | None] = None
    gradient_steps: int = 0
    grows: ClassVar[bool] = False
    grow_init: GrowInit = "zeros"
    initial_acc_scale: float = 0.0
    seed: int = 0

    @property
    def keeps_counts(self) -> bool:
        """Whether every layer keeps its number of active weights for good."""
        return False

    @property
    def window(self) -> Window | None:
        """The steps at which the masks change; None if these are not evenly spread over a run."""
        return None

    def first_masks(
        self,
        draws: Mapping[str, Draw],
        num_active: Mapping[str, int],
        among: Tensors,
        weights: Tensors,
    ) -> Tensors:
        """Choose the first masks of layers that begin sparse, by a random number per weight.

        Args:
            draws: Layer name -> random numbers.
            num_active: Layer name -> active weights.
            among: Masks that are all True.
            weights: The weights, for methods that begin with the largest ones.
        """
        return largest_in_layers(draws, num_active, among)

    @abstractmethod
    def due(self, step: int) -> bool:
        """Say whether the masks change at this step (optimizer steps taken before it)."""

    @abstractmethod
    def update(
        self, masks: Tensors, weights: Tensors, grads: Tensors, step: int, state: dict[str, Tensor]
    ) -> Tensors:
        """Compute the new masks.

        Args:
            masks: Layer name -> bool mask, of all layers that may have one.
            weights: The weights of those layers, exactly 0 where inactive.
            grads: The gradients (see `gradient_decay`) of those layers that have one.
            step: Optimizer steps taken so far.
            state: What the method remembers, tensors by name: saved in checkpoints, empty at first.

        Returns:
            New masks for the same layers. They must not depend on values read from the device.
        """

    def survivors(self, masks: Tensors, weights: Tensors, step: int) -> Tensors:
        """Mark the connections whose weight and optimizer state an update leaves alone."""
        return masks

    def restarts_optimizer(self, step: int) -> bool:
        """Say whether an update at this step resets the optimizer's state of all parameters."""
        return False

    def fraction_at(self, step: int) -> float | None:
        """Give the drop fraction of an update at this step, None if there is no such thing."""
        return None

    def step_flops(self, dense: float, sparse: float, total_steps: int | None = None) -> float:
        """Compute the operations of a training step for one image, on average over a run.

        A step is one forward pass and two passes of that size backward: for the gradients of the
        inputs and for those of the weights. Here all three are sparse.

        Args:
            dense: Operations of a forward pass of the dense network.
            sparse: Those of the network as it is trained in the end.
            total_steps: Optimizer steps of the run, for costs that depend on its length.

        Source: RigL, appendix on FLOPs (Evci et al. 2020).
        """
        return 3.0 * sparse

    def check_left(self, num_left: Mapping[str, int]) -> None:  # noqa: B027, most have no limit
        """Refuse to go on from masks with which the method cannot keep what its settings say.

        Args:
            num_left: Layer name -> active weights, of the masked layers of a checkpoint.

        Raises:
            ValueError: Names the layer and both numbers.
        """


@dataclass(frozen=True, kw_only=True)
class Allocated(Method):
    """Methods that share out a sparsity among the layers, as `layer_sparsities` explains.

    Attributes:
        from_masks: What masks mean that a run begins with: the "counts" of the layers, or what the
            method goes on to "prune". None: it takes none, for the reason `why_no_masks`.
        masks_replace: Further settings that masks take the place of.
        begins_with: Layer name -> active weights in these masks; see `begin_with`.
        allocation: What this comes to for the layers of a model; `fitted_to` computes it.
    """

    scope = "layer"  # a sparsity per layer
    from_masks: ClassVar[Literal["counts", "prune"] | None] = "counts"
    why_no_masks: ClassVar[str] = "chooses its own masks"
    masks_replace: ClassVar[Sequence[str]] = ()

    sparsity: float = setting(MISSING, "fraction of zero weights, in [0, 1)")
    distribution: Distribution | None = setting(
        "erk", "how sparsity is spread over layers; erk by default"
    )
    power_scale: float = setting(1.0, "exponent of the ERK ratio")
    dense_layers: Sequence[str] | None = setting(
        None, "globs of layers kept dense; by default uniform's first layer"
    )
    sparsity_map: Mapping[str, float] | None = setting(None, "layer globs and their sparsities")
    include: Sequence[str] | None = setting(None, "globs of further weights to make sparse")
    block: Sequence[int] | None = setting(None, "outputs and inputs that are active together: 1 4")
    allocation: Allocation = field(default_factory=Allocation, repr=False)
    begins_with: Mapping[str, int] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_types(self)
        check_block(self.block)

    def fitted_to(self, model: nn.Module) -> Self:
        """Return this method with the numbers of active weights of a model's layers.

        Raises:
            ValueError: A setting does not fit the layers, or has no effect.
        """
        if self.follows_masks:
            assert self.begins_with is not None
            found = allocation_of(model, self.begins_with, self.include, self.block)
            return dataclasses.replace(self, allocation=found, sparsity=found.sparsity)
        names = "sparsity distribution power_scale dense_layers sparsity_map include scope block"
        settings = {name: getattr(self, name) for name in names.split()}
        return dataclasses.replace(self, allocation=allocate_layers(model, **settings))

    @property
    def follows_masks(self) -> bool:
        """Whether masks that the run begins with take the place of sparsity and distribution."""
        return self.begins_with is not None and self.from_masks == "counts"

    @property
    def num_active(self) -> Mapping[str, int]:
        """Layer name -> number of active weights to begin with, of all prunable layers in order."""
        return self.allocation.num_active

    @property
    def num_in_masks(self) -> Mapping[str, int]:
        """Layer name -> number of active weights in masks that a run can begin with."""
        return self.num_active

    def begin_from(self, masks: Tensors) -> Tensors:
        """Return the masks that a run begins with; given ones are refused by a ValueError."""
        return masks

    @property
    def final_counts(self) -> Mapping[str, int] | None:
        """Layer name -> active weights in the end; None: not known before training."""
        return self.allocation.num_active if self.scope == "layer" else None

    @property
    def final_total(self) -> int:
        """Active weights of all layers in the end."""
        return sum((self.final_counts or self.allocation.num_active).values())

    @property
    def maskable(self) -> Collection[str]:
        """The layers that may have a mask: where counts are kept, a full layer needs none."""
        if not self.keeps_counts:
            return self.allocation.maskable
        sizes = self.allocation.sizes
        return [n for n in self.allocation.maskable if self.num_active[n] < sizes[n]]


@dataclass(frozen=True, kw_only=True)
class Dropping(Allocated):
    """Methods that start from a random mask and drop the weakest connections of a layer."""

    drop_fraction_min = 0.0  # what the cosine falls to

    delta_t: int = setting(100, "optimizer steps between topology updates, at least 1")
    t_start: int = setting(0, "optimizer step of the first topology update")
    t_end: int = setting(MISSING, "last optimizer step of a topology update", is_end=True)
    drop_fraction: float = setting(0.3, "first share of connections replaced, in [0, 1]")
    drop_anneal: Anneal = setting("cosine", "how the drop fraction falls")
    drop_power: float | None = setting(None, "exponent of the exponential drop_anneal, above 0")
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.window, self.schedule  # made now, because their checks have the ranges

    @property
    def keeps_counts(self) -> bool:
        return True

    @functools.cached_property
    def window(self) -> Window:
        return Window(self.delta_t, self.t_start, self.t_end)

    @functools.cached_property
    def schedule(self) -> DropFraction:
        """The drop fraction as a function of the step."""
        return DropFraction(
            initial=self.drop_fraction,
            t_start=self.t_start,
            t_end=self.t_end,
            anneal=self.drop_anneal,
            power=self.drop_power,
            minimum=self.drop_fraction_min,
        )

    def due(self, step: int) -> bool:
        return self.window.due(step)

    def fraction_at(self, step: int) -> float:
        return self.schedule(step)

    def num_dropped(self, name: str, step: int) -> int:
        """Compute how many connections of a layer an update at this step drops."""
        return num_dropped(self.num_active[name], self.schedule(step))

    def key(self, name: str, step: int, purpose: int) -> tuple[int, int, int, int]:
        """Make the random key of a layer at a step."""
        return (self.seed, step, list(self.num_active).index(name), purpose)

    def drop_scores(self, name: str, weight: Tensor, grads: Tensors, step: int) -> Tensor:
        """Give the scores whose smallest magnitudes are dropped."""
        return weight

    def all_drop_scores(self, weights: Tensors, grads: Tensors, step: int) -> Tensors:
        """Give the `drop_scores` of all layers."""
        return {name: self.drop_scores(name, w, grads, step) for name, w in weights.items()}


@dataclass(frozen=True, kw_only=True)
class DropNoise(Dropping):
    """Dropping by magnitude with noise; the RigL repository breaks ties with one of 1e-5."""

    drop_noise: float = setting(0.0, "standard deviation of noise on |w| when dropping")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop_noise < 0.0:
            raise ValueError(f"drop_noise must not be negative, got {self.drop_noise}")

    def all_drop_scores(self, weights: Tensors, grads: Tensors, step: int) -> Tensors:
        scores = super().all_drop_scores(weights, grads, step)
        keys = {name: self.key(name, step, rng.DROP_NOISE) for name in scores}
        return noisy_magnitudes(scores, keys, self.drop_noise) if self.drop_noise else scores


@dataclass(frozen=True, kw_only=True)
class DropAndGrow(Dropping):
    """Methods that replace the weakest connections of a layer by others."""

    grows = True

    grow_init: GrowInit = setting("zeros", "weights of new connections")

    @abstractmethod
    def grow_scores(self, name: str, mask: Tensor, grads: Tensors, step: int) -> Scores | None:
        """Give the scores whose largest magnitudes are grown; None leaves the layer as it is."""

    def update(
        self, masks: Tensors, weights: Tensors, grads: Tensors, step: int, state: dict[str, Tensor]
    ) -> Tensors:
        grow = {name: self.grow_scores(name, mask, grads, step) for name, mask in masks.items()}
        grow_scores = {name: scores for name, scores in grow.items() if scores is not None}
        changed = {name: masks[name] for name in grow_scores}
        drop = self.all_drop_scores({name: weights[name] for name in changed}, grads, step)
        counts = {name: self.num_dropped(name, step) for name in changed}
        return {**masks, **drop_and_grow_layers(changed, drop, grow_scores, counts)}
