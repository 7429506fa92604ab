"""MLflow."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from image_classification.trackers.spec import TrackerSpec

_AT_ONCE = 100  # parameters that a request may have
_LONGEST = 6000  # characters of a value


class Mlflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI."""

    def __init__(self, project: str, folder: Path, run_id: str | None) -> None:
        import mlflow

        self._entities = mlflow.entities
        self._client = client = mlflow.MlflowClient()
        if run_id is None:
            experiment = client.get_experiment_by_name(project)
            of = experiment.experiment_id if experiment else client.create_experiment(project)
            run_id = str(client.create_run(of).info.run_id)
        else:
            client.update_run(run_id, status="RUNNING")
        self.run_id = run_id
        self.address = f"run {run_id} at {mlflow.get_tracking_uri()}"

    def parameters(self, values: Mapping[str, Any]) -> None:
        known = self._client.get_run(self.run_id).data.params
        texts = {name: str(value)[:_LONGEST] for name, value in values.items()}
        new = [self._entities.Param(*item) for item in texts.items() if item[0] not in known]
        for start in range(0, len(new), _AT_ONCE):
            self._client.log_batch(self.run_id, params=new[start : start + _AT_ONCE])
        for name, text in texts.items():  # parameters cannot change, tags can
            if known.get(name, text) != text:
                self._client.set_tag(self.run_id, f"resumed.{name}", text)

    def log(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(name, v, now, step) for name, v in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self.run_id)


SPEC = TrackerSpec(
    open=Mlflow, package="mlflow", remedy="set MLFLOW_TRACKING_URI to a server or a database"
)
