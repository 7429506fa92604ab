"""What sending only active gradients is worth: ResNet-50 on two hosts and a cable of limited rate.

Two network namespaces, joined at 1 and then at 5 Gbit/s, train ResNet-50 (batch 4, 64x64, one
thread each) under DDP and gloo. Steps take turns: without communication, plain, and compressed at
90% and 80% (ERK). From each host's interface counters come the bytes; the time that communication
adds to a step is the median over rounds of its difference to the step without. A small model of
compute, pack and wire time is held against that and asked about other networks. Pack and unpack
are also timed alone, beside other ways to do the same. Needs root (ip netns, tc).

Prints tables; with --json also one JSON object {"bytes_ratio": {"0.9": r, "0.8": r}, "step_ratio":
{"1gbit": r, "5gbit": r}, "pack_ms": t, "exposed_ratio": {...}, "model_error": {...}}. Ratios of
bytes are compressed by plain, ratios of times plain by compressed at 90%.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout

import sparse
from benchmarks import hosts
from sparse.training.compression import compress, decompress

SPARSITIES = {"0.9": 0.9, "0.8": 0.8}
UNITS = {"mbit": 1e6, "gbit": 1e9}
PORT = 29500
BUCKET = 25 * 2**20  # bytes after which DDP closes a bucket; its first one holds 1 MiB


# The model


@dataclass(frozen=True)
class Profile:
    """When gradients are ready in a step without communication, and what is sent of them.

    Attributes:
        step: Seconds of the step.
        ready: Seconds from its start, per parameter, in the order of readiness.
        numel: Entries of each parameter.
        sent: Way of sending -> entries sent of each parameter.
        pack: Way of sending -> seconds of packing and unpacking in a step.
    """

    step: float
    ready: Sequence[float]
    numel: Sequence[int]
    sent: Mapping[str, Sequence[int]]
    pack: Mapping[str, float]

    def exposed(self, way: str, rate: float, *, stretch: float = 1.0) -> float:
        """Predict the seconds that communication adds to a step.

        Buckets queue for the wire when their last gradient is ready; what is still on its way
        when the backward pass ends is waited for. Packing always adds.

        Args:
            way: How gradients are sent.
            rate: Bits per second that gradients get on the wire, all headers paid.
            stretch: Factor on all computation but packing.
        """
        wire_free, held, sent, limit = 0.0, 0, 0, 2**20
        last = len(self.ready) - 1
        for index, ready in enumerate(self.ready):
            held += 4 * self.numel[index]
            sent += 4 * self.sent[way][index]
            if held >= limit or index == last:
                wire_free = max(wire_free, stretch * ready) + 8 * sent / rate
                held, sent, limit = 0, 0, BUCKET
        return max(0.0, wire_free - stretch * self.ready[-1]) + self.pack.get(way, 0.0)


# Pack and unpack without a network


def cpu_ms(work: Callable[[], object]) -> float:
    """Measure the CPU time of a call."""
    start = time.process_time()
    work()
    return 1e3 * (time.process_time() - start)


def network() -> tuple[nn.Module, torch.optim.SGD]:
    """Build ResNet-50 and its optimizer."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50().train()
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


def make_sparse(model: nn.Module, optimizer: torch.optim.SGD, sparsity: float) -> sparse.Sparsifier:
    """Attach RigL, which updates the topology at step 0 and then never."""
    never = {"delta_t": 10**9, "t_end": 10**9 + 1}
    return sparse.rigl(model, optimizer, sparsity=sparsity, distribution="erk", **never)


def buckets(sparsity: float) -> list[Tensor]:
    """List masks of ResNet-50 laid out as DDP's buckets are: bool, flat."""
    model, optimizer = network()
    masks = make_sparse(model, optimizer, sparsity).masks
    parts: list[list[Tensor]] = [[]]
    for name, parameter in reversed(list(model.named_parameters())):
        if 4 * sum(part.numel() for part in parts[-1]) >= (2**20 if len(parts) == 1 else BUCKET):
            parts.append([])
        whole = torch.ones(parameter.numel(), dtype=torch.bool)
        parts[-1].append(masks[name].flatten() if name in masks else whole)
    return [torch.cat(part) for part in parts]


