"""Hold the masks of a model, and keep what they leave inactive at exactly 0."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from ..methods.allocation import check_named
from ..methods.base import Method
from ..methods.layers import check_owned, owners_of, parameters_only, prunable_modules, weights_of
from ..topology import rng
from ..topology.flat import all_true, count_nonzero, vector
from ..topology.shards import Ranks, local, locals_of, part_like
from .blocks import check_whole, in_blocks
from .checkpoints import check_counts, check_masks
from .connections import NewConnections, disconnect, mask_module
from .consistency import check_not_joined, groups_with_copies, verify_across_ranks
from .gates import Gate, active_positions, count_active, masks_of, update_gates, zero_inactive
from .invariant import Invariant, held
from .metrics import count_explored, fresh_marks, record_explored
from .optimizers import check_optimizer, lay_out_state, moments_of, state_of

Tensors = Mapping[str, Tensor]


class MaskedModel:
    """The weights of a model, their masks, and the optimizer that holds their state.

    Weights and optimizer state of inactive connections are exactly 0. What is loaded into them is
    masked at once.

    Attributes:
        model: The model, as it was given.
        masks_version: Changes whenever the masks may have changed. Code that caches something
            computed from the masks compares it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        num_active: Mapping[str, int],
        maskable: Collection[str] | None,
        process_group: "distributed.ProcessGroup | None",
        track_exploration: bool,
    ) -> None:
        """Find the weights; the arguments are those of `Sparsifier`.

        Raises:
            ValueError: An argument does not fit the model or the optimizer.
        """
        self.model = model
        modules = prunable_modules(model, num_active)
        # A weight that is computed from parameters stays dense; a stand-in tells its size.
        self._weights = weights_of(modules)
        if list(num_active) != list(self._weights):
            raise ValueError("num_active must have the names that prunable(model) lists, in order")
        if maskable is None:
            maskable = {name for name, w in self._weights.items() if num_active[name] < w.numel()}
        self._maskable = parameters_only(
            {name: weight for name, weight in self._weights.items() if name in maskable}
        )
        self._modules = {name: modules[name] for name in self._maskable}
        self._owners = list(owners_of(model, self._maskable))
        check_optimizer(optimizer, self._maskable)
        lay_out_state(optimizer)
        self._optimizer = optimizer
        self.masks_version = 0
        self._gates: dict[str, Gate] = {}
        self._counts: dict[str, int] | None = None
        self._explored: dict[str, Tensor] | None = {} if track_exploration else None
        self._num_explored = 0
        # Tensors that were loaded and masked since the last step: tensor, gate, the loaded values.
        self._loaded: list[tuple[Tensor, Gate, Tensor]] = []
        self._invariant = Invariant()
        self._ranks = Ranks.of(self._maskable)
        self._copies = groups_with_copies(model, self._ranks, process_group)

    def __getstate__(self) -> dict[str, Any]:
        # Groups of processes cannot be copied. A copy of a model is on its own.
        return {k: v for k, v in self.__dict__.items() if k not in ("_ranks", "_copies")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._ranks, self._copies = Ranks.of(self._maskable), []

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
        """List the active entries of a weight as offsets into its memory here; None: all are.

        int64 and ascending. Waits for the device.
        """
        gate = self._gates.get(name)
        return None if gate is None else active_positions(gate, self._weights[name])

    @torch.no_grad()
    def enforce(self) -> None:
        """Zero weights and optimizer state of inactive connections, if something else wrote there.

        Needed after weights were written by hand, an average was swapped in, or the like;
        `load_state_dict` of model and optimizer does it by itself.
        """
        self._invariant.forget()
        tensors = held(self._optimizer, self._maskable, self._gates, state_of)
        zero_inactive((tensor, gate) for _, tensor, gate in tensors)

    @torch.no_grad()
    def apply_to(self, module: nn.Module) -> None:
        """Zero the inactive weights of another module with the same parameter names.

        An average over training (EMA) of weights under moving masks is not sparse until then.

        Raises:
            ValueError: The module lacks a masked weight, or it has another shape there.
        """
        mask_module(module, self._gates)

    def _first_masks(
        self, method: Method, given: Tensors | None, num_active: Mapping[str, int], seed: int
    ) -> dict[str, Tensor]:
        """Return the masks to begin with: those of the caller, or else those a method chooses."""
        if given is not None:
            return self._given(given, num_active, method)
        masked = {n: w for n, w in self._weights.items() if num_active[n] < w.numel()}
        indices = {name: index for index, name in enumerate(self._weights)}
        draws = {
            name: rng.Draw(tuple(weight.shape), (seed, 0, indices[name], rng.INITIAL_MASK))
            for name, weight in masked.items()
        }
        rng.words((seed,))  # refuses what is no seed, even if the method draws nothing
        if not draws:
            return {}
        values = {name: weight.detach() for name, weight in masked.items()}
        return dict(in_blocks(method).first_masks(draws, num_active, all_true(masked), values))

    def _given(
        self, masks: Tensors, num_active: Mapping[str, int], method: Method
    ) -> dict[str, Tensor]:
        """Return masks of the caller where the weights are, if they fit them and their counts."""
        wanted = {n: w for n, w in self._weights.items() if num_active[n] < w.numel()}
        check_named(masks, self._weights)
        check_masks(masks, wanted | {n: self._weights[n] for n in masks}, "the caller")
        check_counts(masks, num_active)
        check_whole(method, masks, "the caller")
        return {name: mask.to(self._weights[name].device) for name, mask in masks.items()}

    def _follow_layout(self) -> None:
        """Lay out gates and optimizer state as the weights are, which may have changed since."""
        if not self._gates_serve():
            gated = {name: self._maskable[name] for name in self._gates}
            masks, self._gates = masks_of(self._gates, gated), Gate.together(gated)
            update_gates(self._gates, masks)
            self.masks_version += 1
            lay_out_state(self._optimizer)

    def _gates_serve(self) -> bool:
        """Say whether all gates lie where and as their weights do now."""
        return all(gate.serves(self._maskable[name]) for name, gate in self._gates.items())

    @torch.no_grad()
    def _install(self, masks: Tensors) -> None:
        """Take masks over, in place of any others, and zero what they leave inactive.

        Loaded values that the former masks zeroed come back where the new ones are active.

        Args:
            masks: Spread as their weights, or whole.
        """
        for tensor, gate, values in self._loaded:
            tensor.copy_(torch.where(gate.inactive & (tensor == 0), values, tensor))
        self._loaded.clear()
        self._invariant.forget()
        weights = {name: self._maskable[name] for name in masks}
        masks = {name: part_like(mask, weights[name]) for name, mask in masks.items()}
        if list(self._gates) != list(masks) or not self._gates_serve():
            self._gates = Gate.together(weights)
        disconnect(self._optimizer, self._maskable, self._gates, masks)
        self._counts = None
        self.masks_version += 1
        self._record({})

    def _record(self, numbers: Tensors) -> Mapping[str, Tensor | int]:
        """Record the masks as they are now; add up numbers of the processes that share the weights.

        These processes also add up how many weights are active or explored, and the violations of
        the invariant, in one all-reduce. Each of them can tell these numbers alone after it.

        Args:
            numbers: 0-dim int64 tensors.

        Returns:
            Their sums.

        Raises:
            SparsityError: One of the processes found a violation.
        """
        if self._explored is None and not self._ranks.groups:
            return numbers
        masks = locals_of(masks_of(self._gates, self._maskable))
        if self._explored is not None:
            record_explored(self._explored, masks)
        if not self._ranks.groups:
            return numbers
        active = count_nonzero(masks)
        counts = [
            torch.stack(list(numbers.values())) if numbers else active[:0],
            active * vector(self._ranks.owned, active.device),
            active.new_zeros(1).add_(count_explored(self._owned(self._explored or {}))),
            self._invariant.counts.to(active.device),
        ]
        sums = torch.split(self._ranks.sum(torch.cat(counts)), list(map(len, counts)))
        known = dict(zip(self._maskable, sums[1].tolist(), strict=True))
        self._counts = {name: w.numel() for name, w in self._weights.items()} | known
        self._num_explored = int(sums[2])
        self._invariant.replace(sums[3])
        self._invariant.read(self._optimizer)
        return dict(zip(numbers, sums[0].tolist(), strict=True))

    def _count_explored(self) -> int:
        """Count the weights that were ever active. May wait for the device."""
        if self._ranks.groups:
            return self._num_explored
        return count_explored(self._explored or {})

    def _owned(self, tensors: Tensors) -> dict[str, Tensor]:
        """Leave out what another of the processes that share the weights counts."""
        owned = dict(zip(self._maskable, self._ranks.owned, strict=True))
        return {name: tensor for name, tensor in tensors.items() if owned[name]}

    def _verify(self) -> None:
        """Check that model and processes agree about weights and masks.

        Raises:
            SparsityError: A weight was replaced, or the masks differ between processes.
        """
        check_owned(self.model, self._modules, self._maskable)
        for group in self._copies:
            masks = masks_of(self._gates, {name: self._weights[name] for name in self._gates})
            verify_across_ranks(locals_of(masks), group)

    def _reconnect(self, old: Tensors, survivors: Tensors, new: Tensors) -> dict[str, Tensor]:
        """Change masks, and zero what they leave inactive; return the marks of new connections.

        Args:
            old: The masks before, of the layers that change. From now on all layers have a mask,
                those that do not change, too.
            survivors: The connections that keep weight and state.
            new: The masks after.
        """
        if self._copies:
            check_not_joined(self.model)
        self._counts = None
        self.masks_version += any(new[name] is not old[name] for name in old)
        self._gates |= Gate.together(
            {n: w for n, w in self._maskable.items() if n not in self._gates}
        )
        reset = {name: survivors[name] for name, mask in old.items() if survivors[name] is not mask}
        if reset:
            disconnect(self._optimizer, self._maskable, self._gates, reset)
        disconnect(self._optimizer, self._maskable, self._gates, {name: new[name] for name in old})
        return fresh_marks(old, new)

    def _begin(
        self, connections: NewConnections, fresh: Tensors, gradients: Tensors, step: int
    ) -> None:
        """Give new connections, marked by `fresh`, their first weight and state."""
        indices = {name: index for index, name in enumerate(self._weights) if name in fresh}
        keys = {n: (connections.seed, step, i, rng.GROW_WEIGHT) for n, i in indices.items()}
        weights = {name: self._maskable[name] for name in keys}
        connections.write(self._optimizer, weights, fresh, gradients, keys)

    def _zero_gradients(self) -> None:
        self._follow_layout()
        gradients = ((self._weights[name].grad, gate) for name, gate in self._gates.items())
        zero_inactive((gradient, gate) for gradient, gate in gradients if gradient is not None)

    @torch.no_grad()
    def _weight_loaded(self, name: str) -> None:
        if name in self._gates:
            self._mask_loaded([(self._maskable[name], self._gates[name])])

    @torch.no_grad()
    def _optimizer_loaded(self) -> None:
        lay_out_state(self._optimizer)
        tensors = held(self._optimizer, self._maskable, self._gates, state_of)
        weights = set(map(id, self._maskable.values()))
        self._mask_loaded([(t, gate) for _, t, gate in tensors if id(t) not in weights])

    def _mask_loaded(self, pairs: list[tuple[Tensor, Gate]]) -> None:
        """Mask loaded tensors, but keep the loaded values until the next step.

        The masks that belong to these values may be loaded after them.
        """
        pairs = [(local(tensor), gate) for tensor, gate in pairs]
        self._loaded += [(tensor, gate, tensor.detach().clone()) for tensor, gate in pairs]
        zero_inactive(pairs)

    def _count_inactive(self) -> None:
        check_owned(self.model, self._modules, self._maskable)
        self._invariant.count(held(self._optimizer, self._maskable, self._gates, moments_of))

    def _check_inactive(self) -> None:
        """Raise SparsityError if an inactive weight or its optimizer state is not 0."""
        self._count_inactive()
        self._invariant.read(self._optimizer)
