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

from image_classification import distributed, sharding
from image_classification.data import Loader
from image_classification.distributed import World
from image_classification.log import Logger, Verbosity

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line for the user."""


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
        model: The bare network on its device, sharded or whole; DDP and torch.compile are put
            around it here.
        optimizer: Optimizer of the model's parameters.
        schedule: Learning rate as a function of the optimizer step.
        loss: Mean training loss from logits [n, classes] and targets ([n] or [n, classes]).
        world: Processes that train together.
        precision: Arithmetic of the passes.
        accumulation: Micro-batches per optimizer step.
        ema: Averaged copy of the model, updated after every optimizer step.
        prepare_ema: Called on `ema` after each of its updates.
        max_bad_steps: Steps in a row whose loss may be infinite or not a number, at least 1.
        mixup: Mixes images and targets of a micro-batch.
        compiled: Run the network through torch.compile.
        prepare_ddp: Called on the DDP wrapper, where there is one, before its first use.
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
        prepare_ema: Callable[[nn.Module], object] = lambda model: None,
        max_bad_steps: int = 10,
        mixup: Mix | None = None,
        compiled: bool = False,
        prepare_ddp: Callable[[DistributedDataParallel], object] = lambda model: None,
    ) -> None:
        self.model, self.optimizer, self.schedule, self.loss = model, optimizer, schedule, loss
        self.world, self.precision, self.accumulation = world, precision, accumulation
        self.ema, self.mixup = ema, mixup
        self.prepare_ema, self.max_bad_steps = prepare_ema, max_bad_steps
        self.scaler = precision.scaler(world.device)
        self.step = 0
        """Optimizer steps tried so far; the position in the schedule."""
        self.epoch = -1
        """The current epoch, or the last one."""
        self.epoch_step = 0
        """Optimizer steps taken in `epoch`."""
        self.meter = Meter(world)
        """Sums over `epoch` so far."""
        self._ddp = _wrap(model, world)
        if self._ddp is not None:
            prepare_ddp(self._ddp)
        self._forward: Callable[[Tensor], Tensor] = self._ddp or model
        if compiled:
            self._forward = torch.compile(self._forward)

    def backward(self, images: Tensor, targets: Tensor, *, last: bool) -> Tensor:
        """Add the gradient of a micro-batch; with the `last` of a step, average over all ranks.

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
        if sharding.is_sharded(self.model):
            sharding.sync_gradients(self.model, last=last)
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
            self.prepare_ema(self.ema)
        self.step += 1
        self.epoch_step += 1

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
        after_step: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Train until `steps` optimizer steps are taken on the images of `epoch`.

        If a checkpoint was loaded within the epoch (it sets `epoch`, `epoch_step`, `meter` and the
        position of the loader), training continues at that position.

        Args:
            loader: Batches of this process.
            epoch: 0-based number of the epoch.
            steps: Optimizer steps to take.
            logger: Where a record goes every `print_freq` micro-batches and at the end.
            print_freq: Micro-batches between records; only a record waits for the device.
            metrics: Further numbers for each record.
            bar: Names of the numbers that the progress bar shows.
            after_step: Called after every optimizer step and its record, when all is consistent.

        Returns:
            Means over the epoch and all ranks, under their names in the log.

        Raises:
            TrainingError: The loss was not finite for `max_bad_steps` steps in a row.
        """
        self.model.train()
        if epoch != self.epoch:
            self.epoch, self.epoch_step, self.meter = epoch, 0, Meter(self.world)
        meter = self.meter
        done, total = self.epoch_step * self.accumulation, steps * self.accumulation
        batches = loader.epoch(epoch) if done < total else iter(())
        with contextlib.closing(logger.progress(total, f"epoch {epoch}")) as progress:
            progress.update(done)
            for iteration in range(done + 1, total + 1):
                last = iteration % self.accumulation == 0
                images, targets = meter.fetch(batches)
                meter.add(self.backward(images, targets, last=last), len(images), last=last)
                if last:
                    self.update()
                progress.update(1)
                if iteration % print_freq == 0 or iteration == total:
                    shown, detail = meter.record()
                    self._check_loss()
                    shown |= self._optimizer_record()
                    detail |= metrics()
                    at = (epoch, iteration)
                    logger.log(at, shown, global_step=self.step)
                    logger.log(at, detail, Verbosity.VERBOSE, global_step=self.step)
                    values = shown | detail
                    progress.update(0, **{n.partition(".")[2]: values[n] for n in bar})
                if last:
                    after_step()
        return meter.summary()

    def _check_loss(self) -> None:
        """Compare what the meter's last record found on all ranks with the limit."""
        if self.meter.bad_steps >= self.max_bad_steps:
            raise TrainingError(
                f"the loss was not finite for {self.meter.bad_steps} steps in a row, around step "
                f"{self.step} (--max-bad-steps {self.max_bad_steps})"
            )

    def _optimizer_record(self) -> dict[str, float]:
        record = {"train.lr": float(self.optimizer.param_groups[0]["lr"])}
        if self.scaler.is_enabled():
            record["train.grad_scale"] = self.scaler.get_scale()
        return record

    def state_dict(self) -> dict[str, object]:
        """Return everything that training changes and all ranks share, as tensors and numbers."""
        return {
            "step": self.step,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
        }


