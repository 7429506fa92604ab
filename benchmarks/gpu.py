"""What one GPU makes of it: `python benchmarks/gpu.py [--quick] [--json] [--markdown]`.

ResNet-50 in channels_last with the fused SGD: ordinary steps of dense and sparse training in turn,
topology updates, host synchronizations, device operations, and the images per second of main.py.
Times are medians. bash scripts/gpu_check.sh runs the tests for GPUs before it. Without a GPU there
is one line and exit status 2.
"""

import argparse
import collections
import contextlib
import importlib.metadata
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout

import sparse
from benchmarks.operations import SETTINGS, count
from cli.report import read_raport
from image_classification.data import DataConfig, create_train_loader, has_dali

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATIONS = {"erk_0.8": ("erk", 0.8), "uniform_0.9": ("uniform", 0.9)}
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}
# Without gap, whose partitions are the stages of a ResNet.
METHODS = {name: settings for name, settings in SETTINGS.items() if settings and name != "gap"}


@dataclass(frozen=True)
class Size:
    """How large a measurement is; tests take small ones, for which a CPU will do."""

    arch: str = "resnet50"
    image_size: int = 224
    batch_size: int = 256
    rounds: int = 12
    batches: int = 60
    """Batches per epoch of main.py and of loaders."""
    workers: int = 16


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit status: 0, or 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no main.py on photos")
    parser.add_argument("--compile", action="store_true", help="main.py with --compile, too")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--markdown", action="store_true", help="print the table of the documents")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu.py: error: torch finds no GPU on this machine", file=sys.stderr)
        return 2
    size = Size(rounds=4, batches=16) if arguments.quick else Size()
    photos, compiled = not arguments.quick, arguments.compile
    report = measure(torch.device("cuda"), size, photos=photos, compiled=compiled)
    if arguments.markdown:
        print(markdown(report))
    if arguments.json:
        print(json.dumps(report))
    return 0


def measure(
    device: torch.device, size: Size, *, photos: bool, compiled: bool = False
) -> dict[str, Any]:
    """Measure everything; prints a line per figure as it comes."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cudnn.benchmark = True
    report: dict[str, Any] = {"conditions": conditions(device, size)}
    tell("conditions", report["conditions"])
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "steps": lambda: {name: step_times(device, size, name) for name in PRECISIONS},
        "updates": lambda: {name: update_times(device, size, name) for name in METHODS},
        "host_syncs": lambda: {name: host_syncs(device, size, name) for name in PRECISIONS},
        "operations": lambda: {name: count(name, size.arch) for name in METHODS},
        "images_per_second": lambda: throughput(device, size, photos=photos, compiled=compiled),
    }
    for name, section in sections.items():
        report[name] = section()
        tell(name, report[name])
    return report


def tell(name: str, figures: object) -> None:
    """Print figures on one line, rounded."""
    print(f"{name:18} {json.dumps(figures)}", flush=True)


def conditions(device: torch.device, size: Size) -> dict[str, str]:
    """Return what the figures depend on."""
    versions = {}
    for package in ("torch", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "card": card,
        "python": sys.version.split()[0],
        "cuda": str(torch.version.cuda),
        "network": f"{size.arch}, {size.image_size} x {size.image_size}, batch {size.batch_size}",
        **versions,
    }


def step_times(device: torch.device, size: Size, precision: str) -> dict[str, float]:
    """Time ordinary steps of dense and sparse training in turn, without a topology update."""
    size_of_batch = max(1, size.batch_size // (2 if precision == "tf32" else 1))
    batch = make_batch(device, size, size_of_batch)
    never = {"delta_t": 10**9, "t_end": 10**9 + 1}
    steps = {"dense": Trainer(device, size, precision).step}
    for name, (distribution, sparsity) in CONFIGURATIONS.items():
        trainer = Trainer(device, size, precision)
        trainer.sparsify("rigl", sparsity=sparsity, distribution=distribution, **never)
        steps[name] = trainer.step
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(size.rounds + 3):
        for name in steps if number % 2 else reversed(steps):
            milliseconds = timed(device, lambda step=steps[name]: step(batch))
            if number >= 3:  # the first ones choose algorithms, and RigL updates at step 0
                times[name].append(milliseconds)
    dense = statistics.median(times["dense"])
    ratios = {
        name: statistics.median(b / a for a, b in zip(times["dense"], times[name], strict=True))
        for name in CONFIGURATIONS
    }
    speed = 1e3 * size_of_batch / dense
    return rounded({"dense_ms": dense, "dense_images_per_second": speed, **ratios}, 4)


def update_times(device: torch.device, size: Size, method: str) -> dict[str, float]:
    """Time topology updates and maskings at ERK 0.8, and measure the memory an update takes."""
    trainer = Trainer(device, size, "tf32")
    settings = METHODS[method]
    sparsifier = trainer.sparsify(method, sparsity=0.8, hooks=False, **settings)
    weights = sum(weight.numel() for weight in sparsifier.maskable.values())
    times: dict[bool, list[float]] = {True: [], False: []}
    extra = 0
    for number in range(2 * (size.rounds + 2)):
        for parameter in trainer.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        updates = sparsifier.is_update_step
        before = start_peak(device)
        milliseconds = timed(device, sparsifier.before_step)
        trainer.optimizer.step()
        milliseconds += timed(device, sparsifier.after_step)
        if number >= 4:
            times[updates].append(milliseconds)
            extra = max(extra, peak(device) - before if updates else 0)
    return rounded(
        {
            "update_ms": statistics.median(times[True]),
            "masking_ms": statistics.median(times[False]),
            "extra_bytes_per_weight": extra / weights,
        },
        3,
    )


def host_syncs(device: torch.device, size: Size, precision: str) -> dict[str, int]:
    """Count how often the host waits for the device: most in ordinary steps, most in updates."""
    batch = make_batch(device, size, max(2, size.batch_size // 16))
    most = {}
    for method, settings in METHODS.items():
        trainer = Trainer(device, size, precision)
        sparsifier = trainer.sparsify(method, sparsity=0.8, **settings)
        counts: dict[bool, int] = {True: 0, False: 0}
        for number in range(8):
            updates = sparsifier.is_update_step
            with counting_syncs(device) as found:
                trainer.step(batch)
            if number >= 2:
                counts[updates] = max(counts[updates], len(found))
        most[f"{method}_update"], most[f"{method}_step"] = counts[True], counts[False]
    return most


@contextlib.contextmanager
def counting_syncs(device: torch.device) -> Iterator[list[warnings.WarningMessage]]:
    """Collect a warning for every time that the host waits for the GPU."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")  # warns, too, once: that it is a prototype
        found.clear()
        try:
            yield found
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            found[:] = [entry for entry in found if "synchroniz" in str(entry.message)]


