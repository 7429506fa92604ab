"""Measure sparse inference against dense runtimes: `python benchmarks/inference.py --json`.

Every rival runs the dense network of the same architecture, interleaved with the sparse network,
so that a change of the machine's load hits both; a ratio is the median over pairs, above 1 where
the sparse network is faster. With one thread, processor time is compared; with more, wall time.
The sparse network computes in float32, or with `--precision int8` in int8. The rivals compute in
float32 unless their name says bf16 or int8.
Masks are random with exact counts per layer, or those of a trained network. All figures of
docs/performance.md, with its picture:

    python benchmarks/inference.py --rivals onnxruntime openvino --batch 1 16 --threads 1 2 --json \
        --memory --plot docs/pictures/inference.png
    python benchmarks/inference.py --rivals onnxruntime onnxruntime-int8 openvino-bf16 openvino-int8
    python benchmarks/inference.py --precision int8 --rivals onnxruntime-int8 openvino-int8 \
        --threads 1 2 --networks resnet50/erk/0.8/1x4 resnet50/erk/0.9/1x4 resnet50/erk/0.95/1x4 \
        resnet50/uniform/0.9/1x4 resnet50/erk/0.9
"""

import argparse
import json
import logging
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sparse
from cli.networks import read as read_trained
from image_classification.models import create_model, default_image_size
from sparse import runtime
from sparse.native.library import LEVELS
from sparse.topology.blocks import blocks_of, check_block

Run = Callable[[Tensor], Any]
RIVALS = (
    "onnxruntime",
    "onnxruntime-int8",
    "openvino",
    "openvino-bf16",
    "openvino-int8",
    "compile",
    "torch",
)
CONFIGURATIONS = (
    "resnet50/erk/0.8",
    "resnet50/erk/0.9",
    "resnet50/erk/0.95",
    "resnet50/erk/0.99",
    "resnet50/uniform/0.9",
    "mobilenet_v1/uniform/0.9",
)
# At 0.99 the published ERK networks keep their first layer dense.
DENSE_FIRST = 0.99
WARM_UP = 0.03


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """List the weights to mask: the input projections of nn.MultiheadAttention, too."""
    projections = [n for n, _ in model.named_parameters() if n.endswith("in_proj_weight")]
    return sparse.prunable(model, include=projections)


