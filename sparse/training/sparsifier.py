"""Train a model with masks that follow a method: what happens around every optimizer step."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from ..methods.base import Allocated, Method, Tensors
from ..methods.layers import warn_of_dense_weights
from ..topology.flat import all_true
from ..topology.shards import locals_of
from . import checkpoints, metrics, optimizers
from .blocks import check_whole, in_blocks
from .clock import Clock, found_inf
from .connections import NewConnections
from .consistency import is_first_rank
from .gates import masks_of
from .gradients import SeenGradients
from .hooked import HookedModel
from .hooks import check_unhooked, unwrap_optimizer


class Sparsifier(HookedModel):
    """Train a model with masks that follow a method.

    It hooks the optimizer, so that a training loop stays as it was. Before a step it zeroes the
    gradients of inactive weights; weights and optimizer state of inactive connections are exactly 0
    from the start, hence stay 0. When the method is due, it updates the masks.

    Attributes:
        method: The method.
        num_updates: Topology updates so far.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        method: Method,
        *,
        num_active: Mapping[str, int] | None = None,
        maskable: Collection[str] | None = None,
        masks: Tensors | None = None,
        new_connections: NewConnections | None = None,
        seed: int | None = None,
        hooks: bool = True,
        track_exploration: bool = False,
        process_group: "distributed.ProcessGroup | None" = None,
    ) -> None:
        """Mask the model's weights and hook the optimizer.

        Args:
            model: The model; DDP and torch.compile wrappers do no harm.
            optimizer: Its optimizer, or a wrapper of it. What it holds at inactive connections is
                zeroed.
            method: The method.
            num_active: Name -> number of active weights to begin with, for each weight that
                `prunable` lists with an `include` of your choice, in that order (see `allocate`).
                By default what the method computes from its sparsity and its distribution.
            maskable: Names of the weights that may have a mask; by default what the method says,
                or with `num_active` those that begin with less than all weights active.
            masks: Masks to begin with, by name, with the counts of `num_active` or of the method
                (see `begin_with`); by default the method chooses them.
            new_connections: How new connections begin; by default as the method says.
            seed: Seed of the random masks; by default that of the method.
            hooks: Whether to hook the optimizer's steps; if not, call `before_step` and
                `after_step` around each step that is really taken (with a GradScaler, use hooks).
            track_exploration: Whether to record which weights were ever active (1 bit per weight).
            process_group: The processes that train this model together, and compare their masks, if
                neither the model (DistributedDataParallel) nor its weights (DTensors) tell it.

        Raises:
            ValueError: An argument does not fit the model or the optimizer.
        """
        optimizer = unwrap_optimizer(optimizer)
        check_unhooked(optimizer)
        if num_active is None:
            if not isinstance(method, Allocated):
                raise ValueError(f"method {method.name!r} needs the argument num_active")
            method = method.fitted_to(model)
            num_active = method.num_active
            maskable = method.maskable if maskable is None else maskable
            masks = None if masks is None else method.begin_from(masks)
        super().__init__(model, optimizer, num_active, maskable, process_group, track_exploration)
        self.method = method
        self.num_updates = 0
        seed = method.seed if seed is None else seed
        usual = NewConnections(method.grow_init, method.initial_acc_scale, seed)
        self._new_connections = new_connections or usual
        self._new_connections.check(method, optimizer)
        self._clock = Clock()
        self._seen = SeenGradients(method)
        self._method_state: dict[str, Tensor] = {}
        self._last_update: dict[str, Tensor | float] = {}
        self._update_follows = False  # an update is to happen after the step under way
        self._counts_step = True  # the step under way is one to count
        self._verified = False
        self._sets_up_state = False  # the step under way is not one of training
        self._withheld: list[tuple[Tensor, Tensor]] = []
        masks = self._first_masks(method, masks, num_active, seed)
        self._begins_dense = not masks
        if masks:  # also of layers that begin full, so that all gates lie together from the start
            masks = {**all_true(self._maskable), **masks}
        self._install(masks)
        self._hook(steps=hooks)
        if not next(iter(self._weights.values())).is_meta and is_first_rank():
            warn_of_dense_weights(model, self._weights)

    @property
    def step(self) -> int:
        """Optimizer steps taken, the index of the coming one; may wait for the device."""
        return self._clock.read()

    @property
    def is_update_step(self) -> bool:
        """Whether the coming step comes with a topology update, should it not overflow."""
        return self._is_due(self.step)

    @property
    def needs_dense_gradients(self) -> bool:
        """Whether the coming step may read the gradients of inactive weights.

        The same on all ranks, never False when they are read, and known without asking the device:
        with a GradScaler it may be True for a step that turns out not to need them.
        """
        due = self.method.timing != "after" and self._is_due(self._clock.bound)
        return due or self._seen.reads(self._clock.bound)

    def metrics(self) -> dict[str, float]:
        """Summarize masks and the last update for a log. Waits for the device.

        Returns:
            "sparsity" over all prunable weights and "sparsity.<layer>" of each; after an update
            "dropped" and "grown", the connections that went and came with it, and "drop_fraction"
            if the method has one; with track_exploration "exploration_rate", the share of maskable
            weights that were ever active.

        Raises:
            SparsityError: An inactive weight or its optimizer state is not 0; see `enforce`.
        """
        self._check_inactive()
        sizes = {name: weight.numel() for name, weight in self._weights.items()}
        found = metrics.summarize(self.num_active, sizes)
        found.update({name: float(value) for name, value in self._last_update.items()})
        if self._explored is not None:
            maskable = sum(sizes[name] for name in self._maskable)
            found["exploration_rate"] = self._count_explored() / max(maskable, 1)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Give all that a resumed run needs: numbers, strings and tensors on the CPU.

        Raises:
            SparsityError: An inactive weight or its optimizer state is not 0; see `enforce`.
        """
        self._check_inactive()
        return checkpoints.save(
            method=self.method.name,
            step=self.step,
            num_updates=self.num_updates,
            last_update={name: float(value) for name, value in self._last_update.items()},
            masks=masks_of(self._gates, self._maskable),
            averages=self._seen.kept,
            method_state=self._method_state,
            explored=self._explored,
        )

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` left off; also masks the weights and the optimizer's state.

        The states of model and optimizer may be loaded before it or after it.

        Raises:
            ValueError: A key is missing, or method, names, shapes or counts do not fit this run.
        """
        checkpoints.check(state, self.method.name)
        still_dense = self._begins_dense and state["num_updates"] == 0
        masks = {} if still_dense else checkpoints.load_masks(state, self._maskable)
        check_whole(self.method, masks, "the checkpoint")
        if self.method.keeps_counts:
            checkpoints.check_counts(masks, self.num_active)
        self._seen.load(state, self._maskable)
        if self._explored is not None:
            self._explored = checkpoints.load_explored(state, self._maskable)
        device = next(iter(self._weights.values())).device
        self._method_state, self._last_update = checkpoints.load_numbers(state, device)
        self.num_updates = state["num_updates"]
        self._clock = Clock(state["step"])
        self._install(masks)

    @torch.no_grad()
    def _before_step(self) -> None:
        self._sets_up_state = optimizers.only_sets_up_state(self._optimizer)
        if self._sets_up_state:
            return
        self._loaded.clear()
        if not self._verified:
            self._verify()
            self._verified = True
        overflow = found_inf(self._optimizer)
        if overflow is not None and optimizers.has_momentum(self._optimizer):
            optimizers.create_momentum_buffers(self._optimizer)
        # The device is asked only when steps may have been skipped, and it matters which step this
        # is: for an update or what it sees. The clock's bound cannot run past such a step, because
        # it is exact after every question.
        step, due, skipped = self._clock.bound, False, False
        if self._is_due(step) or self._seen.asks(step):
            step, skipped = self._clock.settle(overflow)
            due = self._is_due(step) and not skipped
        self._seen.gather(self._maskable, self._optimizer, step)
        self._update_follows = due and self.method.timing == "after"
        self._counts_step = not (skipped or (due and self.method.timing == "once"))
        if due and not self._update_follows:
            self._update()
            self._withheld = optimizers.withhold_gradients(self._optimizer)
        else:
            self._zero_gradients()

    @torch.no_grad()
    def _after_step(self) -> None:
        if self._sets_up_state:
            return
        optimizers.restore_gradients(self._withheld)
        self._withheld = []
        if self._update_follows:
            self._update()
        if self._counts_step:
            self._clock.tick(found_inf(self._optimizer))

    def _is_due(self, step: int) -> bool:
        if not self._maskable or (self.method.timing == "once" and self.num_updates > 0):
            return False
        return self.method.due(step)

    def _trained(self) -> dict[str, nn.Parameter]:
        """List the weights that an update may change: not those that are frozen.

        A method that decides once, by the gradients, must see all of them, or say what is missing.
        """
        return {
            name: weight
            for name, weight in self._maskable.items()
            if weight.requires_grad or self.method.timing == "once"
        }

    def _update(self) -> None:
        step = self._clock.read()
        self._count_inactive()
        trained = self._trained()
        optimizers.check_held(self._optimizer, trained)
        weights = {name: weight.detach() for name, weight in trained.items()}
        old = masks_of(self._gates, weights)
        gradients = self._seen.at_update(trained, self._optimizer)
        if not self._ranks.groups and (self._copies or self._invariant.is_known):
            self._invariant.read(self._optimizer)
        rule = in_blocks(self.method)
        survivors = rule.survivors(old, weights, step)
        new = rule.update(old, weights, gradients, step, self._method_state)
        checkpoints.check_masks(new, weights, f"method {self.method.name}")
        old, survivors, new = map(locals_of, (old, survivors, new))
        fresh = self._reconnect(old, survivors, new)
        self._begin(self._new_connections, fresh, gradients, step)
        if self.method.restarts_optimizer(step):
            optimizers.restart(self._optimizer)
        changes, keeps = map(self._owned, (old, new, fresh)), self.method.keeps_counts
        self._finish_update(metrics.turnover(*changes, keeps_counts=keeps), step)

    def _finish_update(self, turnover: Tensors, step: int) -> None:
        self.num_updates += 1
        self._last_update = dict(self._record(turnover))
        self._seen.forget()
        fraction = self.method.fraction_at(step)
        if fraction is not None:
            self._last_update["drop_fraction"] = fraction
        self._verify()
