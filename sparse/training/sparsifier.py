"""Hold the masks of a model in training and apply them around every optimizer step."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse.methods.base import Method, Tensors
from sparse.methods.layers import (
    check_owned,
    parameters_only,
    prunable_modules,
    warn_of_dense_weights,
    weight_of,
)
from sparse.topology import rng
from sparse.topology.masks import check_masks, random_mask
from sparse.training import checkpoints, exploration
from sparse.training.averages import average_gradients
from sparse.training.clock import Clock, found_inf, inverse_scale
from sparse.training.connections import NewConnections, disconnect, mask_module
from sparse.training.consistency import has_ranks, is_first_rank, verify_across_ranks
from sparse.training.gates import (
    Gate,
    active_positions,
    count_active,
    gather,
    masks_of,
    zero_inactive,
)
from sparse.training.hooks import Hooks, check_unhooked, unwrap_optimizer
from sparse.training.invariant import Invariant, check_gradients, held
from sparse.training.optimizers import (
    check_held,
    check_optimizer,
    create_momentum_buffers,
    has_momentum,
    lay_out_state,
    moments_of,
    only_sets_up_state,
    restore_gradients,
    state_of,
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
        masks_version: Changes whenever the masks may have changed. Code that caches something
            computed from the masks compares it.
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
            optimizer: Its optimizer, or a wrapper of it. What it holds at inactive connections is
                zeroed.
            method: The method.
            num_active: Name -> number of active weights to begin with, for each weight that
                `prunable` lists, in that order (see `allocate`).
            maskable: Names of the weights that may have a mask; by default those that begin with
                less than all weights active.
            masks: Masks to begin with, by name, with the counts of `num_active`; random ones by
                default.
            new_connections: How new connections begin; at zero by default.
            seed: Seed of the random masks.
            hooks: Whether to hook the optimizer's steps; if not, call `before_step` and
                `after_step` around each step that is really taken (with a GradScaler, use hooks).
            track_exploration: Whether to record which weights were ever active (1 bit per weight).

        Raises:
            ValueError: An argument does not fit the model or the optimizer.
        """
        optimizer = unwrap_optimizer(optimizer)
        check_unhooked(optimizer)
        self.method = method
        self.num_updates = 0
        self.masks_version = 0
        modules = prunable_modules(model)
        # A weight that is computed from parameters stays dense; a stand-in tells its size.
        self._weights = {name: weight_of(name, module) for name, module in modules.items()}
        if list(num_active) != list(self._weights):
            raise ValueError("num_active must have the names that prunable(model) lists, in order")
        if maskable is None:
            maskable = {name for name, w in self._weights.items() if num_active[name] < w.numel()}
        self._maskable = parameters_only(
            {name: weight for name, weight in self._weights.items() if name in maskable}
        )
        self._modules = {name: modules[name] for name in self._maskable}
        check_optimizer(optimizer, self._maskable)
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
        self._sets_up_state = False  # the step under way is not one of training
        self._withheld: list[tuple[Tensor, Tensor]] = []
        # Tensors that were loaded and masked since the last step: tensor, gate, the loaded values.
        self._loaded: list[tuple[Tensor, Gate, Tensor]] = []
        self._invariant = Invariant()
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
        self._hooks: Hooks | None = self._hook(steps=hooks)
        if not next(iter(self._weights.values())).is_meta and is_first_rank():
            warn_of_dense_weights(model)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles of modules and optimizers lose torch's hooks.
        state = dict(self.__dict__)
        state["_hooks"] = None if self._hooks is None else self._hooks.on_steps
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._hooks is not None:
            self._hooks = self._hook(steps=state["_hooks"])

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
        return dict(self._maskable)

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
        """Unhook the optimizer and the model; weights stay as they are."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    def before_step(self) -> None:
        """Do what precedes an optimizer step: mask the gradients, or update in the step's place.

        Raises:
            RuntimeError: The hooks do it already.
        """
        self._check_no_hooks()
        self._before_step()

    def after_step(self) -> None:
        """Do what follows an optimizer step: count it, and update if the method says so.

        Raises:
            RuntimeError: The hooks do it already.
        """
        self._check_no_hooks()
        self._after_step()

    @torch.no_grad()
    def enforce(self) -> None:
        """Zero weights and optimizer state of inactive connections, if something else wrote there.

        Needed after weights were written by hand, an average was swapped in, or the like;
        `load_state_dict` of model and optimizer does it by itself.
        """
        self._invariant.forget()
        tensors = held(self._optimizer, self._maskable, self._gates, state_of)
        zero_inactive((tensor, gate) for _, tensor, gate in tensors)

    def _check_no_hooks(self) -> None:
        if self._hooks is not None and self._hooks.on_steps:
            raise RuntimeError(
                "the hooks of the optimizer call this at every step; to call it by hand, make the "
                "sparsifier with hooks=False"
            )

    @torch.no_grad()
    def _before_step(self) -> None:
        self._sets_up_state = only_sets_up_state(self._optimizer)
        if self._sets_up_state:
            return
        self._loaded.clear()
        if not self._verified:
            self._verify()
        overflow = found_inf(self._optimizer)
        if overflow is not None and has_momentum(self._optimizer):
            create_momentum_buffers(self._optimizer)
        decay = self.method.gradient_decay
        if decay is not None:
            average_gradients(self._averages, self._maskable, decay, self._optimizer)
        # The device is asked only when an update may be due and steps may have been skipped. The
        # clock's bound cannot run past a due step, because it is exact after every question.
        due = self._is_due(self._clock.bound) and self._is_due(self._clock.settle())
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
    def _after_step(self) -> None:
        if self._sets_up_state:
            return
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

        Raises:
            SparsityError: An inactive weight or its optimizer state is not 0; see `enforce`.
        """
        self._check_inactive()
        sizes = {name: weight.numel() for name, weight in self._weights.items()}
        metrics = exploration.summarize(self.num_active, sizes)
        metrics.update({name: float(value) for name, value in self._last_update.items()})
        if self._explored is not None:
            maskable = sum(sizes[name] for name in self._maskable)
            metrics["exploration_rate"] = exploration.count(self._explored) / max(maskable, 1)
        return metrics

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
            masks={name: gate.mask() for name, gate in self._gates.items()},
            averages=self._averages,
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
        maskable = self._maskable
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
        for tensor, gate, values in self._loaded:  # they were masked by the masks before
            tensor.copy_(torch.where(gate.inactive & (tensor == 0), values, tensor))
        self._loaded.clear()
        self._invariant.forget()
        self._install(masks)

    def _hook(self, *, steps: bool) -> Hooks:
        return Hooks(
            self._optimizer,
            self._modules,
            steps=steps,
            before=self._before_step,
            after=self._after_step,
            weight_loaded=self._weight_loaded,
            optimizer_loaded=self._optimizer_loaded,
        )

    @torch.no_grad()
    def _weight_loaded(self, name: str) -> None:
        if name in self._gates:
            self._mask_loaded([(self._maskable[name], self._gates[name])])

    @torch.no_grad()
    def _optimizer_loaded(self) -> None:
        lay_out_state(self._optimizer)
        for name, gate in self._gates.items():
            state = state_of(self._optimizer, self._maskable[name])
            self._mask_loaded([(tensor, gate) for tensor in state.values()])

    def _mask_loaded(self, pairs: list[tuple[Tensor, Gate]]) -> None:
        """Mask loaded tensors, but keep the loaded values until the next step.

        The masks that belong to these values may be loaded after them.
        """
        self._loaded += [(tensor, gate, tensor.detach().clone()) for tensor, gate in pairs]
        zero_inactive(pairs)

    def _count_inactive(self) -> None:
        check_owned(self._modules, self._maskable)
        self._invariant.count(held(self._optimizer, self._maskable, self._gates, moments_of))

    def _check_inactive(self) -> None:
        self._count_inactive()
        self._invariant.read(self._optimizer)

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
        gradients = {name: weight.grad for name, weight in self._maskable.items()}
        unscale = inverse_scale(self._optimizer)
        return {
            name: gradient if unscale is None else gradient * unscale
            for name, gradient in gradients.items()
            if gradient is not None
        }

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
        check_held(self._optimizer, trained)
        weights = {name: weight.detach() for name, weight in trained.items()}
        old = masks_of(self._gates, weights)
        gradients = {name: g for name, g in self._gradients().items() if name in trained}
        if self.method.timing == "once":
            check_gradients(gradients, self.method.name)
        if has_ranks() or self._invariant.is_known:
            self._invariant.read(self._optimizer)
        survivors = self.method.survivors(old, weights, step)
        new = self.method.update(old, weights, gradients, step, self._method_state)
        check_masks(new, weights, f"method {self.method.name}")
        if any(new[name] is not old[name] for name in old):
            self.masks_version += 1
        for name, weight in self._maskable.items():
            if name not in self._gates:  # from now on every layer has a mask, a frozen one, too
                self._gates[name] = Gate(torch.ones_like(weight, dtype=torch.bool), weight)
        changed, grown = [], []  # numbers of connections, per layer
        for index, name in enumerate(self._weights):
            if name not in old:
                continue
            weight = trained[name]
            change = old[name] ^ new[name]
            fresh = change & new[name]
            changed.append(torch.count_nonzero(change))
            # Where as many come as go, half of the changes is known to be growth.
            halves = self.method.keeps_counts
            grown.append(changed[-1] // 2 if halves else torch.count_nonzero(fresh))
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
            weight = self._maskable[name]
            self._gates[name] = Gate(mask, weight)
            disconnect(self._optimizer, weight, self._gates[name], mask)
        self._counts = None
        self.masks_version += 1

    def _explore(self) -> None:
        if self._explored is not None:
            exploration.record(self._explored, masks_of(self._gates, self._maskable))

    def _verify(self) -> None:
        if has_ranks():
            verify_across_ranks({name: gate.mask() for name, gate in self._gates.items()})
        self._verified = True
