"""Trackio."""

import contextlib
import io
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from image_classification.trackers.spec import TrackerSpec


class Trackio:
    """A run of trackio, in TRACKIO_DIR or where TRACKIO_SPACE_ID says."""

    def __init__(self, project: str, folder: Path, run_id: str | None) -> None:
        import trackio

        self._trackio = trackio
        self.run_id = run_id or f"run-{secrets.token_hex(4)}"
        with contextlib.redirect_stdout(io.StringIO()):  # the log has the console
            self._run = trackio.init(
                project=project,
                name=self.run_id,
                resume="must" if run_id else "never",
                embed=False,
                auto_log_gpu=False,  # the records have what matters of it
                auto_log_cpu=False,
            )
        self.address = f'{self.run_id}, shown by: trackio show --project "{project}"'

    def parameters(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(values)  # sent with the first record

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()


SPEC = TrackerSpec(
    open=Trackio, package="trackio", remedy="look at TRACKIO_DIR and TRACKIO_SPACE_ID"
)
