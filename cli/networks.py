"""Trained networks: read from a checkpoint or a compact file, written as either or as ONNX."""

import contextlib
import dataclasses
import io
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparse
from cli import qdq
from image_classification import checkpoint
from image_classification.config import Config
from image_classification.data.stage import MEAN, STD
from image_classification.models import count_classes, create_model, default_image_size, names
from sparse import runtime
from sparse.geometry import trace_layers
from sparse.methods.beginning import sparse_only
from sparse.native.library import cpu_level
from sparse.runtime.exported import default_precision
from sparse.runtime.integers import IntegerNetwork
from sparse.training import checkpoints

MODEL_OPTIONS = ("stem", "width")
"""Flags of main.py that change the architecture."""


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
    block: Sequence[int] | None = None
    """Outputs and inputs of the blocks with which the masks were trained."""
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    """Images were normalized per channel by (x - mean) / std, with x in [0, 1]."""
    integers: IntegerNetwork | None = None
    """What a quantized file computes; its weights as floats are the state."""

    def model(self) -> nn.Module:
        """Return the network in evaluation mode.

        Raises:
            ValueError: The architecture is unknown, or another than that of the weights.
        """
        if self.arch not in names():
            raise ValueError(
                f"main.py has no architecture {self.arch!r} to put these weights into: write "
                "the network anew with sparse.runtime.save, or take the weights with "
                "sparse.runtime.read"
            )
        try:
            # Whoever wrote the file chose the options: no memory before the weights fit them.
            with torch.device("meta"):
                model = create_model(self.arch, **self.options)
            model.load_state_dict(dict(self.state), assign=True)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{self.arch} does not have these weights (if --compact-channels has written them, "
                f"convert the checkpoint instead): {reason}"
            ) from error
        return model.eval()

    def config(self) -> dict[str, Any]:
        """Return the flags of main.py: those of the network, and defaults for the others."""
        size, kind = self.image_size, self.interpolation
        known = {"arch": self.arch, **self.options, "image_size": size, "interpolation": kind}
        block = {} if self.block is None else {"block": list(self.block)}
        return {**vars(Config()), **known, **block}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Smaller(Trained):
    """A network without the channels that it does not need: other widths than its architecture."""

    network: nn.Module

    def model(self) -> nn.Module:
        """Return the network in evaluation mode."""
        return self.network


def compact_channels(trained: Trained) -> tuple[Smaller, str]:
    """Remove the channels that a network does not need; return it, and what went in words.

    Raises:
        ValueError: The network cannot be traced.
    """
    model, size = trained.model(), trained.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    network = runtime.compact_channels(model, images)
    state = network.state_dict()
    masks = {name: state[name] != 0 for name in trained.masks if name in state}
    given = {**vars(trained), "state": state, "masks": masks}
    before, after = (trace_layers(m, size) for m in (model, network))
    channels, left = (sum(layer.shape[0] for layer in layers) for layers in (before, after))
    macs, still = (sum(layer.macs for layer in layers) for layers in (before, after))
    told = (
        f"removed {channels - left} of {channels} channels and {(macs - still) / 1e6:.1f} of "
        f"{macs / 1e6:.1f} million multiply-adds"
    )
    return Smaller(**given, network=network), told


def read(path: Path, *, ema: bool = False) -> Trained:
    """Return the network of a checkpoint or of a compact file, told apart by their first bytes.

    Args:
        path: The file.
        ema: Take the moving average of the weights.

    Raises:
        ValueError: One line naming the file and what is wrong with it.
    """
    if not is_compact(path):
        return read_checkpoint(path, ema=ema)
    if ema:
        raise ValueError(f"--ema needs a checkpoint; {path} is none and holds one set of weights")
    compact = runtime.read(path)
    header = compact.header
    return Trained(
        arch=header.arch,
        options=header.model,
        image_size=header.image_size,
        interpolation=header.interpolation,
        state=compact.state_dict(),
        masks=compact.masks(),
        block=next(iter(header.blocks.values()), None),
        mean=header.mean,
        std=header.std,
        integers=compact.integers() if header.activations else None,
    )


