"""The training loop: micro-batches, optimizer steps, epochs. It knows plain dense training only."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from image_classification import distributed
from image_classification.data import Loader
from image_classification.distributed import World
from image_classification.log import Logger, Verbosity

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Precision:
    """Arithmetic of the forward and backward pass."""

    dtype: torch.dtype | None = None
    """Autocast type; None: everything in float32."""
    loss_scale: float = 65536.0
    """First loss scale; used in float16 only."""

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Return the context of a forward pass on `device`."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Return the loss scaler, disabled unless the type is float16."""
        return torch.amp.GradScaler(
            device.type,
            init_scale=self.loss_scale,
            growth_interval=100,
            enabled=self.dtype == torch.float16,
        )


class Trainer:
    """One model in training: runs epochs and owns what changes on the way.

    Args:
        model: The bare network on its device; DDP and torch.compile are put around it here.
        optimizer: Optimizer of the model's parameters.
        schedule: Learning rate as a function of the optimizer step.
        loss: Mean training loss from logits [n, classes] and targets ([n] or [n, classes]).
        world: Processes that train together.
        precision: Arithmetic of the passes.
        accumulation: Micro-batches per optimizer step.
        ema: Averaged copy of the model, updated after every optimizer step.
        mixup: Mixes images and targets of a micro-batch.
        compiled: Run the network through torch.compile.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: Callable[[int], float],
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        world: World,
        precision: Precision,
        accumulation: int = 1,
        ema: AveragedModel | None = None,
        mixup: Mix | None = None,
        compiled: bool = False,
    ) -> None:
        self.model, self.optimizer, self.schedule, self.loss = model, optimizer, schedule, loss
        self.world, self.precision, self.accumulation = world, precision, accumulation
        self.ema, self.mixup = ema, mixup
        self.scaler = precision.scaler(world.device)
        self.step = 0
        """Optimizer steps tried so far; the position in the schedule."""
        self._ddp = _wrap(model, world)
        self._forward: Callable[[Tensor], Tensor] = self._ddp or model
        if compiled:
            self._forward = torch.compile(self._forward)

    def backward(self, images: Tensor, targets: Tensor, *, last: bool) -> Tensor:
        """Add a micro-batch's share of the gradient; `last` of a step, all ranks average theirs.

        Returns:
            The mean loss of the micro-batch, detached, on the device; 0 without images.
        """
        if not len(images):
            return self._sit_out(images, last=last)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        with self._local(last=last):
            with self.precision.autocast(images.device):
                loss = self.loss(self._forward(images), targets)
            self.scaler.scale(loss / self.accumulation).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _local(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        return self._ddp.no_sync() if self._ddp and not last else contextlib.nullcontext()

    def _sit_out(self, images: Tensor, *, last: bool) -> Tensor:
        """Add a gradient of zero: no image of the micro-batch could be read.

        The other ranks wait for this one, so it runs the network, on a blank image that leaves no
        trace in the statistics of BatchNorm.
        """
        self.model.eval()
        with self._local(last=last):
            with self.precision.autocast(images.device):
                nothing = self._forward(images.new_zeros(1, *images.shape[1:])).sum() * 0
            self.scaler.scale(nothing).backward()  # type: ignore[no-untyped-call]
        self.model.train()
        return torch.zeros_like(nothing)

    def update(self) -> None:
        """Take an optimizer step with the gradient gathered so far."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(self.step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.step += 1

    def train_epoch(
        self,
        loader: Loader,
        epoch: int,
        *,
        steps: int,
        logger: Logger,
        print_freq: int = 10,
        metrics: Callable[[], Mapping[str, float]] = dict,
        bar: Sequence[str] = ("train.loss", "train.total_ips"),
    ) -> dict[str, float]:
        """Train for `steps` optimizer steps on the images of `epoch`.

        Args:
            loader: Batches of this process.
            epoch: 0-based number of the epoch.
            steps: Optimizer steps to take.
            logger: Where a record goes every `print_freq` micro-batches and at the end.
            print_freq: Micro-batches between records; only a record waits for the device.
            metrics: Further numbers for each record.
            bar: Names of the numbers that the progress bar shows.

        Returns:
            Means over the epoch and all ranks, under their names in the log.
        """
        self.model.train()
        meter = _Meter(self)
        batches = loader.epoch(epoch)
        total = steps * self.accumulation
        with contextlib.closing(logger.progress(total, f"epoch {epoch}")) as progress:
            for iteration in range(1, total + 1):
                last = iteration % self.accumulation == 0
                images, targets = meter.fetch(batches)
                meter.add(self.backward(images, targets, last=last), len(images))
                if last:
                    self.update()
                progress.update(1)
                if iteration % print_freq == 0 or iteration == total:
                    shown, detail = meter.record()
                    detail |= metrics()
                    at = (epoch, iteration)
                    logger.log(at, shown, global_step=self.step)
                    logger.log(at, detail, Verbosity.VERBOSE, global_step=self.step)
                    values = shown | detail
                    progress.update(0, **{n.partition(".")[2]: values[n] for n in bar})
        return meter.summary()

    def state_dict(self) -> dict[str, object]:
        """Return everything that training changes, as plain tensors and numbers."""
        return {
            "step": self.step,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
        }


def _wrap(model: nn.Module, world: World) -> DistributedDataParallel | None:
    if world.world_size == 1:
        return None
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


class _Meter:
    """Sums of one epoch: losses stay on the device until a record is made."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._epoch_start = self._start = time.perf_counter()
        self._waited = self._epoch_waited = 0.0
        self._batches = self._epoch_batches = 0
        self._sums = torch.zeros(2, device=trainer.world.device)  # of losses, of images
        self._loss = self._images = 0.0  # of the epoch and all ranks

    def fetch(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        return batch

    def add(self, loss: Tensor, num_images: int) -> None:
        self._sums += torch.stack([loss * num_images, torch.full_like(loss, num_images)])
        self._batches += 1

    def record(self) -> tuple[dict[str, float], dict[str, float]]:
        """Close an interval; return what the console shows and what only the raport keeps."""
        loss, images = distributed.all_reduce_sum(self._sums).tolist()
        now = time.perf_counter()
        shown, detail = self._rates(now - self._start, self._waited, self._batches, images)
        shown = {"train.loss": _mean(loss, images), **shown,
                 "train.lr": self._trainer.optimizer.param_groups[0]["lr"]}  # fmt: skip
        if self._trainer.scaler.is_enabled():
            shown["train.grad_scale"] = self._trainer.scaler.get_scale()
        self._loss += loss
        self._images += images
        self._epoch_waited += self._waited
        self._epoch_batches += self._batches
        self._start, self._waited, self._batches = now, 0.0, 0
        self._sums = torch.zeros_like(self._sums)
        return shown, detail

    def summary(self) -> dict[str, float]:
        elapsed = self._start - self._epoch_start
        counts = self._epoch_batches, self._images
        shown, detail = self._rates(elapsed, self._epoch_waited, *counts)
        return {"train.loss": _mean(self._loss, self._images), **shown, **detail}

    def _rates(
        self, elapsed: float, waited: float, batches: int, images: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        compute = max(elapsed - waited, 1e-9)
        return (
            {"train.compute_ips": images / compute, "train.total_ips": images / elapsed},
            {"train.data_time": waited / batches, "train.compute_time": compute / batches},
        )


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan
