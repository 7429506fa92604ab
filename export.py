"""Convert networks: `python export.py SOURCE OUTPUT`.

Writes a trained network as a compact sparse file (a bit per weight and the active values), which
`sparse.runtime.load` runs; or a compact file back as a checkpoint, or either as a dense ONNX graph.
"""

from image_classification import versions

if __name__ == "__main__":
    versions.require()

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparse
from classify import OneLineParser, load_model
from image_classification import checkpoint
from image_classification.config import Config
from image_classification.data.stage import MEAN, STD
from image_classification.models import count_classes, create_model, default_image_size
from sparse import runtime

MODEL_OPTIONS = ("stem", "width")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A network with what is known of its training."""

    arch: str
    options: Mapping[str, Any]
    """Further arguments of `create_model`."""
    image_size: int
    interpolation: str
    state: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    """True = active; layers without one are dense."""

    def model(self) -> nn.Module:
        """Return the network in evaluation mode.

        Raises:
            ValueError: The architecture is another than that of the weights.
        """
        try:
            # Whoever wrote the file chose the options: no memory before the weights fit them.
            with torch.device("meta"):
                model = create_model(self.arch, **self.options)
            model.load_state_dict(dict(self.state), assign=True)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{self.arch} does not have these weights: {reason}") from error
        return model.eval()


def build_parser() -> OneLineParser:
    """Return the command line."""
    parser = OneLineParser(prog="export.py", description="Convert a trained network.")
    add = parser.add_argument
    add("source", type=Path, help="checkpoint of main.py, or a compact file")
    add("output", type=Path, help="file to write; replaced if it exists")
    add(
        "--to",
        choices=("compact", "torch", "onnx"),
        default="compact",
        help="compact sparse file (default), checkpoint of main.py, or dense ONNX graph",
    )
    add(
        "--dtype",
        choices=tuple(runtime.DTYPES),
        default="float32",
        help="type of the stored weights; int8 has a scale per output channel (compact only)",
    )
    add(
        "--keep-batch-norm",
        action="store_true",
        help="store BatchNorm as trained instead of folded into the weights: 12 bytes more per "
        "channel, and --to torch gives back the trained weights bit for bit (compact only)",
    )
    add("--ema", action="store_true", help="take the moving average of the weights")
    return parser


def read_source(path: Path, *, ema: bool) -> Trained:
    """Return the network of a checkpoint or of a compact file, told apart by their first bytes.

    Raises:
        ValueError: One line naming the file and what is wrong with it.
    """
    try:
        with path.open("rb") as file:
            is_checkpoint = file.read(2) == b"PK"
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if is_checkpoint:
        return _read_checkpoint(path, ema=ema)
    if ema:
        raise ValueError(f"--ema needs a checkpoint; {path} is none and holds one set of weights")
    return _read_compact(path)


def _read_compact(path: Path) -> Trained:
    compact = runtime.read(path)
    header = compact.header
    return Trained(
        arch=header.arch,
        options=header.model,
        image_size=header.image_size,
        interpolation=header.interpolation,
        state=compact.state_dict(),
        masks=compact.masks(),
    )


def _read_checkpoint(path: Path, *, ema: bool) -> Trained:
    model, config = load_model(path, arch=None)
    saved = checkpoint.load(path)
    state = _averaged(saved, path) if ema else saved["state_dict"]
    stored = (saved.get("sparse") or {}).get("masks") or {}
    masks = {n: sparse.unpack(m["bits"], tuple(m["shape"])) for n, m in stored.items()}
    if not masks:
        masks = {name: state[name] != 0 for name in sparse.prunable(model)}
    return Trained(
        arch=config["arch"],
        options={"num_classes": count_classes(config["arch"], state)}
        | {name: config[name] for name in MODEL_OPTIONS},
        image_size=config["image_size"] or default_image_size(config["arch"]),
        interpolation=config["interpolation"],
        state=state,
        masks=masks,
    )


def _averaged(saved: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    if saved.get("ema") is None:
        raise ValueError(f"{path} has no moving average of the weights: leave --ema out")
    prefix = "module."
    return {k.removeprefix(prefix): v for k, v in saved["ema"].items() if k.startswith(prefix)}


def write_compact(trained: Trained, output: Path, *, dtype: str, fold: bool) -> None:
    """Write a compact sparse file.

    Raises:
        ValueError: The network does something that the runtime does not know.
    """
    runtime.save(
        output,
        trained.state,
        trained.masks,
        nodes=runtime.trace(trained.model()),
        arch=trained.arch,
        model=trained.options,
        image_size=trained.image_size,
        mean=MEAN,
        std=STD,
        interpolation=trained.interpolation,
        dtype=dtype,
        fold=fold,
    )


def write_checkpoint(trained: Trained, output: Path) -> None:
    """Write a checkpoint that main.py and classify.py read: weights and architecture only."""
    known = {
        "arch": trained.arch,
        **trained.options,
        "image_size": trained.image_size,
        "interpolation": trained.interpolation,
    }
    state = {
        "epoch": 0,
        "arch": trained.arch,
        "state_dict": dict(trained.state),
        "config": {**vars(Config()), **known},
    }
    checkpoint.write(output, state)


def write_onnx(trained: Trained, output: Path) -> None:
    """Write the dense graph, zeros included, for batches of any size; input `images`.

    Raises:
        ValueError: The packages that torch needs for it are not installed.
    """
    size = trained.image_size
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own dependencies
            program = torch.onnx.export(
                trained.model(),
                (torch.zeros(2, 3, size, size),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                input_names=["images"],
                output_names=["logits"],
                verbose=False,
            )
    except ImportError as error:
        raise ValueError(
            f"--to onnx needs a package that is missing ({error.name}): pip install onnx onnxscript"
        ) from error
    assert program is not None
    program.save(output)


def run(args: argparse.Namespace) -> str:
    """Convert what the command line names; return a line that says what was written.

    Raises:
        ValueError: A user's mistake, in one line.
    """
    if args.to != "compact" and (args.dtype != "float32" or args.keep_batch_norm):
        raise ValueError(
            f"--dtype and --keep-batch-norm have no effect with --to {args.to}: leave them out"
        )
    trained = read_source(args.source, ema=args.ema)
    try:
        if args.to == "compact":
            write_compact(trained, args.output, dtype=args.dtype, fold=not args.keep_batch_norm)
        elif args.to == "torch":
            write_checkpoint(trained, args.output)
        else:
            write_onnx(trained, args.output)
    except OSError as error:
        raise ValueError(f"{args.output} cannot be written: {error.strerror or error}") from error
    active = sum(int(mask.sum()) for mask in trained.masks.values())
    total = sum(mask.numel() for mask in trained.masks.values())
    share = f", {active} of {total} masked weights active" if total else ""
    return f"{args.output}: {trained.arch}, {args.output.stat().st_size / 1e6:.3f} MB{share}"


def main(argv: Sequence[str]) -> int:
    """Run the command line; return its exit status: 0, or 2 for a user's mistake."""
    try:
        print(run(build_parser().parse_args(argv)))
    except ValueError as error:
        print(f"export.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
