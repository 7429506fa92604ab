"""Put a network together from runs that trained a partition each: `python -m cli.combine`.

For P-GaP: every run starts from the same weights and grows another partition of the layers. The new
network has the layers of a partition from the run that grew it, with their normalization and their
masks, and everything else from the first run.
"""

from image_classification import versions

if __name__ == "__main__":
    versions.require()

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor

from cli.convert import read, write
from cli.foreign import Network
from cli.program import Program
from image_classification.flags import argument, flag
from sparse.methods.gap import STAGES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Put a network together from runs that trained a partition each."""

    target: Path = argument("checkpoint to write")
    runs: list[Path] = flag([], "checkpoints, in the order of the partitions", nargs="+")
    partitions: list[str] = flag(
        list(STAGES), "globs of the partitions, those of one joined by commas", nargs="+"
    )


def owners(names: Iterable[str], partitions: Sequence[Sequence[str]]) -> dict[str, int]:
    """Say which partition an entry belongs to, by globs of entries or of their layers.

    Raises:
        ValueError: An entry belongs to two partitions, or a partition has none.
    """
    found: dict[str, int] = {}
    for index, globs in enumerate(partitions):
        members = [name for name in names if any(_matches(name, glob) for glob in globs)]
        if not members:
            raise ValueError(f"--partitions: {','.join(globs)} matches nothing")
        for name in members:
            if name in found:
                raise ValueError(f"--partitions: {name} is in more than one")
            found[name] = index
    return found


def merge(
    copies: Sequence[Mapping[str, Tensor]], partitions: Sequence[Sequence[str]]
) -> dict[str, Tensor]:
    """Take the entries of every partition from its own copy, and the others from the first one.

    Args:
        copies: Entry -> tensor, with the same entries in all.
        partitions: Globs for each copy.
    """
    owner = owners(copies[0], partitions)
    return {name: copies[owner.get(name, 0)][name] for name in copies[0]}


def _matches(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob) or fnmatchcase(name.rpartition(".")[0], glob)


def combine(runs: Sequence[Network], partitions: Sequence[str]) -> Network:
    """Put a network together, masks and all.

    Raises:
        ValueError: The runs are not of one network, or their number is another than that of the
            partitions.
    """
    if len(runs) != len(partitions):
        raise ValueError(f"--runs names {len(runs)}, --partitions {len(partitions)}: one for each")
    first = runs[0]
    for run in runs:
        if run.arch != first.arch or list(run.state_dict) != list(first.state_dict):
            raise ValueError("--runs: they are not of one network")
    globs = [[glob.strip() for glob in part.split(",")] for part in partitions]
    owner = owners(first.state_dict, globs)
    masks = {}
    for name in first.masks:
        own = runs[owner.get(name, 0)]
        if name not in own.masks:
            raise ValueError(f"--runs: the one that grew {name} has no mask for it")
        masks[name] = own.masks[name]
    merged = merge([run.state_dict for run in runs], globs)
    return dataclasses.replace(first, state_dict=merged, masks=masks)


def run(given: Flags) -> str:
    """Combine; return the line that says what was written.

    Raises:
        ValueError: A user's mistake, in one line.
    """
    if not given.runs:
        raise ValueError("--runs: name a checkpoint for each partition")
    found = combine([read(path) for path in given.runs], given.partitions)
    assert found.arch is not None
    write(found, given.target, arch=found.arch)
    zeros = sum(int((~mask).sum()) for mask in found.masks.values())
    masked = sum(mask.numel() for mask in found.masks.values())
    share = f", {zeros / masked:.2%} zeros in its {len(found.masks)} masks" if masked else ""
    return f"{given.target}: {found.arch} of {len(given.runs)} runs{share}"


PROGRAM = Program("python -m cli.combine", Flags, run)
main = PROGRAM.main


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
