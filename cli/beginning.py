"""The masks that a run begins with: those of --from-sparse."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cli.foreign import Network
from cli.weights import read_sparse
from image_classification import build
from image_classification.config import Config
from sparse.methods.beginning import sparse_only

_MASKS = "masks of --from-sparse"  # entry of what `build.prepare` hands on from the file


@dataclass(frozen=True)
class Beginning:
    """Masks that a run begins with."""

    num_active: Mapping[str, int]
    """Layer name -> active weights, of the layers that have a mask."""
    masks: Mapping[str, Tensor] | None = None
    """None in a run that is resumed: its checkpoint has the masks."""

    @property
    def about(self) -> str:
        """What the log says of them."""
        total = sum(mask.numel() for mask in (self.masks or {}).values())
        zeros = 1 - sum(self.num_active.values()) / max(total, 1)
        return f"--from-sparse: {len(self.num_active)} layers have masks, {zeros:.2%} zeros in them"


def take_weights(c: Config, flags: Any) -> Config:
    """Return the flags of the trainer with the weights of --from-sparse to start from.

    Raises:
        ValueError: Another flag says something else; one line.
    """
    if flags.from_sparse is None:
        return c
    for name, given in (
        ("--pretrained-from-file", c.pretrained_from_file is not None),
        ("--drop-masks", flags.drop_masks),
        ("--evaluate", c.evaluate),
    ):
        if given:
            raise ValueError(
                f"--from-sparse starts training with weights and masks: leave it or {name} out"
            )
    return dataclasses.replace(c, pretrained_from_file=flags.from_sparse)


def read(path: Path) -> Network:
    """Return what a file of --from-sparse holds, with its masks among the rest."""
    found = read_sparse(path)
    return dataclasses.replace(found, rest={_MASKS: found.masks})


def begin(flags: Any, start: build.Start) -> tuple[Any, Beginning | None]:
    """Return the masks that a run begins, or began, with; and the sparse flags, completed.

    Args:
        flags: The sparse flags.
        start: Where the run begins.

    Raises:
        ValueError: The file has no masks, or a checkpoint is of another run; one line.
    """
    if start.path is not None:
        kept = start.state.get("config") or {}
        if "begins_with" in kept and flags.sparse_method != "dense":
            flags = dataclasses.replace(flags, from_sparse=kept["from_sparse"])
            return flags, Beginning(kept["begins_with"])
        if flags.from_sparse is not None:
            raise ValueError(
                f"{start.path} was not begun with --from-sparse: leave it out to go on with that "
                "run, or name another --workspace"
            )
        return flags, None
    if flags.from_sparse is None:
        return flags, None
    weights = start.pretrained["state_dict"]  # without the head that --new-head leaves out
    masks = {n: mask for n, mask in start.pretrained[_MASKS].items() if n in weights}
    masks, num_active = sparse_only(masks)
    if not masks:
        raise ValueError(
            f"--from-sparse {flags.from_sparse} has no masks with zeros: --pretrained-from-file "
            "takes the weights of a dense network"
        )
    return flags, Beginning(num_active, masks)
