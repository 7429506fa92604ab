"""The loader that all backends share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from image_classification.data.bad_files import BadFiles
from image_classification.data.order import BatchPlan, IntArray
from image_classification.data.stage import Batch, DeviceStage


class Source(Protocol):
    """Read and augment images: those that it is told to, in the order that it is told."""

    def read(self, epoch: int, batches: Sequence[IntArray]) -> Generator[Batch, None, None]:
        """Yield a batch for each batch of indices, without the images that cannot be read.

        The `bad_files` of a batch name the files that are missing in it.
        """
        ...

    def close(self) -> None:
        """Stop the processes and threads."""
        ...


@dataclass(frozen=True, kw_only=True)
class BackendSpec:
    """A backend that `--data-backend` can name."""

    source: Callable[..., Source]
    """Called with a `DataConfig` and, if the backend reads images, with an `ImageList` and
    `training` by keyword."""
    reads_images: bool = True
    """Whether it reads a directory of images; otherwise it makes them up."""
    needs_cuda: bool = False
    refuses: Mapping[str, str] = field(default_factory=dict)
    """Interpolations and augmentations that it does not have -> why, and what to pass instead."""


class EpochLoader:
    """Join a plan (which images), a source (their pixels) and the way to the device.

    Implements `image_classification.data.Loader`.
    """

    def __init__(
        self, plan: BatchPlan, source: Source, stage: DeviceStage, bad_files: BadFiles
    ) -> None:
        self._plan = plan
        self._source = source
        self._stage = stage
        self.bad_files = bad_files
        self._position = (0, 0)  # epoch, and number of its images handed out on all ranks
        self._resume: tuple[int, int] | None = None
        self._running: Generator[tuple[Tensor, Tensor], None, None] | None = None

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch on this rank."""
        return len(self._plan)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, from its beginning or from a loaded position in it.

        Images that cannot be read are left out of their batch, which may end up without any image.
        The number of batches does not change. If the caller left an epoch before its end, the
        rest of it is given up when the next epoch is started.
        """
        if self._running is not None:
            self._running.close()
        start = self._resume[1] if self._resume is not None and self._resume[0] == epoch else 0
        self._resume = None
        self._position = (epoch, start)
        self._running = self._batches(epoch, start)
        return self._running

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the epoch, and the number of images handed out on all ranks.

        The position counts images, so a run can also continue from it with another number of ranks
        or another batch size. The bad files are those that this rank knows of.
        """
        epoch, samples = self._position
        return {
            "epoch": epoch,
            "samples": samples,
            "seed": self._plan.seed,
            "num_samples": self._plan.num_samples,
            "bad_files": self.bad_files.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the position for the next call of `epoch`, if that call is for the same epoch.

        Raises:
            ValueError: The position lies within an epoch, and that epoch had another order: the
                seed or the number of images differs.
        """
        epoch, samples = int(state["epoch"]), int(state["samples"])
        if samples:
            for key, name, mine in (
                ("seed", "--seed", self._plan.seed),
                ("num_samples", "number of images", self._plan.num_samples),
            ):
                if state[key] != mine:
                    raise ValueError(
                        f"cannot go on within epoch {epoch}: its {name} was {state[key]}, now it"
                        f" is {mine}"
                    )
        self._resume = self._position = (epoch, samples)
        self.bad_files.load(state.get("bad_files", ()))  # older states have none

    def close(self) -> None:
        """Stop the processes and threads of the loader."""
        if self._running is not None:
            self._running.close()
        self._source.close()

    def _batches(self, epoch: int, start: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        batches = self._plan.batches(epoch, start)
        with contextlib.closing(self._source.read(epoch, batches)) as raw:
            for number, batch in enumerate(self._stage(raw), 1):
                # Updated before the yield: a caller that asks for the position has this batch
                # already.
                self._position = (epoch, start + number * self._plan.global_batch)
                if number == len(batches):
                    self._position = (epoch + 1, 0)
                self.bad_files.meet(batch.bad_files)
                yield batch.images, batch.targets
        self._position = (epoch + 1, 0)