class Trainer:
    """A network with its optimizer."""

    def __init__(self, device: torch.device, size: Size, precision: str) -> None:
        torch.manual_seed(0)
        model = torchvision.models.get_model(size.arch).to(device)
        self.model: nn.Module = model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True
        )
        self._dtype = PRECISIONS[precision]
        # So low that no step overflows: the step that catches up on a skipped one asks the device.
        self._scaler = torch.amp.GradScaler(
            device.type, init_scale=128.0, enabled=precision == "fp16"
        )

    def sparsify(self, method: str, **settings: Any) -> sparse.Sparsifier:
        """Attach a method."""
        sparsifier: sparse.Sparsifier = getattr(sparse, method)(
            self.model, self.optimizer, **settings
        )
        return sparsifier

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Take a step."""
        low = self._dtype is not torch.float32
        with torch.autocast(batch[0].device.type, dtype=self._dtype if low else None, enabled=low):
            loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self._scaler.scale(loss).backward()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


def make_batch(device: torch.device, size: Size, count: int) -> tuple[Tensor, Tensor]:
    """Make random images and labels on the device."""
    images = torch.randn(count, 3, size.image_size, size.image_size, device=device)
    labels = torch.randint(0, 1000, (count,), device=device)
    return images.to(memory_format=torch.channels_last), labels


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Measure a call until the device is done, in milliseconds."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_peak(device: torch.device) -> int:
    """Begin to measure the most memory in use; return the bytes in use now."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak(device: torch.device) -> int:
    """Return the most bytes in use since `start_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def throughput(
    device: torch.device, size: Size, *, photos: bool, compiled: bool
) -> dict[str, float]:
    """Let main.py train in its fast settings; return the images per second of its last epoch.

    With photos, those of every loader alone come before, and those of DALI's two ways to decode.
    """
    found = {}
    rigl = "--sparse-method rigl --sparsity 0.9 --delta-t 10".split()
    runs = {"synthetic_dense": [], "synthetic_rigl": rigl}
    if compiled:
        runs["synthetic_rigl_compiled"] = [*rigl, "--compile"]
    with tempfile.TemporaryDirectory() as directory:
        for name, flags in runs.items():
            source = ["--data-backend", "synthetic", "--synthetic-batches", str(size.batches)]
            found[name] = run_main(device, size, Path(directory) / name, *source, *flags)
        if photos:
            folder = Path(directory) / "photos"
            write_photos(folder, size.batch_size * size.batches)
            backends = ["pytorch", *(["dali-cpu"] if has_dali() else [])]
            backends += ["dali-gpu"] if has_dali() and device.type == "cuda" else []
            for backend in backends:
                found[f"{backend} alone"] = loader_speed(device, size, folder, backend)
            for whole in (False, True) if has_dali() else ():
                name = f"DALI decodes {'whole images' if whole else 'crops'}"
                found[name] = decoder_speed(device, size, folder, whole=whole)
            source = [str(folder), "--data-backend", backends[-1], "--workers", str(size.workers)]
            found[backends[-1]] = run_main(device, size, Path(directory) / "run", *source)
    return rounded(found, 0)


def loader_speed(device: torch.device, size: Size, folder: Path, backend: str) -> float:
    """Measure the training images per second of a loader alone, when it has run for a while."""
    loader = create_train_loader(
        DataConfig(
            path=folder,
            backend=backend,
            image_size=size.image_size,
            batch_size=size.batch_size,
            workers=size.workers,
            num_classes=2,
            device=device,
            memory_format=torch.channels_last,
        )
    )
    collections.deque(loader.epoch(0), maxlen=0)
    batches = loader.epoch(1)
    skipped = size.batches // 6
    collections.deque(itertools.islice(batches, skipped), maxlen=0)
    milliseconds = timed(device, lambda: collections.deque(batches, maxlen=0))
    loader.close()
    return 1e3 * (size.batches - skipped) * size.batch_size / milliseconds


def decoder_speed(device: torch.device, size: Size, folder: Path, *, whole: bool) -> float:
    """Measure the images per second of a DALI pipeline that cuts 250 x 250 pixels out of photos.

    Hardware that decodes JPEG, as an H100 has it, takes whole images only.
    """
    from nvidia.dali import fn, pipeline_def, types

    place = "mixed" if device.type == "cuda" else "cpu"
    window = {"start": [60, 60], "shape": [250, 250], "axes": [0, 1]}

    def graph() -> Any:
        encoded, _ = fn.readers.file(file_root=str(folder / "train"), random_shuffle=True, seed=1)
        if whole:
            images = fn.decoders.image(encoded, device=place, output_type=types.RGB)
            images = fn.slice(images, **window)
        else:
            images = fn.decoders.image_slice(encoded, device=place, output_type=types.RGB, **window)
        return fn.resize(images, size=[size.image_size, size.image_size])

    pipeline = pipeline_def(graph)(
        batch_size=size.batch_size,
        num_threads=size.workers,
        device_id=torch.cuda.current_device() if device.type == "cuda" else None,
        exec_dynamic=True,
    )
    pipeline.build()
    run_batches(pipeline, size.batches // 6)
    milliseconds = timed(device, lambda: run_batches(pipeline, size.batches))
    return 1e3 * size.batches * size.batch_size / milliseconds


def run_batches(pipeline: Any, count: int) -> None:
    """Take batches from a DALI pipeline."""
    for _ in range(count):
        pipeline.run()


def run_main(device: torch.device, size: Size, workspace: Path, *flags: str) -> float:
    """Run main.py for three epochs of training and return the speed of the last one."""
    workspace.mkdir()
    command = [sys.executable, str(ROOT / "main.py"), *flags, "--arch", size.arch]
    command += ["--batch-size", str(size.batch_size)]
    command += ["--image-size", str(size.image_size), "--epochs", "3", "--training-only"]
    command += ["--memory-format", "nhwc", "--no-checkpoints", "--workspace", str(workspace)]
    if device.type == "cuda":
        command += ["--amp", "--dynamic-loss-scale", "--tf32"]
    else:
        command += ["--cpu"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    raport = read_raport(workspace / "experiment_raport.json")
    return raport.values("train.total_ips")[-1]


def write_photos(data: Path, count: int) -> None:
    """Write `count` JPEG files of 500 x 375 pixels that are as smooth and as large as photos.

    At most 512 of them differ, the others are links.
    """
    generator = np.random.default_rng(0)
    files = [data / "train" / str(number % 2) / f"{number}.jpg" for number in range(count)]
    for label in range(2):
        (data / "train" / str(label)).mkdir(parents=True)
    for number, file in enumerate(files):
        if number >= 512:
            file.hardlink_to(files[number % 512])
            continue
        coarse = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC))
        noise = generator.integers(-12, 13, smooth.shape)
        pixels = np.clip(smooth.astype(int) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, quality=90)


def rounded(figures: dict[str, float], digits: int) -> dict[str, float]:
    """Round all figures."""
    return {name: round(value, digits) for name, value in figures.items()}


def markdown(report: dict[str, Any]) -> str:
    """Return the tables of docs/performance.md."""
    lines = [", ".join(f"{name} {value}" for name, value in report["conditions"].items()), ""]
    for title in ("steps", "updates", "operations", "host_syncs"):
        rows = report[title]
        head = list(next(iter(rows.values())))
        lines += [f"| {title} | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
        for name, figures in rows.items():
            lines.append(f"| {name} | {' | '.join(str(figures[key]) for key in head)} |")
        lines.append("")
    lines += ["| main.py | images per second |", "|---|---|"]
    lines += [f"| {name} | {value:.0f} |" for name, value in report["images_per_second"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
