"""Exact validation: every image counts once, whatever the number of processes."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from image_classification import distributed
from image_classification.data import DataError, Loader
from image_classification.distributed import World
from image_classification.log import Logger, Verbosity
from image_classification.trainer import Precision


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    *,
    world: World,
    precision: Precision,
    topk: int,
    logger: Logger,
    step: tuple[int, int],
    print_freq: int = 10,
    limit: int = -1,
    prefix: str = "val",
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return accuracy and plain cross entropy of `model` over the images of all ranks.

    Args:
        model: The bare network (not its DDP wrapper: ranks may hold different numbers of batches).
        loader: Validation batches of this process.
        world: Processes that share the images.
        precision: Arithmetic of the forward pass.
        topk: k of the second accuracy; at most the number of classes is used.
        logger: Where speed goes every `print_freq` batches.
        step: Epoch and iteration of training so far, for the records.
        print_freq: Batches between records.
        limit: Stop after this many batches per process; -1: all.
        prefix: Head of the metrics' names.
        after_batch: Called after every batch, equally often on all ranks.

    Returns:
        `<prefix>.top1` and `.top<k>` in percent, `.loss`, images per second, seconds per batch
        (mean and quantiles of this process).

    Raises:
        DataError: No process has an image.
    """
    distributed.broadcast_buffers(model)
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    images_seen = 0
    clock = _Clock(world.device)
    batches = len(loader) if limit == -1 else min(limit, len(loader))
    rounds = distributed.broadcast_object(batches)  # rank 0 has the most
    iteration = 0
    progress = logger.progress(batches, prefix)
    for iteration, (images, targets) in enumerate(loader.epoch(0), start=1):
        if len(images):  # 0 if no image of the batch can be read
            clock.start()
            with precision.autocast(images.device):
                output = model(images)
            sums += _sums(output.float(), targets, topk)
            images_seen += len(images)
            clock.stop()
        progress.update(1)
        if iteration % print_freq == 0:
            ips = images_seen * world.world_size / clock.elapsed()
            logger.log((*step, iteration), {f"{prefix}.total_ips": ips}, Verbosity.VERBOSE)
        after_batch()
        if iteration == batches:
            break
    progress.close()
    for _ in range(iteration, rounds):  # other ranks may have more batches
        after_batch()
    sums = torch.cat([sums, torch.tensor([float(images_seen)], device=world.device)])
    top1, top, loss, count = distributed.all_reduce_sum(sums).tolist()
    if count == 0:
        raise DataError("there is no validation image")
    return {
        f"{prefix}.top1": 100 * top1 / count,
        f"{prefix}.top{topk}": 100 * top / count,
        f"{prefix}.loss": loss / count,
        f"{prefix}.total_ips": count / clock.elapsed(),
        **{f"{prefix}.{name}": value for name, value in clock.latencies().items()},
    }


def _sums(output: Tensor, targets: Tensor, topk: int) -> Tensor:
    """Return (top-1 hits, top-k hits, summed loss) of a batch, on the device."""
    ranked = output.topk(min(topk, output.shape[1]), dim=1).indices
    hits = ranked == targets[:, None]
    loss = F.cross_entropy(output, targets, reduction="sum")
    return torch.stack([hits[:, 0].sum(), hits.sum(), loss]).double()


class _Clock:
    """Times batches without waiting for the device before `latencies`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begin = time.perf_counter()
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: list[float] = []

    def start(self) -> None:
        if self._cuda:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self._marks.append((start, stop))
            start.record()
        else:
            self._started = time.perf_counter()

    def stop(self) -> None:
        if self._cuda:
            self._marks[-1][1].record()
        else:
            self._seconds.append(time.perf_counter() - self._started)

    def elapsed(self) -> float:
        return time.perf_counter() - self._begin

    def latencies(self) -> dict[str, float]:
        """Return the mean, 95th and 99th percentile and maximum seconds per batch."""
        if self._cuda:
            torch.cuda.synchronize()
            self._seconds = [a.elapsed_time(b) / 1000 for a, b in self._marks]
        return _quantiles(self._seconds)


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:  # a process may hold no image at all
        return {}
    values = torch.tensor(seconds, dtype=torch.float64)
    at = {
        f"compute_latency_at{percent}": float(
            torch.quantile(values, percent / 100, interpolation="nearest")
        )
        for percent in (95, 99, 100)
    }
    return {"compute_latency": float(values.mean()), **at}
