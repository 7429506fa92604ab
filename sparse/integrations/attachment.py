"""What the callbacks share: a method that is attached when a loop has its model and optimizer."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import check_choice
from ..methods import METHODS, Allocated
from ..methods.settings import complete, names_of
from ..training.checkpoints import collected
from ..training.resumption import resume
from ..training.sparsifier import Sparsifier


class Attachment:
    """A method, its settings, and the sparsifier of the present or the last training."""

    def __init__(self, method: str | Allocated, settings: Mapping[str, Any], fraction: float):
        if not 0 < fraction <= 1:
            raise ValueError(f"t_end_fraction must be in (0, 1], got {fraction}")
        if isinstance(method, str):
            check_choice("method", method, list(METHODS))
        known = [*names_of(METHODS[method]), "seed"] if isinstance(method, str) else []
        for name in settings.keys() - known:
            raise ValueError(f"method {method!r} takes no setting {name}")
        self._method, self._settings, self._fraction = method, dict(settings), fraction
        self.sparsifier: Sparsifier | None = None
        self._trained: Sparsifier | None = None  # the sparsifier, while it is attached
        self._state: dict[str, Any] = {}  # of the weights, between trainings
        self._reported = -1  # number of updates at the newest report

    def attach(
        self, model: nn.Module, optimizer: Optimizer, total_steps: float, epoch_steps: float
    ) -> None:
        """Make the model sparse, or go on with the state of the weights that it holds."""
        self.detach()  # of a training that was interrupted
        method = self._create(total_steps, epoch_steps)
        make, state = (resume, [self._state]) if self._state else (Sparsifier, [])
        self.sparsifier = self._trained = make(model, optimizer, method, *state)
        self._state, self._reported = {}, -1

    def detach(self) -> None:
        """Leave the model as it is, and keep the state of its weights."""
        self._state = self.state_dict()
        if self._trained is not None:
            self._trained.remove()
            self._trained = None

    def state_dict(self) -> dict[str, Any]:
        """Give the state, which is empty before the first training; all processes must ask."""
        return collected(self._trained.state_dict()) if self._trained else self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state over, now or when training begins."""
        self._state = state
        if self._trained is not None:
            self._trained.load_state_dict(state)

    def metrics(self, *, after_updates_only: bool = False) -> dict[str, float]:
        """Give the metrics of the whole model, as sparse/<name>; none without another update."""
        assert self._trained is not None
        last, self._reported = self._reported, self._trained.num_updates
        if after_updates_only and last == self._reported:
            return {}
        found = self._trained.metrics().items()
        return {
            f"sparse/{name}": value for name, value in found if not name.startswith("sparsity.")
        }

    def _create(self, total_steps: float, epoch_steps: float) -> Allocated:
        if isinstance(self._method, Allocated):
            return self._method
        kind = METHODS[self._method]
        return kind(**complete(kind, self._settings, total_steps, epoch_steps, self._fraction))
