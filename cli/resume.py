"""Check that a run fits the masks of the checkpoint from which it starts."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cli.beginning import Beginning
from cli.flags import find_method, settings_kept, spell
from cli.join import create_sparsifier, try_out
from image_classification import build
from image_classification.config import Config, changes
from sparse.training.checkpoints import method_name, read_masks


class Saved:
    """The sparse side of a checkpoint.

    Args:
        state: The whole checkpoint, or nothing.
        path: Its file, for messages.

    Raises:
        ValueError: One line: the masks cannot be read.
    """

    def __init__(self, state: Mapping[str, Any], path: Path | None) -> None:
        self.state, self.path = state, path
        self.entry: dict[str, Any] = state.get("sparse") or {}
        """State of the sparse method; empty in the checkpoint of a dense run."""
        self.flags: Mapping[str, Any] = state.get("config") or {}
        """What `record` made, with the trainer's flags; older checkpoints lack the former."""
        try:
            self.masks = read_masks(self.entry)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: the masks cannot be read: {error}") from error
        self.method = method_name(self.entry)

    def __str__(self) -> str:
        """Say how the network was trained, in flags where they are known."""
        if "sparse_method" in self.flags:
            return f"{self.path} was trained with {spell(self.flags)}"
        zeros = sum(int((~mask).sum()) for mask in self.masks.values())
        share = zeros / max(1, sum(mask.numel() for mask in self.masks.values()))
        about = f"{share:.4g} of the weights in its {len(self.masks)} masks are zero"
        if self.method is None:
            return f"{self.path} is sparse ({about})"
        name = self.method
        if self.entry["method"] != name:  # by its former name
            name += " --redistribution none"
        return (
            f"{self.path} was trained with --sparse-method {name} ({about}; it is too old to know "
            "its other flags)"
        )

    def num_active(self) -> dict[str, int]:
        """Count the weights of masked layers that are active or, against the mask, not 0."""
        weights = self.state.get("state_dict", {})
        return {n: int((mask | (weights[n] != 0)).sum()) for n, mask in self.masks.items()}

    def violations(self) -> list[str]:
        """Say where weights, or averaged weights, are not 0 although their mask says so."""
        lines = []
        for entry, prefix, what in (
            ("state_dict", "", "weights"),
            ("ema", "module.", "averaged weights"),
        ):
            weights: Mapping[str, Tensor] = self.state.get(entry) or {}
            counts = {
                name: int(((weights[prefix + name] != 0) & ~mask).sum())
                for name, mask in self.masks.items()
                if prefix + name in weights
            }
            if total := sum(counts.values()):
                worst = max(counts, key=lambda name: counts[name])
                lines.append(
                    f"{self.path}: {total} {what} are not 0 where the masks say so, "
                    f"{counts[worst]} of them in {worst}"
                )
        return lines


def saved_masks(c: Config, start: build.Start) -> Saved:
    """Return the sparse side of the checkpoint that a run takes its weights from."""
    if start.path is None and c.pretrained_from_file:
        return Saved(start.pretrained, Path(c.pretrained_from_file))
    return Saved(start.state, start.path)


def check_sparsity(
    c: Config,
    flags: Any,
    start: build.Start,
    model: nn.Module,
    beginning: Beginning | None = None,
) -> list[str]:
    """Compare the sparse flags with the network, the run and the checkpoint that it starts from.

    Args:
        c: The flags of the trainer.
        flags: The sparse flags.
        start: Where the run begins.
        model: The network on the meta device, where trying it out costs nothing.
        beginning: Masks that it begins, or began, with.

    Returns:
        Lines for the log.

    Raises:
        ValueError: One line: a flag does not fit, or masks would be lost without a word.
    """
    saved = saved_masks(c, start)
    total_steps = c.epochs * start.steps.steps_per_epoch
    if flags.drop_masks:
        _check_drop_masks(c, flags)
    if c.evaluate:
        return saved.violations()
    try_out(c, flags, model, total_steps, beginning)
    if start.path is not None:
        return _check_resume(c, flags, saved, model, total_steps, beginning)
    if not saved.masks or beginning is not None:
        return []
    if not flags.drop_masks:
        raise ValueError(
            f"{saved}: --pretrained-from-file takes weights without masks, and its zeros become "
            "weights like any other: say --drop-masks if you mean that, --from-sparse to begin "
            "with the masks, or --resume to continue the run"
        )
    return [f"--drop-masks: training starts from the weights alone; {saved}"]


def _check_drop_masks(c: Config, flags: Any) -> None:
    if c.evaluate or not (c.resume or c.pretrained_from_file):
        raise ValueError(
            "--drop-masks has no effect without training from --resume or --pretrained-from-file"
        )
    if flags.sparse_method != "dense" and not c.pretrained_from_file:
        raise ValueError(
            f"--drop-masks has no effect with --sparse-method {flags.sparse_method} and --resume, "
            "which go on with the masks"
        )


def _check_resume(
    c: Config,
    flags: Any,
    saved: Saved,
    model: nn.Module,
    total_steps: int,
    beginning: Beginning | None,
) -> list[str]:
    method = flags.sparse_method
    if not saved.entry:
        if method == "dense":
            return []
        raise ValueError(
            f"{saved.path} was trained dense, --sparse-method {method} cannot continue it: start "
            "from its weights with --pretrained-from-file"
        )
    if method == "dense":
        if flags.drop_masks:
            return [f"--drop-masks: training goes on dense; {saved}"]
        raise ValueError(f"{saved}: repeat these flags, or go on dense with --drop-masks")
    if saved.method != find_method(method).name:
        raise ValueError(
            f"{saved.path} was trained with --sparse-method {saved.method}, not {method}"
        )
    changed = (
        ", ".join(changes(saved.flags, settings_kept(flags, total_steps, c.epochs)))
        or "these flags"
    )
    try:
        _rehearse(c, flags, saved, model, total_steps, beginning)
    except ValueError as error:
        raise ValueError(f"{saved.path} cannot go on with {changed}: {error}") from error
    return saved.violations()


def _rehearse(
    c: Config,
    flags: Any,
    saved: Saved,
    model: nn.Module,
    total_steps: int,
    beginning: Beginning | None,
) -> None:
    """Load the state of the method into a network that is thrown away.

    Raises:
        ValueError: The state does not fit, or the run cannot reach its sparsity any more.
    """
    scratch = copy.deepcopy(model).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in scratch.parameters():
            parameter.zero_()
    optimizer = build.stand_in_optimizer(c, scratch)
    sparsifier = create_sparsifier(
        scratch, optimizer, total_steps, 0, flags=flags, epochs=c.epochs, beginning=beginning
    )
    assert sparsifier is not None
    sparsifier.load_state_dict(saved.entry)
    left = {name: int(mask.sum()) for name, mask in saved.masks.items()}
    if left:
        sparsifier.method.check_left(left)