def _wrap(model: nn.Module, world: World) -> DistributedDataParallel | None:
    if world.world_size == 1 or sharding.is_sharded(model):
        return None
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


class Meter:
    """Sums of one epoch: losses stay on the device until a record is made."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._epoch_start = self._start = time.perf_counter()
        self._waited = self._epoch_waited = 0.0
        self._batches = self._epoch_batches = 0
        self._sums = torch.zeros(2, device=world.device)  # of losses, of images; of this rank
        self._epoch_loss = self._epoch_images = 0.0  # of all ranks
        self._step_loss = torch.zeros((), device=world.device)
        self._bad_steps = torch.zeros((), device=world.device)  # in a row, up to now
        self._most_bad_steps = torch.zeros((), device=world.device)  # since the last record
        self.bad_steps = 0
        """Most steps in a row without a finite loss, on any rank, in the last record."""

    def fetch(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Get a batch, and add the time that it took."""
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        return batch

    def add(self, loss: Tensor, num_images: int, *, last: bool) -> None:
        """Add the mean loss of a micro-batch, which may be the last of its step."""
        self._sums += torch.stack([loss * num_images, torch.full_like(loss, num_images)])
        self._batches += 1
        self._step_loss += loss
        if last:
            finite = torch.isfinite(self._step_loss)
            self._bad_steps = torch.where(finite, 0.0, self._bad_steps + 1)
            self._most_bad_steps = torch.maximum(self._most_bad_steps, self._bad_steps)
            self._step_loss = torch.zeros_like(self._step_loss)

    def record(self) -> tuple[dict[str, float], dict[str, float]]:
        """End the interval; return metrics for the console, and metrics only for the raport."""
        loss, images = distributed.all_reduce_sum(self._sums).tolist()
        self.bad_steps = int(distributed.all_reduce_max(self._most_bad_steps))
        now = time.perf_counter()
        shown, detail = self._rates(now - self._start, self._waited, self._batches, images)
        shown = {"train.loss": _mean(loss, images), **shown}
        self._epoch_loss += loss
        self._epoch_images += images
        self._epoch_waited += self._waited
        self._epoch_batches += self._batches
        self._start, self._waited, self._batches = now, 0.0, 0
        self._sums = torch.zeros_like(self._sums)
        self._most_bad_steps = self._bad_steps
        return shown, detail

    def summary(self) -> dict[str, float]:
        """Return the means of the epoch, up to the last record."""
        elapsed = self._start - self._epoch_start
        counts = self._epoch_batches, self._epoch_images
        shown, detail = self._rates(elapsed, self._epoch_waited, *counts)
        return {"train.loss": _mean(self._epoch_loss, self._epoch_images), **shown, **detail}

    def state_dict(self) -> dict[str, float]:
        """Return the sums of this rank after an optimizer step; waits for the device."""
        now = time.perf_counter()
        loss, images = self._sums.tolist()
        return {
            "epoch_elapsed": self._start - self._epoch_start,
            "elapsed": now - self._start,
            "waited": self._waited,
            "epoch_waited": self._epoch_waited,
            "batches": self._batches,
            "epoch_batches": self._epoch_batches,
            "loss": loss,
            "images": images,
            "epoch_loss": self._epoch_loss,
            "epoch_images": self._epoch_images,
            "bad_steps": float(self._bad_steps),
            "most_bad_steps": float(self._most_bad_steps),
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on with the sums that `state_dict` returned."""
        self._start = time.perf_counter() - state["elapsed"]
        self._epoch_start = self._start - state["epoch_elapsed"]
        self._waited, self._epoch_waited = state["waited"], state["epoch_waited"]
        self._batches = int(state["batches"])
        self._epoch_batches = int(state["epoch_batches"])
        self._epoch_loss, self._epoch_images = state["epoch_loss"], state["epoch_images"]
        self._sums = torch.tensor([state["loss"], state["images"]], device=self._world.device)
        self._bad_steps = torch.full_like(self._bad_steps, state["bad_steps"])
        self._most_bad_steps = torch.full_like(self._bad_steps, state["most_bad_steps"])

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