def is_compact(path: Path) -> bool:
    """Tell a compact file from a checkpoint, by the first bytes.

    Raises:
        ValueError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(2) != b"PK"
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def read_checkpoint(path: Path, *, arch: str | None = None, ema: bool = False) -> Trained:
    """Return the network of a checkpoint of main.py.

    Args:
        path: The file.
        arch: Name that the checkpoint must carry; None accepts any.
        ema: Take the moving average of the weights.

    Raises:
        ValueError: One line naming the file and what is missing or does not fit.
    """
    saved = checkpoint.load(path)
    held = checkpoint.entry(saved, "arch", path)
    if arch not in (None, held):
        raise ValueError(f"{path} holds {held}, --arch is {arch}; leave --arch out")
    # a converted checkpoint carries no flags: those of main.py's defaults fit, or loading fails
    config = {**vars(Config()), **saved.get("config", {})}
    options = {name: config[name] for name in MODEL_OPTIONS}
    try:
        options["num_classes"] = count_classes(held, checkpoint.entry(saved, "state_dict", path))
    except ValueError as error:
        raise ValueError(f"{path}: entry 'state_dict' does not fit: {error}") from error
    with torch.device("meta"):
        model = create_model(held, **options)
    checkpoint.check({"state_dict": model}, saved, path)
    state = _averaged(saved, path) if ema else saved["state_dict"]
    masks = checkpoints.read_masks(saved.get("sparse"))
    return Trained(
        arch=held,
        options=options,
        image_size=config["image_size"] or default_image_size(held),
        interpolation=config["interpolation"],
        state=state,
        masks=masks or {name: state[name] != 0 for name in sparse.prunable(model)},
        block=config.get("block"),
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
        nodes=runtime.trace(trained.model(), image_size=trained.image_size),
        **_described(trained),
        dtype=dtype,
        fold=fold,
    )


def write_quantized(
    trained: Trained, output: Path, batches: Iterable[Tensor], *, method: str
) -> None:
    """Write a compact file that is computed in int8.

    Args:
        trained: The network.
        output: Replaced if it exists.
        batches: Images (N, 3, S, S), as validation sees them.
        method: One of `runtime.METHODS`.

    Raises:
        ValueError: The network cannot be quantized, or an image cannot be read.
    """
    traced = runtime.trace(trained.model(), image_size=trained.image_size)
    nodes, activations = runtime.calibrate(traced, trained.state, batches, method=method)
    runtime.save(
        output,
        trained.state,
        trained.masks,
        nodes=nodes,
        activations=activations,
        **_described(trained),
        dtype="int8",
        fold=True,
    )


def _described(trained: Trained) -> dict[str, Any]:
    """Return what a compact file says about a network besides its weights and its graph."""
    return {
        "arch": trained.arch,
        "model": trained.options,
        "image_size": trained.image_size,
        "mean": trained.mean,
        "std": trained.std,
        "interpolation": trained.interpolation,
        "block": trained.block,
    }


def write_plan(
    source: Path | Trained,
    output: Path,
    *,
    level: str | None,
    image_size: int | None,
    threads: int,
    tune: bool,
) -> str:
    """Write a plan for programs without Python, of a compact file as it is or of a network.

    Returns:
        How the plan was made, in words.

    Raises:
        ValueError: The runtime does not know the network, an option is out of range, or the plan
            cannot be tuned.
    """
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(source, Trained):
            compact = Path(folder) / "network"
            write_compact(source, compact, dtype="float32", fold=True)
        else:
            compact = source
        level = level or cpu_level()
        try:
            tuned = runtime.save_plan(
                compact, output, level=level, image_size=image_size, threads=threads, tune=tune
            )
        except runtime.BuildError as error:
            raise ValueError(f"the plan cannot be tuned (--no-tune): {error}") from error
    return f", level {level}, {'tuned on this machine' if tuned else 'not tuned'}"


def write_back(trained: Trained, output: Path) -> None:
    """Write a checkpoint of a network, with its masks and the block of its masks.

    Raises:
        ValueError: main.py does not have the network, or normalizes its images in another way.
    """
    trained.model()
    if (trained.mean, trained.std) != (MEAN, STD):
        raise ValueError(
            f"its images are normalized with mean {trained.mean} and std {trained.std}, those of "
            f"main.py with {MEAN} and {STD}: take the weights with sparse.runtime.read"
        )
    masks, _ = sparse_only(trained.masks)
    write_checkpoint(output, trained.arch, trained.state, config=trained.config(), masks=masks)


def write_checkpoint(
    output: Path,
    arch: str,
    state_dict: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any],
    masks: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint without a run: weights, flags of main.py and masks, as far as known."""
    state: dict[str, Any] = {"epoch": 0, "arch": arch, "state_dict": dict(state_dict)}
    if masks:
        state["sparse"] = checkpoints.masks_alone(masks)
    if config:
        state["config"] = dict(config)
    checkpoint.write(output, state)


def write_program(trained: Trained, output: Path) -> None:
    """Write a network for `torch.export.load`, for batches of any size."""
    size = trained.image_size
    with default_precision():
        program = torch.export.export(
            trained.model(),
            (torch.zeros(2, 3, size, size),),
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        )
    file = io.BytesIO()
    torch.export.save(program, file)
    output.write_bytes(file.getvalue())


def write_onnx(trained: Trained, output: Path) -> None:
    """Write the dense graph, zeros included, for batches of any size; input `images`.

    A quantized network is written with the integers of its file, as QDQ.

    Raises:
        ValueError: The packages that it needs are not installed.
    """
    size = trained.image_size
    try:
        if trained.integers is not None:
            model = qdq.to_onnx(trained.integers, in_channels=len(trained.mean), image_size=size)
            output.write_bytes(model.SerializeToString())
            return
        with warnings.catch_warnings(), default_precision():
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


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell in one line that `path` cannot be written.

    Raises:
        ValueError: In place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error
