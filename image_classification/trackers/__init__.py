"""Services that follow runs, by name: where `--log-to` sends the curves."""

import importlib.util
from pathlib import Path

from image_classification.trackers import mlflow, trackio, wandb
from image_classification.trackers.spec import Tracker, TrackerSpec

__all__ = ["TRACKERS", "Tracker", "TrackerSpec", "open_tracker", "require"]

TRACKERS: dict[str, TrackerSpec] = {
    "wandb": wandb.SPEC,
    "mlflow": mlflow.SPEC,
    "trackio": trackio.SPEC,
}
"""What `--log-to` can name."""


def require(name: str) -> None:
    """Raise ValueError (one line) if the package of a tracker is missing."""
    package = TRACKERS[name].package
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:  # a folder of this name is no package
        raise ValueError(f"--log-to {name} needs a package: pip install {package}")


def open_tracker(name: str, *, project: str, folder: Path, resumed: bool) -> Tracker:
    """Begin a run, or go on with the run that was begun in this folder.

    Args:
        name: One of `TRACKERS`.
        project: The project or experiment to which the run belongs.
        folder: Where the id of the run is kept; made if it is missing.
        resumed: Go on with the run whose id is there. Without one a new run begins.

    Raises:
        ValueError: One line: the package is missing, or the run cannot begin.
    """
    require(name)
    spec, kept = TRACKERS[name], folder / f"{name}_run.txt"
    try:
        run_id = kept.read_text().strip() if resumed and kept.is_file() else None
        folder.mkdir(parents=True, exist_ok=True)
        tracker = spec.open(project, folder, run_id)
        kept.write_text(f"{tracker.run_id}\n")
    except Exception as error:  # of a kind that only the package knows
        reason = " ".join(str(error).split())
        raise ValueError(f"--log-to {name}: {reason}; {spec.remedy}") from error
    return tracker