def ways_to_pack(mask: Tensor) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Give several ways to gather the active entries of one bucket and to put them back."""
    buffer = torch.randn(mask.numel())
    positions = mask.nonzero().flatten()
    narrow = positions.int()
    values = torch.empty(positions.numel())
    flat, packed, chosen, where = (t.numpy() for t in (buffer, values, mask, positions))

    def boolean() -> None:
        buffer.zero_()
        buffer[mask] = values

    def fancy() -> None:
        flat.fill(0)
        flat[where] = packed

    return {
        "index_select / index_copy_ (used)": (
            lambda: compress(buffer, positions, values),
            lambda: decompress(values, positions, buffer),
        ),
        "the same, int32 / index_add_": (
            lambda: torch.index_select(buffer, 0, narrow, out=values),
            lambda: buffer.zero_().index_add_(0, narrow, values),
        ),
        "gather / scatter_": (
            lambda: torch.gather(buffer, 0, positions, out=values),
            lambda: buffer.zero_().scatter_(0, positions, values),
        ),
        "masked_select / masked_scatter_": (
            lambda: torch.masked_select(buffer, mask, out=values),
            lambda: buffer.zero_().masked_scatter_(mask, values),
        ),
        "buffer[mask] both ways": (lambda: buffer[mask], boolean),
        "NumPy take / fancy index": (lambda: flat.take(where, out=packed, mode="clip"), fancy),
        "NumPy compress / fancy index": (lambda: flat.compress(chosen, out=packed), fancy),
    }


def measure_packing(rounds: int) -> dict[str, float]:
    """Print the CPU time of packing a whole network; return that of our way by sparsity."""
    ours = {}
    for name, sparsity in SPARSITIES.items():
        network = [ways_to_pack(mask) for mask in buckets(sparsity)]
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in network[0]}
        for _ in range(rounds):
            for way, taken in times.items():
                pairs = [(cpu_ms(there), cpu_ms(back)) for there, back in (b[way] for b in network)]
                taken.append((sum(p for p, _ in pairs), sum(u for _, u in pairs)))
        print(f"\n{name} sparse, CPU time per step    pack ms  unpack ms")
        for way, taken in times.items():
            medians = [statistics.median(part) for part in zip(*taken, strict=True)]
            print(f"{way:36} {medians[0]:8.1f} {medians[1]:10.1f}")
            ours.setdefault(name, sum(medians))  # the first is the one that is used
    return ours


# One of the two hosts


class Training:
    """ResNet-50 that trains under DDP, plainly or compressed."""

    def __init__(self, sparsity: float | None) -> None:
        model, self.optimizer = network()
        self.ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.num_active: dict[str, int] = {}  # of the weights that have a mask
        if sparsity is not None:
            sparsifier = make_sparse(model, self.optimizer, sparsity)
            self.num_active = sparsifier.num_active
            sparse.compress_gradients(self.ddp, sparsifier)

    def step(self, batch: tuple[Tensor, Tensor], *, alone: bool = False) -> None:
        """Take an optimizer step; `alone` leaves the other host out of it."""
        self.optimizer.zero_grad()
        model = self.ddp.module if alone else self.ddp
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        self.optimizer.step()


def readiness(training: Training, batch: tuple[Tensor, Tensor], rounds: int) -> dict[str, float]:
    """Give the second of a step without communication at which each gradient is ready, in order."""
    start = 0.0
    times: dict[str, list[float]] = {}

    def note(name: str) -> Callable[[Tensor], None]:
        return lambda _: times.setdefault(name, []).append(time.perf_counter() - start)

    handles = [
        parameter.register_post_accumulate_grad_hook(note(name))
        for name, parameter in training.ddp.module.named_parameters()
    ]
    for _ in range(rounds):
        start = time.perf_counter()
        training.step(batch, alone=True)
    for handle in handles:
        handle.remove()
    ready = {name: statistics.median(moments) for name, moments in times.items()}
    return dict(sorted(ready.items(), key=lambda item: item[1]))


def work(rank: int, address: str, interface: str, rounds: int) -> dict[str, Any]:
    """Train on one host and return what its clock and counter said."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://{address}:{PORT}", rank=rank, world_size=2
    )
    batch = torch.randn(4, 3, 64, 64), torch.randint(0, 1000, (4,))
    trainings = {"dense": Training(None)}
    trainings |= {name: Training(sparsity) for name, sparsity in SPARSITIES.items()}
    ways: dict[str, Callable[[], None]] = {
        "alone": lambda: trainings["dense"].step(batch, alone=True),
        **{name: (lambda t=t: t.step(batch)) for name, t in trainings.items()},
    }
    for training in trainings.values():
        for _ in range(3):  # a topology update, then DDP's rebuilding of its buckets
            training.step(batch)
    ready = readiness(trainings["dense"], batch, rounds)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    sent: dict[str, list[int]] = {way: [] for way in ways}
    for number in range(rounds):
        order = list(ways)
        shift = number % len(order)
        for way in order[shift:] + order[:shift]:
            distributed.barrier()
            before, start = hosts.sent_bytes(interface), time.perf_counter()
            ways[way]()
            seconds[way].append(time.perf_counter() - start)
            distributed.barrier()
            sent[way].append(hosts.sent_bytes(interface) - before)
    distributed.destroy_process_group()
    numel = {n: p.numel() for n, p in trainings["dense"].ddp.module.named_parameters()}
    return {
        "seconds": seconds,
        "sent": sent,
        "ready": list(ready.values()),
        "numel": [numel[name] for name in ready],
        "entries": {
            way: [training.num_active.get(name, numel[name]) for name in ready]
            for way, training in trainings.items()
        },
    }


