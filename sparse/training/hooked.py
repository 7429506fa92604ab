"""A masked model that follows the steps of its optimizer, by hooks or by calls."""

from abc import abstractmethod
from typing import Any

from .hooks import Hooks
from .masked import MaskedModel


class HookedModel(MaskedModel):
    """Calls `_before_step` and `_after_step` around every step of the optimizer."""

    _hooks: Hooks | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles of modules and optimizers lose torch's hooks.
        state = super().__getstate__()
        state["_hooks"] = None if self._hooks is None else self._hooks.on_steps
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._hooks is not None:
            self._hook(steps=state["_hooks"])

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

    def _hook(self, *, steps: bool) -> None:
        self._hooks = Hooks(
            self._optimizer,
            self._owners,
            steps=steps,
            before=self._before_step,
            after=self._after_step,
            weight_loaded=self._weight_loaded,
            optimizer_loaded=self._optimizer_loaded,
        )

    def _check_no_hooks(self) -> None:
        if self._hooks is not None and self._hooks.on_steps:
            raise RuntimeError(
                "the hooks of the optimizer call this at every step; to call it by hand, make the "
                "sparsifier with hooks=False"
            )

    @abstractmethod
    def _before_step(self) -> None: ...

    @abstractmethod
    def _after_step(self) -> None: ...
