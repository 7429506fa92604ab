"""Sparse training in Transformers: `Trainer(callbacks=[SparseCallback("rigl", sparsity=0.9)])`."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, trainer_utils

from ..methods import Allocated
from ..training.sparsifier import Sparsifier
from .attachment import Attachment

FILE = "sparsifier.pt"  # in each checkpoint


class SparseCallback(TrainerCallback):
    """Makes the model of a Trainer sparse, saves masks with its checkpoints, adds to its log.

    Args:
        method: Name of a method, or the record of one.
        t_end_fraction: Share of all steps after which the topology settles, unless settings say it.
        **settings: Settings of the named method, as for Lightning.
    """

    def __init__(
        self, method: str | Allocated = "rigl", *, t_end_fraction: float = 0.75, **settings: Any
    ) -> None:
        self._attachment = Attachment(method, settings, t_end_fraction)

    @property
    def sparsifier(self) -> Sparsifier | None:
        """That of the present or the last `train`, if there was one."""
        return self._attachment.sparsifier

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the method; a Trainer that resumes has loaded model and optimizer already."""
        if state.global_step:
            given = args.resume_from_checkpoint
            folder = Path(given) if given and Path(given).is_dir() else _folder(args, state)
            self._attachment.load_state_dict(_load(folder))
        batches, every = kwargs["train_dataloader"], args.gradient_accumulation_steps
        epoch = -(-len(batches) // every) if trainer_utils.has_length(batches) else float("inf")
        self._attachment.attach(kwargs["model"], kwargs["optimizer"], state.max_steps, epoch)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the metrics to a record of training."""
        if "loss" in kwargs["logs"]:
            metrics = self._attachment.metrics()
            kwargs["logs"] |= metrics
            state.log_history[-1] |= metrics

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the masks into the checkpoint, which the Trainer has just written."""
        masks = self._attachment.state_dict()  # of all processes together
        if state.is_world_process_zero:
            path = _folder(args, state) / FILE
            torch.save(masks, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave a plain model, with the masks of the best checkpoint if its weights were loaded."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._attachment.load_state_dict(_load(Path(state.best_model_checkpoint)))
        self._attachment.detach()


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _load(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: a sparse run goes on from its own checkpoints; if they lie "
            "elsewhere, pass resume_from_checkpoint to TrainingArguments, too"
        )
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return found