def build(
    arch: str, distribution: str, sparsity: float, block: Sequence[int] = (1, 1)
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a network with random masks and BatchNorm statistics of random images."""
    torch.manual_seed(0)
    model = create_model(arch)
    weights = prunable(model)
    dense = None
    if distribution == "erk" and sparsity >= DENSE_FIRST:
        dense = [next(iter(weights))]
    counts = sparse.allocate(
        {name: tuple(w.shape) for name, w in weights.items()},
        sparsity=sparsity,
        distribution=distribution,
        dense_layers=dense,
        block=block,
    )
    blocks = blocks_of({name: tuple(w.shape) for name, w in weights.items()}, check_block(block))
    drawn = {}
    for name, weight in weights.items():
        shape = blocks.shape(name, weight.shape)
        order = torch.randperm(math.prod(shape))
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[order[: counts[name] // blocks.numel(name)]] = True
        drawn[name] = mask.view(shape)
    masks = blocks.spread(drawn, weights)
    for name, weight in weights.items():
        weight.data.masked_fill_(~masks[name], 0.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    size = default_image_size(arch)
    with torch.no_grad():
        model.train()(torch.randn(4, 3, size, size))
    return model.eval(), masks


def save(
    model: nn.Module, masks: Mapping[str, Tensor], arch: str, path: Path, *, precision: str
) -> None:
    """Write the compact file of a network; one of int8 is calibrated with random images."""
    size = default_image_size(arch)
    nodes, state = runtime.trace(model, image_size=size), model.state_dict()
    options: dict[str, Any] = {}
    if precision == "int8":
        images = torch.randn(4, 3, size, size)
        nodes, activations = runtime.calibrate(nodes, state, [images], method="minmax")
        options = {"dtype": "int8", "fold": True, "activations": activations}
    runtime.save(
        path,
        state,
        masks,
        nodes=nodes,
        arch=arch,
        model={},
        image_size=size,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        **options,
    )


def rival(name: str, model: nn.Module, images: Tensor, threads: int, directory: Path) -> Run:
    """Return a function that runs a dense network with another runtime.

    Args:
        name: One of RIVALS.
        model: The dense network.
        images: A batch of the shape to be measured.
        threads: Threads of the runtime.
        directory: Where graphs are written; one of the same batch size is used again.
    """
    if name == "torch":
        return model
    if name == "compile":
        return torch.compile(model, options={"freezing": True})
    program, _, precision = name.partition("-")
    graph = float_graph(model, images, directory)
    if precision == "int8":
        graph = int8_graph(graph, images)
    if program == "onnxruntime":
        return run_onnxruntime(graph, threads)
    return run_openvino(graph, threads, "bf16" if precision == "bf16" else "f32")


def float_graph(model: nn.Module, images: Tensor, directory: Path) -> Path:
    """Return the ONNX graph of a network in float32, for batches of the size of `images`."""
    graph = directory / f"dense-{len(images)}.onnx"
    if not graph.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (images,), graph, dynamo=True, verbose=False)
    return graph


def int8_graph(graph: Path, images: Tensor) -> Path:
    """Return the quantized ONNX graph: int8 weights per channel, uint8 activations, calibrated.

    Ranges come from two random batches: they decide about accuracy, not about speed.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quantized = graph.with_suffix(".int8.onnx")
    if quantized.exists():
        return quantized

    dense = onnx.load(graph)
    key = dense.graph.input[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        batches = iter([{key: torch.randn_like(images).numpy()} for _ in range(2)])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    prepared = graph.with_suffix(".prepared.onnx")
    onnx.save(dense, prepared)  # one file, with the weights
    quant_pre_process(prepared, prepared, skip_symbolic_shape=True)
    logging.disable(logging.WARNING)  # one for each LayerNorm: its scale has no channels
    quantize_static(
        prepared,
        quantized,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,  # x86 multiplies bytes without a sign by signed ones
        weight_type=QuantType.QInt8,
    )
    logging.disable(logging.NOTSET)
    return quantized


def run_onnxruntime(graph: Path, threads: int) -> Run:
    """Return a function that runs a graph with ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(graph, options)
    key = session.get_inputs()[0].name
    return lambda x: session.run(None, {key: x.numpy()})


def run_openvino(graph: Path, threads: int, precision: str) -> Run:
    """Return a function that runs a graph with OpenVINO; bf16 is slower where it is emulated."""
    import openvino

    compiled = openvino.Core().compile_model(
        graph,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            # by default OpenVINO computes in bfloat16 where the processor can
            "INFERENCE_PRECISION_HINT": precision,
        },
    )
    return lambda x: compiled(x.numpy())


def interleave(
    runs: Mapping[str, Run], images: Tensor, *, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return the milliseconds of each run, measured in turn `rounds` times.

    Threads of a runtime that still look for work when it is done, as those of ONNX Runtime do, are
    waited for: they would take the processor of the next one. A processor that slept needs some
    milliseconds to reach its speed, and each runtime evicts the other's data: whatever runs works
    for WARM_UP seconds before it is measured, as in a stream of images.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, run in runs.items():
                time.sleep(0.05)
                warm = time.perf_counter() + WARM_UP
                while time.perf_counter() < warm:
                    run(images)
                start = clock()
                run(images)
                times[name].append(1e3 * (clock() - start))
    return times


def compare(
    network: runtime.Network,
    dense: nn.Module,
    *,
    rivals: Sequence[str],
    batch: int,
    threads: int,
    rounds: int,
    directory: Path,
) -> dict[str, Any]:
    """Return medians in milliseconds and, per rival, the median ratio over pairs."""
    torch.set_num_threads(threads)
    size = network.header.image_size
    images = torch.randn(batch, 3, size, size)
    runs: dict[str, Run] = {"sparse": network}
    for name in rivals:
        runs[name] = rival(name, dense, images, threads, directory)
    clock = time.process_time if threads == 1 else time.perf_counter
    times = interleave(runs, images, rounds=rounds, clock=clock)
    return {
        "clock": "processor" if threads == 1 else "wall",
        "milliseconds": {name: round(statistics.median(t), 3) for name, t in times.items()},
        "ratio": {name: median_ratio(times[name], times["sparse"]) for name in rivals},
    }


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Return the median over pairs."""
    return round(statistics.median(np.divide(times, others).tolist()), 3)


def compare_threads(own: Mapping[int, runtime.Network], rounds: int) -> dict[str, Any]:
    """Return what more threads gain for one image: wall time, against the least number."""
    size = next(iter(own.values())).header.image_size
    images = torch.randn(1, 3, size, size)
    runs: dict[str, Run] = {str(threads): network for threads, network in own.items()}
    times = interleave(runs, images, rounds=rounds, clock=time.perf_counter)
    one = times[str(min(own))]
    return {name: median_ratio(one, found) for name, found in times.items()}


def profile(network: runtime.Network, rounds: int) -> list[dict[str, Any]]:
    """Return, per operation of the plan, the median processor milliseconds and useful GFLOP/s."""
    size = network.header.image_size
    program = network.program(size, size)
    image = torch.randn(3, size, size)
    times = np.median([program.profile(image) for _ in range(rounds)], 0)
    rows = []
    for operation, seconds in zip(program.plan.operations, times, strict=True):
        row: dict[str, Any] = {"milliseconds": round(1e3 * float(seconds), 3)}
        if operation.layer is not None:
            row["layer"] = operation.layer.name
            flops = 2 * operation.num_connections()
            if flops:
                row["gflops"] = round(1e-9 * flops / float(seconds), 1)
        rows.append(row)
    return rows


def peak_bytes(name: str, path: Path) -> int:
    """Return the memory that loading a network and running an image takes, at its peak.

    Args:
        name: "sparse" or "onnxruntime".
        path: Compact file, or ONNX graph.
    """
    image = torch.randn(1, 3, 224, 224)
    if name == "onnxruntime":
        import onnxruntime

        with Path("/proc/self/clear_refs").open("w") as file:
            file.write("5")
        before = _status("VmRSS")
        session = onnxruntime.InferenceSession(path)
        for _ in range(3):
            session.run(None, {session.get_inputs()[0].name: image.numpy()})
    else:
        with Path("/proc/self/clear_refs").open("w") as file:
            file.write("5")
        before = _status("VmRSS")
        network = runtime.load(path)
        for _ in range(3):
            network(image)
    return _status("VmHWM") - before


def _status(entry: str) -> int:
    found = re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def compare_memory(path: Path, graph: Path) -> dict[str, float]:
    """Return the peak of each runtime in 10^6 bytes, each in a process of its own."""
    peaks = {}
    for name, file in (("sparse", path), ("onnxruntime", graph)):
        # The first run compiles and tunes; the second is what a user has from then on.
        for _ in range(2):
            command = [sys.executable, __file__, "--peak", name, str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[name] = round(1e-6 * int(done.stdout), 1)
    return peaks


def plot(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the latency of ResNet-50 against sparsity, and the dense runtimes as lines."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    dense: dict[str, list[float]] = {}
    for distribution, marker in (("erk", "o"), ("uniform", "s")):
        points = []
        for key, result in results.items():
            arch, kind, sparsity, *rest = key.split("/")
            if (arch, kind, rest) == ("resnet50", distribution, ["b1", "t1"]):
                points.append((float(sparsity), result["milliseconds"]["sparse"]))
                for name, ms in result["milliseconds"].items():
                    if name != "sparse":
                        dense.setdefault(name, []).append(ms)
        axes.plot(
            *zip(*sorted(points), strict=True), marker=marker, label=f"sparse, {distribution}"
        )
    for (name, ms), style in zip(dense.items(), ("--", ":", "-.", "-"), strict=False):
        axes.axhline(statistics.median(ms), color="gray", linestyle=style, label=f"dense, {name}")
    axes.set(xlabel="sparsity", ylabel="milliseconds per image", ylim=(0, None))
    axes.set_title("ResNet-50, 224 x 224, batch 1, one thread, float32")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="Measure sparse inference on the CPU.")
    add = parser.add_argument
    names = "arch/distribution/sparsity, or with blocks as resnet50/erk/0.9/1x4"
    add("--networks", nargs="*", default=CONFIGURATIONS, help=names)
    add("--precision", choices=["float32", "int8"], default="float32", help="of the sparse network")
    add("--checkpoint", type=Path, help="a trained network instead: checkpoint or compact file")
    add("--plot", type=Path, help="write the picture of latency against sparsity")
    add("--memory", action="store_true", help="compare the peak of memory with onnxruntime's")
    add("--peak", nargs=2, metavar=("RUNTIME", "FILE"), help="only print the bytes one takes")
    add("--rivals", nargs="*", choices=RIVALS, default=["onnxruntime"])
    add("--batch", type=int, nargs="*", default=[1])
    add("--threads", type=int, nargs="*", default=[1])
    add("--rounds", type=int, default=15)
    add("--profile", action="store_true", help="time every layer instead of comparing")
    add("--level", choices=tuple(LEVELS), help="instruction set (the processor's best)")
    add("--cache", type=Path, help="directory of compiled kernels and measurements")
    add("--json", action="store_true", help="end with one JSON object: ratios to the fastest rival")
    return parser


def networks(args: argparse.Namespace) -> list[tuple[str, str, nn.Module, dict[str, Tensor]]]:
    """Return name, architecture, model and masks of what is to be measured."""
    if args.checkpoint is None:
        found = []
        for name in args.networks:
            arch, distribution, sparsity, *block = name.split("/")
            shape = [int(number) for number in (block or ["1x1"])[0].split("x")]
            found.append((name, arch, *build(arch, distribution, float(sparsity), shape)))
        return found
    trained = read_trained(args.checkpoint)
    name = f"{trained.arch}/{args.checkpoint.name}"
    return [(name, trained.arch, trained.model(), dict(trained.masks))]


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    if args.peak:
        print(peak_bytes(args.peak[0], Path(args.peak[1])))
        return
    results: dict[str, Any] = {}
    for name, arch, model, masks in networks(args):
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "network.safetensors"
            save(model, masks, arch, path, precision=args.precision)
            dense = create_model(arch).eval() if args.checkpoint is None else model
            own = {
                threads: runtime.load(
                    path, threads=threads, backend="native", level=args.level, cache=args.cache
                )
                for threads in args.threads
            }
            for threads, network in own.items():
                if args.profile:
                    for row in profile(network, args.rounds):
                        print(json.dumps(row))
                    continue
                for batch in args.batch:
                    key = f"{name}/b{batch}/t{threads}"
                    results[key] = compare(
                        network,
                        dense,
                        rivals=args.rivals,
                        batch=batch,
                        threads=threads,
                        rounds=max(5, args.rounds // batch),
                        directory=Path(directory),
                    )
                    print(key, json.dumps(results[key]), file=sys.stderr, flush=True)
            if len(own) > 1 and not args.profile:
                gains = compare_threads(own, args.rounds)
                print(f"{name}/threads", json.dumps(gains), file=sys.stderr, flush=True)
            if args.memory:
                rival("onnxruntime", dense, torch.zeros(1, 3, 224, 224), 1, Path(directory))
                peaks = compare_memory(path, Path(directory) / "dense-1.onnx")
                print(f"{name}/memory", json.dumps(peaks), file=sys.stderr, flush=True)
    if args.plot is not None:
        plot(results, args.plot)
    if args.json:
        print(json.dumps({key: min(result["ratio"].values()) for key, result in results.items()}))


if __name__ == "__main__":
    main(sys.argv[1:])
