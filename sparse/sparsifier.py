"""Hold the masks of a model in training and apply them around every optimizer step."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse import checkpoints, exploration, rng
from sparse.averages import average_gradients
from sparse.clock import Clock, found_inf, inverse_scale
from sparse.connections import NewConnections, disconnect, mask_module
from sparse.consistency import has_ranks, verify_across_ranks
from sparse.gates import Gate, active_positions, count_active, gather, masks_of, zero_inactive
from sparse.layers import prunable
from sparse.masks import check_masks, random_mask
from sparse.methods import Method, Tensors
from sparse.optimizers import (
    check_optimizer,
    create_momentum_buffers,
    has_momentum,
    restore_gradients,
    withhold_gradients,
)


class Sparsifier:
    """Train a model with masks that follow a method.

    It hooks the optimizer, so that a training loop stays as it was. Before a step it zeroes the
    gradients of inactive weights; weights and optimizer state of inactive connections are exactly 0
    from the start, hence stay 0. When the method is due, it updates the masks.

    Attributes:
        method: The method.
        num_updates: Topology updates so far.
        masks_version: Changes whenever the masks may have changed, for those who keep something
            made of them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        method: Method,
        *,
        num_active: Mapping[str, int],
        maskable: Collection[str] | None = None,
        masks: Tensors | None = None,
        new_connections: NewConnections | None = None,
        seed: int = 0,
        hooks: bool = True,
        track_exploration: bool = False,
    ) -> None:
        """Mask the model's weights and hook the optimizer.

        Args:
            model: The model; DDP and torch.compile wrappers do no harm.
            optimizer: Its optimizer. What it holds at inactive connections is zeroed.
            method: The method.
            num_active: Name -> number of active weights to begin with, for each weight that
                `prunable` lists, in that order (see `allocate`).
            maskable: Names of the weights that may have a mask; by default those that begin with
                less than all weights active.
            masks: Masks to begin with, by name, with the counts of `num_active`; random ones by
                default.
            new_connections: How new connections begin; at zero by default.
            seed: Seed of the random masks.
            hooks: Whether to hook the optimizer; if not, call `before_step` and `after_step`
                around each step that is really taken (with a GradScaler, use the hooks).
            track_exploration: Whether to record which weights were ever active (1 bit per weight).

        Raises:
            ValueError: An argument does not fit the model or the optimizer.
        """
        self.method = method
        self.num_updates = 0
        self.masks_version = 0
        self._weights = prunable(model)
        if list(num_active) != list(self._weights):
            raise ValueError("num_active must have the names that prunable(model) lists, in order")
        if maskable is None:
            maskable = {name for name, w in self._weights.items() if num_active[name] < w.numel()}
        self._maskable = [name for name in self._weights if name in maskable]
        check_optimizer(optimizer, {name: self._weights[name] for name in self._maskable})
        self._optimizer = optimizer
        self._new_connections = new_connections or NewConnections()
        self._new_connections.check(method, optimizer)
        self._clock = Clock()
        self._gates: dict[str, Gate] = {}
        self._averages: dict[str, Tensor] = {}
        self._method_state: dict[str, Tensor] = {}
        self._last_update: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] | None = None
        self._update_follows = False  # an update is to happen after the step under way
        self._counts_step = True  # the step under way is one to count
        self._verified = False
        self._withheld: list[tuple[nn.Parameter, Tensor]] = []
        if masks is None:
            masks = self._random_masks(num_active, seed)
        else:
            wanted = {n: w for n, w in self._weights.items() if num_active[n] < w.numel()}
            check_masks(masks, wanted | {n: self._weights[n] for n in masks}, "the caller")
            checkpoints.check_counts(masks, num_active)
        self._begins_dense = not masks
        self._install(masks)
        self._explored: dict[str, Tensor] | None = {} if track_exploration else None
        self._explore()
        self._handles = []
        if hooks:
            self._handles.append(optimizer.register_step_pre_hook(self._pre_hook))
            self._handles.append(optimizer.register_step_post_hook(self._post_hook))

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
        if self.method.gradient_decay is not None:
            return True
        return self.method.timing != "after" and self._is_due(self._clock.bound)

    @property
    def maskable(self) -> dict[str, nn.Parameter]:
        """Name -> weight, of all weights that have a mask or may get one."""
        return {name: self._weights[name] for name in self._maskable}

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name -> bool mask of every prunable weight, all True for dense ones; not to write to."""
        return masks_of(self._gates, self._weights)

    @property
    def num_active(self) -> dict[str, int]:
        """Name -> number of active weights of every prunable weight. May wait for the device."""
        if self._counts is None:
            self._counts = count_active(self._gates, self._weights)
        return dict(self._counts)

    def active_positions(self, name: str) -> Tensor | None:
        """List the active entries of a weight as offsets into its memory; None: all are active.

        int64 and ascending. Waits for the device.
        """
        gate = self._gates.get(name)
        return None if gate is None else active_positions(gate, self._weights[name])

    def remove(self) -> None:
        """Unhook the optimizer; weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def before_step(self) -> None:
        """Do what precedes an optimizer step: mask the gradients, or update in the step's place."""
        if not self._verified:
            self._verify()
        overflow = found_inf(self._optimizer)
        if overflow is not None and has_momentum(self._optimizer):
            create_momentum_buffers(self._optimizer)
        decay = self.method.gradient_decay
        if decay is not None:
            average_gradients(self._averages, self._weights, self._maskable, decay, self._optimizer)
        # The device is asked only when an update may be due and steps may have been skipped. The
        # clock's bound cannot run past a due step, because it is exact after every question.
        due = self._is_due(self._clock.bound) and self._is_due(self._clock.read())
        skipped = due and overflow is not None and bool(overflow.item())
        due = due and not skipped
        self._update_follows = due and self.method.timing == "after"
        self._counts_step = not (skipped or (due and self.method.timing == "once"))
        if due and not self._update_follows:
            self._update()
            self._withheld = withhold_gradients(self._optimizer)
            return
        gradients = ((self._weights[name].grad, gate) for name, gate in self._gates.items())
        zero_inactive((gradient, gate) for gradient, gate in gradients if gradient is not None)

    @torch.no_grad()
    def after_step(self) -> None:
        """Do what follows an optimizer step: count it, and update if the method says so."""
        restore_gradients(self._withheld)
        self._withheld = []
        if self._update_follows:
            self._update()
        if self._counts_step:
            self._clock.tick(found_inf(self._optimizer))

    @torch.no_grad()
    def apply_to(self, module: nn.Module) -> None:
        """Zero the inactive weights of another module with the same parameter names.

        An average over training (EMA) of weights under moving masks is not sparse until then.

        Raises:
            ValueError: The module lacks a masked weight, or it has another shape there.
        """
        mask_module(module, self._gates)

    def metrics(self) -> dict[str, float]:
        """Summarize masks and the last update for a log. Waits for the device.

        Returns:
            "sparsity" over all prunable weights and "sparsity.<layer>" of each; after an update
            "dropped" and "grown", the connections that went and came with it, and "drop_fraction"
            if the method has one; with track_exploration "exploration_rate", the share of maskable
            weights that were ever active.
        """
        sizes = {name: weight.numel() for name, weight in self._weights.items()}
        metrics = exploration.summarize(self.num_active, sizes)
        metrics.update({name: float(value) for name, value in self._last_update.items()})
        if self._explored is not None:
            maskable = sum(sizes[name] for name in self._maskable)
            metrics["exploration_rate"] = exploration.count(self._explored) / max(maskable, 1)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Give all that a resumed run needs: numbers, strings and tensors on the CPU."""
        return checkpoints.save(
            method=self.method.name,
            step=self.step,
            num_updates=self.num_updates,
            last_update={name: float(value) for name, value in self._last_update.items()},
            masks={name: gate.mask() for name, gate in self._gates.items()},
            averages=self._averages,
            method_state=self._method_state,
            explored=self._explored,
        )

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` left off; also masks the weights and the optimizer's state.

        Raises:
            ValueError: A key is missing, or method, names, shapes or counts do not fit this run.
        """
        checkpoints.check(state, self.method.name)
        maskable = {name: self._weights[name] for name in self._maskable}
        still_dense = self._begins_dense and state["num_updates"] == 0
        masks = checkpoints.load_masks(state, {} if still_dense else maskable)
        if self.method.keeps_counts:
            checkpoints.check_counts(masks, self.num_active)
        averages = self.method.gradient_decay is not None
        self._averages = checkpoints.load_averages(state, maskable, wanted=averages)
        if self._explored is not None:
            self._explored = checkpoints.load_explored(state, maskable)
        device = next(iter(self._weights.values())).device
        self._method_state = {name: v.to(device) for name, v in state["method_state"].items()}
        self._last_update = dict(state["last_update"])
        self.num_updates = state["num_updates"]
        self._clock = Clock(state["step"])
        self._install(masks)

    def _pre_hook(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) > 1 or kwargs.get("closure") is not None:  # args[0] is the optimizer
            raise ValueError(
                "a sparse model cannot train with a closure, which computes gradients inside the "
                "step; call loss.backward() before optimizer.step()"
            )
        self.before_step()

    def _post_hook(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.after_step()

    def _is_due(self, step: int) -> bool:
        if not self._maskable or (self.method.timing == "once" and self.num_updates > 0):
            return False
        return self.method.due(step)

    def _gradients(self) -> dict[str, Tensor]:
        """Collect what the method sees as gradients."""
        if self.method.gradient_decay is not None:
            return dict(self._averages)
        if self.method.timing == "after":
            return {}
        gradients = {name: self._weights[name].grad for name in self._maskable}
        unscale = inverse_scale(self._optimizer)
        return {
            name: gradient if unscale is None else gradient * unscale
            for name, gradient in gradients.items()
            if gradient is not None
        }

    def _update(self) -> None:
        step = self._clock.read()
        weights = {name: self._weights[name].detach() for name in self._maskable}
        old = masks_of(self._gates, weights)
        gradients = self._gradients()
        survivors = self.method.survivors(old, weights, step)
        new = self.method.update(old, weights, gradients, step, self._method_state)
        check_masks(new, weights, f"method {self.method.name}")
        if any(new[name] is not old[name] for name in old):
            self.masks_version += 1
        changed, grown = [], []  # numbers of connections, per layer
        for index, name in enumerate(self._weights):
            if name not in old:
                continue
            weight = self._weights[name]
            change = old[name] ^ new[name]
            fresh = change & new[name]
            changed.append(torch.count_nonzero(change))
            # Where as many come as go, half of the changes is known to be growth.
            halves = self.method.keeps_counts
            grown.append(changed[-1] // 2 if halves else torch.count_nonzero(fresh))
            if name not in self._gates:
                self._gates[name] = Gate(new[name], weight)
            if survivors[name] is not old[name]:
                disconnect(self._optimizer, weight, self._gates[name], survivors[name])
            disconnect(self._optimizer, weight, self._gates[name], new[name])
            key = (self._new_connections.seed, step, index, rng.GROW_WEIGHT)
            self._new_connections.write(self._optimizer, weight, fresh, gradients.get(name), key)
        self._finish_update(gather(changed).sum(), gather(grown).sum(), step)

    def _finish_update(self, changed: Tensor, grown: Tensor, step: int) -> None:
        self.num_updates += 1
        self._counts = None
        self._last_update = {"dropped": changed - grown, "grown": grown}
        fraction = self.method.drop_fraction(step)
        if fraction is not None:
            self._last_update["drop_fraction"] = fraction
        self._explore()
        self._verify()

    def _random_masks(self, num_active: Mapping[str, int], seed: int) -> dict[str, Tensor]:
        masks = {}
        for index, (name, weight) in enumerate(self._weights.items()):
            if num_active[name] < weight.numel():
                key = (seed, 0, index, rng.INITIAL_MASK)
                masks[name] = random_mask(weight.shape, num_active[name], key, weight.device)
        return masks

    @torch.no_grad()
    def _install(self, masks: Tensors) -> None:
        """Take masks over, in place of any others, and zero what they leave inactive."""
        self._gates.clear()
        for name, mask in masks.items():
            weight = self._weights[name]
            self._gates[name] = Gate(mask, weight)
            disconnect(self._optimizer, weight, self._gates[name], mask)
        self._counts = None
        self.masks_version += 1

    def _explore(self) -> None:
        if self._explored is not None:
            weights = {name: self._weights[name] for name in self._maskable}
            exploration.record(self._explored, masks_of(self._gates, weights))

    def _verify(self) -> None:
        if has_ranks():
            verify_across_ranks({name: gate.mask() for name, gate in self._gates.items()})
        self._verified = True