# Both together


def bits_per_second(rate: str) -> float:
    """Read a rate as tc writes it."""
    return float(rate[:-4]) * UNITS[rate[-4:]]


def train_on_two_hosts(rate: str, rounds: int) -> list[dict[str, Any]]:
    """Run `work` on two hosts and return both results."""
    with hosts.two_hosts(rate) as pair:
        processes = [
            subprocess.Popen(
                host.command(
                    sys.executable, __file__, "--rounds", str(rounds),
                    "--worker", str(rank), pair[0].address, host.interface,
                ),
                env={**os.environ, "GLOO_SOCKET_IFNAME": host.interface, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank, host in enumerate(pair)
        ]  # fmt: skip
        try:
            outputs = [process.communicate()[0] for process in processes]
        finally:
            for host, process in zip(pair, processes, strict=True):
                host.kill()
                process.wait()
    if any(process.returncode for process in processes):
        raise SystemExit("a host has failed; its message stands above")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def compare(rate: str, rounds: int, pack_ms: Mapping[str, float]) -> tuple[dict[str, Any], Profile]:
    """Train at a rate, print what was measured beside what the model says."""
    results = train_on_two_hosts(rate, rounds)
    first = results[0]
    steps = {  # the slower host makes the step
        way: [max(pair) for pair in zip(*(r["seconds"][way] for r in results), strict=True)]
        for way in first["seconds"]
    }
    sent = {way: statistics.median(counts) for way, counts in first["sent"].items()}
    model = Profile(
        statistics.median(steps["alone"]),
        first["ready"],
        first["numel"],
        first["entries"],
        {way: milliseconds / 1e3 for way, milliseconds in pack_ms.items()},
    )
    payload = bits_per_second(rate) * 4 * sum(model.numel) / sent["dense"]
    print(f"\n{rate}, medians     bytes    ratio  step ms  added ms  model ms")
    print(f"{'alone':8} {'':19} {1e3 * model.step:8.0f}")
    exposed, errors = {}, {}
    for way in first["entries"]:
        exposed[way] = statistics.median(
            taken - alone for taken, alone in zip(steps[way], steps["alone"], strict=True)
        )
        predicted = model.exposed(way, payload)
        step = statistics.median(steps[way])
        errors[way] = (model.step + predicted) / step - 1
        print(
            f"{way:8} {sent[way]:12.0f} {sent[way] / sent['dense']:8.4f} {1e3 * step:8.0f}"
            f" {1e3 * exposed[way]:9.0f} {1e3 * predicted:9.0f}"
        )
    ratios = [d / c for d, c in zip(steps["dense"], steps["0.9"], strict=True)]
    spread = statistics.quantiles(ratios, n=4)
    added = exposed["dense"] / max(exposed["0.9"], 1e-3)
    print(
        f"plain / compressed at 90%: step {statistics.median(ratios):.2f} (quartiles "
        f"{spread[0]:.2f}, {spread[2]:.2f}), added time {added:.1f}"
    )
    measured = {
        "bytes_ratio": {name: round(sent[name] / sent["dense"], 4) for name in SPARSITIES},
        "step_ratio": round(statistics.median(ratios), 3),
        "exposed_ratio": round(added, 2),
        "model_error": {way: round(error, 3) for way, error in errors.items()},
    }
    return measured, model


def print_outlook(model: Profile) -> None:
    """Print what the model says of other networks and of other step times."""
    print("\nmilliseconds that 90% sparsity saves per step before packing, by the model")
    rates = [1, 5, 10, 25, 100]
    print("step ms   " + "".join(f"{rate:>5} Gbit/s" for rate in rates))
    whole = Profile(model.step, model.ready, model.numel, model.sent, {})
    for step in (1e3 * model.step, 800, 400, 200, 100, 50):
        saved = []
        for rate in rates:
            at = {"rate": 0.95e9 * rate, "stretch": step / (1e3 * model.step)}
            saved.append(whole.exposed("dense", **at) - whole.exposed("0.9", **at))
        print(f"{step:7.0f}   " + "".join(f"{1e3 * s:12.1f}" for s in saved))
    for tenths in itertools.count(1):
        rate = 1e8 * tenths
        gain = model.exposed("dense", rate) - model.exposed("0.9", rate)
        if gain <= 0:
            print(f"on this machine it pays below {rate / 1e9:.1f} Gbit/s of payload")
            break


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--rates", nargs="+", default=["1gbit", "5gbit"], help="Nmbit or Ngbit")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        rank, address, interface = arguments.worker
        print(json.dumps(work(int(rank), address, interface, arguments.rounds)))
        return
    if not all(re.fullmatch(r"[0-9.]+[mg]bit", rate) for rate in arguments.rates):
        raise SystemExit(f"allreduce.py: error: --rates {arguments.rates}: write 100mbit or 5gbit")
    torch.set_num_threads(1)
    reason = hosts.why_not()
    if reason is not None:
        raise SystemExit(f"allreduce.py: error: {reason}")
    pack_ms = measure_packing(arguments.rounds)
    measured, models = {}, {}
    for rate in arguments.rates:
        measured[rate], models[rate] = compare(rate, arguments.rounds, pack_ms)
    last = arguments.rates[-1]
    print_outlook(models[last])
    if arguments.json:
        figures: dict[str, Any] = {
            "bytes_ratio": measured[last]["bytes_ratio"],
            "pack_ms": round(pack_ms["0.9"], 2),
        }
        for name in ("step_ratio", "exposed_ratio", "model_error"):
            figures[name] = {rate: found[name] for rate, found in measured.items()}
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
