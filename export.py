"""Convert networks: `python export.py SOURCE OUTPUT`.

Writes a trained network as a compact sparse file (a bit per weight and the active values), which
`sparse.runtime.load` runs; or a compact file back as a checkpoint, or either as a dense ONNX graph.
"""

from image_classification import versions

if __name__ == "__main__":
    versions.require()

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cli import networks
from cli.program import Program
from image_classification.flags import argument, flag
from sparse import runtime


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Convert a trained network."""

    source: Path = argument("checkpoint of main.py, or a compact file")
    output: Path = argument("file to write; replaced if it exists")
    to: Literal["compact", "torch", "onnx"] = flag(
        "compact", "compact sparse file, checkpoint of main.py, or dense ONNX graph"
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
    ema: bool = flag(False, "take the moving average of the weights")


def run(given: Flags) -> str:
    """Convert what the command line names; return a line that says what was written.

    Raises:
        ValueError: A user's mistake, in one line.
    """
    if given.to != "compact" and (given.dtype != "float32" or given.keep_batch_norm):
        raise ValueError(
            f"--dtype and --keep-batch-norm have no effect with --to {given.to}: leave them out"
        )
    trained = networks.read(given.source, ema=given.ema)
    fold = not given.keep_batch_norm
    with networks.writing(given.output):
        if given.to == "compact":
            networks.write_compact(trained, given.output, dtype=given.dtype, fold=fold)
        elif given.to == "torch":
            networks.write_checkpoint(
                given.output, trained.arch, trained.state, config=trained.config()
            )
        else:
            networks.write_onnx(trained, given.output)
    active = sum(int(mask.sum()) for mask in trained.masks.values())
    total = sum(mask.numel() for mask in trained.masks.values())
    share = f", {active} of {total} masked weights active" if total else ""
    return f"{given.output}: {trained.arch}, {given.output.stat().st_size / 1e6:.3f} MB{share}"


PROGRAM = Program("export.py", Flags, run)
main = PROGRAM.main


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
