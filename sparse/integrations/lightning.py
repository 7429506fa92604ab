"""Sparse training in Lightning: `Trainer(callbacks=[SparseCallback("rigl", sparsity=0.9)])`."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..methods import Allocated
from ..training.sparsifier import Sparsifier
from .attachment import Attachment


class SparseCallback(Callback):
    """Makes the model of a Trainer sparse, saves the masks in its checkpoints, logs at updates.

    Args:
        method: Name of a method, or the record of one.
        t_end_fraction: Share of `trainer.estimated_stepping_batches` after which the topology
            settles, unless the settings say when.
        **settings: Settings of the named method, as its function takes them (`sparse.rigl`). Those
            that follow from the length of training may be left out, as with `main.py`.
    """

    def __init__(
        self, method: str | Allocated = "rigl", *, t_end_fraction: float = 0.75, **settings: Any
    ) -> None:
        self._attachment = Attachment(method, settings, t_end_fraction)

    @property
    def sparsifier(self) -> Sparsifier | None:
        """That of the present or the last `fit`, if there was one."""
        return self._attachment.sparsifier

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the method to the optimizer, which Lightning has just made."""
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"SparseCallback needs one optimizer, the model has {len(trainer.optimizers)}: "
                "call sparse.rigl or another method in configure_optimizers instead"
            )
        steps = trainer.estimated_stepping_batches  # makes the loader, which the next line asks
        epoch_steps = -(-trainer.num_training_batches // trainer.accumulate_grad_batches)  # up
        # With DDP around it, the model tells which processes share it.
        model = trainer.strategy.model or pl_module
        self._attachment.attach(model, trainer.optimizers[0], steps, epoch_steps)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Log at the first step and after each update."""
        if metrics := self._attachment.metrics(after_updates_only=True):
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a plain model: `test(ckpt_path="best")` loads weights of other masks into it."""
        self._attachment.detach()

    def state_dict(self) -> dict[str, Any]:
        """Give the state to the checkpoint."""
        return self._attachment.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a checkpoint's state; most strategies load it before `on_fit_start`."""
        self._attachment.load_state_dict(state_dict)
