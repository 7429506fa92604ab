"""Files that cannot be read: each is counted once, and too many of them end the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import torch

from image_classification import distributed
from image_classification.data.decode import why_unreadable


class DataError(ValueError):
    """The data cannot be used any further; one line for the user."""


class BadFiles:
    """Keep account of the files of a split that could not be read.

    A rank notes the bad files that it meets. `share_bad_files` tells all ranks.

    Args:
        directory: Directory of the split.
        num_files: Images in the split.
        limit: Share of them, 0 to 1, that may be bad; rounded down to whole files.
        found: What was bad when the directory was listed: file name -> reason.
    """

    def __init__(
        self, directory: Path | None, *, num_files: int, limit: float, found: dict[str, str]
    ) -> None:
        self._directory = directory
        self._num_files = num_files
        self._limit = limit
        self._allowed = math.floor(limit * num_files + 1e-6)  # 0.29 * 100 is below 29
        self._found = found
        self._known: dict[str, str] = {}
        self.fresh = dict(found)
        """Bad files that this rank met and has not shared yet: file name -> reason."""

    def __len__(self) -> int:
        """Return the number of bad files that all ranks know of."""
        return len(self._known)

    def meet(self, files: dict[str, str]) -> None:
        """Note files (name -> reason) that were left out of a batch of this rank."""
        self.fresh.update({n: r for n, r in files.items() if n not in self._known})

    def add(self, met: Iterable[dict[str, str]]) -> list[str]:
        """Take in what all ranks met.

        Returns:
            One warning for each new bad file, up to the number of files that are allowed.
        """
        new = {name: reason for files in met for name, reason in sorted(files.items())}
        new = {name: reason for name, reason in new.items() if name not in self._known}
        room = max(0, self._allowed - len(self._known))
        self._known.update(new)
        self.fresh = {}
        return [f"{reason}; it is left out" for reason in list(new.values())[:room]]

    def check(self) -> None:
        """Raise a DataError when more files are bad than allowed."""
        if len(self._known) <= self._allowed:
            return
        *_, example = self._known.values()
        raise DataError(
            f"{len(self._known)} of {self._num_files} files in {self._directory} cannot be used,"
            f" --max-bad-files {self._limit:g} allows {self._allowed}; one of them: {example};"
            " repair or remove them, or raise --max-bad-files"
        )

    def state(self) -> list[str]:
        """Return the names of the bad files met so far, below the directory."""
        names = (self._known.keys() | self.fresh.keys()) - self._found.keys()
        return sorted(name.removeprefix(f"{self._directory}/") for name in names)

    def load(self, names: Collection[str]) -> None:
        """Count the files of a state that still cannot be read, without another warning."""
        for name in (f"{self._directory}/{name}" for name in names):
            if reason := why_unreadable(name):
                self._known[name] = reason
                self.fresh.pop(name, None)


def share_bad_files(
    splits: Sequence[BadFiles], *, device: torch.device, warn: Callable[[str], None]
) -> int:
    """Tell all ranks the bad files that each rank met; all ranks call this together.

    Args:
        splits: The accounts, in the same order on all ranks.
        device: Where numbers are summed over ranks.
        warn: Takes one line for each new bad file.

    Returns:
        The number of bad files of all splits.

    Raises:
        DataError: More files of a split are bad than allowed, on all ranks.
    """
    num_fresh = torch.tensor(sum(len(bad.fresh) for bad in splits), device=device)
    if int(distributed.all_reduce_sum(num_fresh)):
        for bad in splits:
            for line in bad.add(distributed.all_gather_object(bad.fresh)):
                warn(line)
            bad.check()
    return sum(map(len, splits))
