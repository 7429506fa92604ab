"""Convert networks: `python export.py SOURCE OUTPUT`.

Writes a trained network as a compact sparse file (a bit per weight or block and the active values),
which `sparse.runtime.load` runs; or a compact file back as a checkpoint, or either as a dense ONNX
graph or as a plan, which programs run without Python.
`--quantize int8` writes a compact file that is computed in int8.
`--compact-channels` first removes the channels that the network does not need.
"""

from image_classification import versions

if __name__ == "__main__":
    versions.require()

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cli import calibration, networks
from cli.calibration import Calibration
from cli.program import Program
from image_classification.flags import argument, flag, spelling
from sparse import runtime
from sparse.native.library import LEVELS


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Convert a trained network."""

    source: Path = argument("checkpoint of main.py, or a compact file")
    output: Path = argument("file to write; replaced if it exists")
    to: Literal["compact", "torch", "onnx", "plan"] = flag(
        "compact",
        "compact sparse file, checkpoint of main.py, dense ONNX graph (in int8 if the file is), or "
        "plan for programs without Python (docs/embedding.md)",
    )
    dtype: str = flag(
        "float32",
        "type of the stored weights; int8 has a scale per output channel (compact only)",
        choices=tuple(runtime.DTYPES),
    )
    keep_batch_norm: bool = flag(
        False,
        "store BatchNorm as trained instead of folded into the weights: 12 bytes more per channel, "
        "and --to torch gives back the trained weights bit for bit (compact only)",
    )
    quantize: Literal["int8"] | None = flag(
        None, "compute weights and activations in int8, with scales that --calibration gives"
    )
    calibration: Path | None = flag(
        None, "folder of images like those of the training, for --quantize", metavar="DIR"
    )
    num_images: int = flag(256, "images of --calibration that are used")
    calibration_method: str = flag(
        "mse",
        "range of each value: that of least squared error, of 99.99% of the values, or of all",
        choices=runtime.METHODS,
    )
    ema: bool = flag(False, "take the moving average of the weights")
    compact_channels: bool = flag(
        False,
        "remove the channels that are constant or that nobody reads: a smaller network with the "
        "same outputs; --to torch then writes a program for torch.export.load",
    )
    level: str | None = flag(
        None,
        f"instructions of the plan's processor: {', '.join(LEVELS)} (by default this processor's "
        "best; plan only)",
    )
    image_size: int | None = flag(None, "side of the plan's images (that of the training)")
    threads: int = flag(1, "threads for which the plan is made (plan only)")
    no_tune: bool = flag(
        False,
        "decide by a fixed rule how layers are computed: the same network gives the same bytes "
        "(plan only; the plan of another machine's level is never tuned)",
    )


PLAN_FLAGS = ("level", "image_size", "threads", "no_tune")
"""Have an effect with --to plan alone."""

QUANTIZE_FLAGS = ("calibration", "num_images", "calibration_method")
"""Have an effect with --quantize alone."""


def run(given: Flags) -> str:
    """Convert what the command line names; return a line that says what was written.

    Raises:
        ValueError: A user's mistake, in one line.
    """
    if given.to != "compact" and (given.dtype != "float32" or given.keep_batch_norm):
        raise ValueError(
            f"--dtype and --keep-batch-norm have no effect with --to {given.to}: leave them out"
        )
    changed = _changed(given, PLAN_FLAGS)
    if given.to != "plan" and changed:
        raise ValueError(
            f"{', '.join(map(spelling, changed))} only with --to plan: leave out what does not fit"
        )
    chosen = _calibration(given)
    trained = networks.read(given.source, ema=given.ema)
    if trained.integers is not None and (given.to == "compact" or given.compact_channels):
        raise ValueError(f"{given.source} is quantized: export the checkpoint that it is made of")
    removed = ""
    if given.compact_channels:
        trained, removed = networks.compact_channels(trained)
    with networks.writing(given.output):
        told = write(given, trained, chosen)
    active = sum(int(mask.sum()) for mask in trained.masks.values())
    total = sum(mask.numel() for mask in trained.masks.values())
    share = f", {active} of {total} masked weights active" if total else ""
    size = f"{given.output.stat().st_size / 1e6:.3f} MB"
    line = f"{given.output}: {trained.arch}, {size}{share}{told}"
    return f"{line}\n{removed}" if removed else line


def _changed(given: Flags, names: Sequence[str]) -> list[str]:
    return [name for name in names if getattr(given, name) != getattr(Flags, name)]


def _calibration(given: Flags) -> Calibration | None:
    """Return how the network is to be quantized, if it is.

    Raises:
        ValueError: Flags do not go together, or there are too few images.
    """
    if given.quantize is None:
        changed = _changed(given, QUANTIZE_FLAGS)
        if changed:
            raise ValueError(f"{', '.join(map(spelling, changed))} only with --quantize int8")
        return None
    if given.to != "compact" or given.keep_batch_norm or given.dtype != "float32":
        raise ValueError(
            "--quantize int8 writes a compact file with folded BatchNorm and its own dtype: leave "
            "out --to, --keep-batch-norm and --dtype (the file is then a source of --to onnx)"
        )
    if given.calibration is None:
        raise ValueError("--quantize int8 needs images: name a folder with --calibration")
    return calibration.choose(
        given.calibration, num_images=given.num_images, method=given.calibration_method
    )


def write(given: Flags, trained: networks.Trained, chosen: Calibration | None) -> str:
    """Write a network as the command line says; return what there is to add about the file."""
    output, fold = given.output, not given.keep_batch_norm
    if given.to == "plan":
        as_it_is = networks.is_compact(given.source) and not given.compact_channels
        return networks.write_plan(
            given.source if as_it_is else trained,
            output,
            level=given.level,
            image_size=given.image_size,
            threads=given.threads,
            tune=not given.no_tune,
        )
    if chosen is not None:
        size, kind = trained.image_size, trained.interpolation
        batches = chosen.batches(image_size=size, interpolation=kind)
        networks.write_quantized(trained, output, batches, method=chosen.method)
    elif given.to == "compact":
        networks.write_compact(trained, output, dtype=given.dtype, fold=fold)
    elif given.to == "onnx":
        networks.write_onnx(trained, output)
    elif given.compact_channels:
        networks.write_program(trained, output)
    else:
        networks.write_back(trained, output)
    return ""


PROGRAM = Program("export.py", Flags, run)
main = PROGRAM.main


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
