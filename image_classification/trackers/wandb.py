"""Weights & Biases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from image_classification.trackers.spec import TrackerSpec


class Wandb:
    """A run of wandb. Offline runs lie in the folder and are sent by `wandb sync`."""

    def __init__(self, project: str, folder: Path, run_id: str | None) -> None:
        import wandb

        settings = wandb.Settings(silent=True, console="off")
        self._run = wandb.init(
            project=project, dir=str(folder), id=run_id, resume="allow", settings=settings
        )
        # A resumed run repeats steps, which wandb's own count does not allow.
        self._run.define_metric("*", step_metric="step")
        self.run_id = self._run.id
        self.address = self._run.dir if self._run.offline else str(self._run.url)

    def parameters(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


SPEC = TrackerSpec(
    open=Wandb, package="wandb", remedy="log in with `wandb login`, or set WANDB_MODE=offline"
)
