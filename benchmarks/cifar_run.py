"""One training run of benchmarks/convergence.py: its steps, its checkpoints, its result."""

import gc
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import sparse
from benchmarks.cifar import RECIPES, Split
from image_classification import checkpoint
from sparse import costs


@dataclass(frozen=True)
class Run:
    """One training run; everything its result depends on."""

    method: str
    sparsity: float
    seed: int
    epochs: int
    arch: str = "small"
    distribution: str = "erk"
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    delta_t: int = 50
    drop_fraction: float = 0.3
    block: str = "1x1"

    @property
    def name(self) -> str:
        """A name that tells runs apart whose flags differ."""
        name = f"{self.arch}-{self.method}-{self.sparsity}-seed{self.seed}-{self.epochs}epochs"
        name += f"-batch{self.batch_size}-delta{self.delta_t}"
        return name if self.block == "1x1" else f"{name}-block{self.block}"


def attach(
    run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int
) -> sparse.Sparsifier | None:
    """Make the model sparse as the run says; the topology is frozen in the last quarter or so."""
    recipe = RECIPES[run.arch]
    shared: dict[str, Any] = {"sparsity": run.sparsity, "distribution": run.distribution}
    if run.block != "1x1":
        shared["block"] = [int(size) for size in run.block.split("x")]
    if run.method == "dense":
        return None
    if run.method == "static":
        return sparse.static(model, optimizer, seed=run.seed, **shared)
    if run.method == "gmp":
        ramp = recipe.pruning(total_steps, run.delta_t)
        steps = {"prune_start": ramp.start, "prune_end": ramp.end, "prune_every": ramp.every}
        return sparse.gmp(model, optimizer, **steps, **shared)
    if run.method in PHASES:
        return PHASES[run.method](model, optimizer, total_steps, **shared)
    t_end = recipe.t_end(total_steps)
    updates = {"delta_t": run.delta_t, "t_end": t_end, "drop_fraction": run.drop_fraction}
    if run.method == "granet":  # its own drop fraction; the ramp of the authors' CIFAR runs
        updates = {"delta_t": run.delta_t, "t_end": total_steps, "prune_end": total_steps // 2}
    factories = {name: getattr(sparse, name) for name in ("set", "snfs", "rigl", "srigl", "granet")}
    return factories[run.method](model, optimizer, seed=run.seed, **updates, **shared)


def alternate(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, **shared: Any
) -> sparse.Sparsifier:
    """Train by AC/DC, with the published phases as shares of a run of 100 epochs."""
    shares = {"dense_warmup": 10, "sparse_phase": 5, "dense_phase": 5}
    shares |= {"last_dense": 10, "last_sparse": 15}
    phases = {name: max(1, steps * share // 100) for name, share in shares.items()}
    return sparse.acdc(model, optimizer, total_steps=steps, **phases, **shared)


def grow_and_prune(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, **shared: Any
) -> sparse.Sparsifier:
    """Train by GaP: both halves of the layers in turn, eight phases in four fifths of the run."""
    names = list(sparse.prunable(model))
    half = len(names) // 2
    partitions = [",".join(names[:half]), ",".join(names[half:])]
    phase = max(1, steps // 10)
    return sparse.gap(model, optimizer, partitions=partitions, phase=phase, **shared)


PHASES = {"acdc": alternate, "gap": grow_and_prune}


class Recorded:
    """Forward and backward of a batch, which a GPU records once and replays.

    Gradients and loss keep their addresses. A CPU does the same work without a recording.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Record with a batch of the right shapes and memory format, whose values do not matter."""
        self._model, self._images, self._labels = model, images.clone(), labels.clone()
        self._loss = torch.zeros((), device=images.device)
        buffers = [buffer.clone() for buffer in model.buffers()]
        self._replay = self._record(images.device)
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the gradients of a batch; return its loss, which the next call overwrites."""
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._replay()
        return self._loss

    def _work(self) -> None:
        self._loss = plain_step(self._model, self._images, self._labels)

    def _record(self, device: torch.device) -> Callable[[], None]:
        if device.type == "cpu":
            self._work()
            return self._work
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose algorithms and take memory, which is not recorded
                self._work()
            self._model.zero_grad(set_to_none=True)
        torch.cuda.current_stream(device).wait_stream(stream)
        gc.collect()  # earlier runs are cycles with a graph each, not to be freed while recording
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._work()
        replay: Callable[[], None] = graph.replay
        return replay


def plain_step(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Compute the gradients of a batch; return its loss."""
    model.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    return loss.detach()


class Training:
    """A run under way."""

    def __init__(
        self, run: Run, data: dict[str, Split], device: torch.device, *, graph: bool
    ) -> None:
        self.run, self._data, self._device, self._graph = run, data, device, graph
        self._recipe = recipe = RECIPES[run.arch]
        self.total_steps = run.epochs * (len(data["train"][1]) // run.batch_size)
        self.epoch = self._step = 0
        self._seconds = {"training": 0.0, "all": 0.0}
        self.scores: list[float] = []
        """Top-1 after each epoch."""
        self.loss = 0.0
        torch.manual_seed(run.seed)
        self.model = recipe.build().to(device).to(memory_format=recipe.memory_format)
        self._optimizer = torch.optim.SGD(
            self._parameter_groups(), run.lr, momentum=0.9, nesterov=True,
            weight_decay=run.weight_decay, fused=True if device.type == "cuda" else None,
        )  # fmt: skip
        self._sparsifier = attach(run, self.model, self._optimizer, self.total_steps)
        self._compute = self._make_step()

    def _parameter_groups(self) -> list[dict[str, Any]]:
        parameters = list(self.model.parameters())
        if self._recipe.decays_all:
            return [{"params": parameters}]
        return [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def _make_step(self) -> Callable[[Tensor, Tensor], Tensor]:
        if not self._graph:
            return lambda images, labels: plain_step(self.model, images, labels)
        images = torch.zeros(self.run.batch_size, 3, 32, 32, device=self._device)
        images = images.to(memory_format=self._recipe.memory_format)
        labels = torch.zeros(self.run.batch_size, dtype=torch.int64, device=self._device)
        return Recorded(self.model, images, labels)

    def train_epoch(self) -> None:
        """Train for an epoch and measure the accuracy."""
        start = time.perf_counter()
        first = self._step
        losses = torch.zeros((), device=self._device)
        for images, labels in self._recipe.batches(self._data["train"], self.run.batch_size):
            factor = self._recipe.lr_factor(self._step, self.total_steps)
            for group in self._optimizer.param_groups:
                group["lr"] = self.run.lr * factor
            losses += self._compute(images, labels)
            self._optimizer.step()
            self._step += 1
        self.loss = losses.item() / (self._step - first)  # waits for the device
        trained = time.perf_counter()
        self.scores.append(accuracy(self.model, self._data["val"], self._recipe.prepare))
        self.epoch += 1
        self._seconds["training"] += trained - start
        self._seconds["all"] += time.perf_counter() - start

    def state(self) -> dict[str, Any]:
        """Give all that is needed to go on."""
        return {
            "run": asdict(self.run),
            "epoch": self.epoch,
            "step": self._step,
            "scores": self.scores,
            "loss": self.loss,
            "seconds": self._seconds,
            "generator": torch.get_rng_state(),
            "state_dict": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "sparsifier": self._sparsifier.state_dict() if self._sparsifier else {},
        }

    def load(self, path: Path) -> None:
        """Go on where a checkpoint file left off.

        Raises:
            ValueError: The file is damaged, or of a run with other settings.
        """
        state = checkpoint.load(path)
        for name, value in asdict(self.run).items():
            if state.get("run", {}).get(name) != value:
                raise ValueError(
                    f"{path} is of a run with other settings ({name} is not {value}): finish that "
                    "run, or remove the file"
                )
        self.epoch, self._step, self.loss = state["epoch"], state["step"], state["loss"]
        self.scores, self._seconds = state["scores"], state["seconds"]
        self.model.load_state_dict(state["state_dict"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._sparsifier:
            self._sparsifier.load_state_dict(state["sparsifier"])
        torch.set_rng_state(state["generator"])

    def result(self) -> dict[str, Any]:
        """Summarize the finished run."""
        sparsifier = self._sparsifier
        return {
            **asdict(self.run),
            "top1": self.scores[-1],
            "best_top1": max(self.scores),
            "train_loss": self.loss,
            "updates": sparsifier.num_updates if sparsifier else 0,
            "overall_sparsity": sparsifier.metrics()["sparsity"] if sparsifier else 0.0,
            **flops(self.run, sparsifier, self.total_steps),
            "seconds": round(self._seconds["all"], 1),
            "seconds_per_step": self._seconds["training"] / self._step,
            "graph": self._graph,
            **conditions(self._device),
        }


def train(
    run: Run,
    data: dict[str, Split],
    device: torch.device,
    *,
    graph: bool,
    path: Path,
    every: int,
) -> dict[str, Any]:
    """Train a run to its end, from its checkpoint if there is one; give accuracy and costs.

    Args:
        path: The run's checkpoint, which is written every so many epochs.
        every: How many.
    """
    training = Training(run, data, device, graph=graph)
    if path.exists():
        training.load(path)
        print(f"{run.name} goes on after epoch {training.epoch}", flush=True)
    while training.epoch < run.epochs:
        training.train_epoch()
        if training.epoch % every == 0 and training.epoch < run.epochs:
            checkpoint.write(path, training.state())
            told = f"loss {training.loss:.3f}, top-1 {training.scores[-1]:.2f}%"
            print(f"{run.name}: epoch {training.epoch}, {told}", flush=True)
    return training.result()


def conditions(device: torch.device) -> dict[str, Any]:
    """Return what speed and rounding depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"torchvision": torchvision.__version__, "cuda": str(torch.version.cuda)}
    return {"device": name, "versions": versions}


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, prepare: Callable[[Tensor], Tensor]) -> float:
    """Compute top-1 accuracy in percent."""
    model.eval()
    images, labels = split
    hits = torch.zeros((), dtype=torch.int64, device=labels.device)
    for chunk, answer in zip(images.split(500), labels.split(500), strict=True):
        hits += (model(prepare(chunk)).argmax(1) == answer).sum()
    model.train()
    return 100.0 * int(hits) / len(labels)


def flops(run: Run, sparsifier: sparse.Sparsifier | None, steps: int) -> dict[str, float]:
    """Compute what the run and one inference of its network take, in multiplies and adds."""
    layers = costs.trace_layers(RECIPES[run.arch].build(), 32)
    densities = {}
    if sparsifier is not None:
        densities = {
            name: int(mask.sum()) / mask.numel() for name, mask in sparsifier.masks.items()
        }
    report = costs.report(
        layers,
        densities,
        method=None if sparsifier is None else sparsifier.method,
        convention="true",
        total_steps=steps,
    )
    dense_run = 3.0 * report["dense_flops"] * steps * run.batch_size
    return {
        "inference_flops": report["inference_flops"],
        "training_flops": report["training_ratio"] * dense_run,
    }
