"""The parts of a training step: loss, MixUp, learning rate, averaged weights."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms import v2

from image_classification.ranges import Range
from image_classification.sharding import local

LrKind = Literal["step", "linear", "cosine"]
LABEL_SMOOTHING = Range("in [0, 1)", lambda value: 0 <= value < 1)
EMA_DECAY = Range("above 0 and below 1", lambda value: 0 < value < 1)


@dataclass(frozen=True, kw_only=True)
class LrSchedule:
    """Learning rate as a pure function of the optimizer step.

    Let e be the epoch: the whole epochs done, or with `per_step` the exact ratio
    step / steps_per_epoch. With base b, floor f, length E and warm-up w:

    - warm-up, e < w: b (e + 1) / w per epoch; b e / w, from 0, per step
    - cosine: f + (b - f) (1 + cos(pi (e - w) / (E - w))) / 2
    - linear: b (1 - (e - w) / (E - w))
    - step: b gamma^n with n the milestones <= e

    With `restarts` at epochs r, e counts from the last of them and E is the distance to the next.

    Per epoch these are the formulas of NVIDIA's ConvNets harness. From the end of training on, the
    value of e = E is kept. Having no state, it needs nothing in a checkpoint but the step.

    Deviations: a warm-up of a fractional number of epochs never exceeds b.
    """

    kind: LrKind
    base_lr: float
    """Peak, reached at the end of the warm-up."""
    epochs: int
    steps_per_epoch: int
    """Optimizer steps, not micro-batches."""
    end_lr: float = 0.0
    """Floor of the cosine."""
    warmup_epochs: float = 0.0
    milestones: tuple[float, ...] = (30.0, 60.0, 80.0)
    """Epochs at which the step schedule decays."""
    gamma: float = 0.1
    """Factor of the step schedule."""
    per_step: bool = False
    restarts: tuple[float, ...] = ()
    """Epochs at which the schedule begins anew, for the epochs until the next or the last."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value out of range."""
        if self.kind not in get_args(LrKind):
            raise ValueError(f"lr schedule must be step, cosine or linear, got {self.kind!r}")
        if self.epochs < 1:
            raise ValueError(
                f"--epochs must be at least 1, got {self.epochs}: a run has at least one epoch"
            )
        if self.steps_per_epoch < 1:
            raise ValueError(f"an epoch needs at least one step, got {self.steps_per_epoch}")
        bounds = [0.0, *self.restarts, float(self.epochs)]
        if not all(a < b for a, b in pairwise(bounds)):
            raise ValueError(
                f"--lr-restarts must increase, above 0 and below --epochs {self.epochs}, got "
                f"{list(self.restarts)}"
            )
        length = min(b - a for a, b in pairwise(bounds))
        if not 0 <= self.warmup_epochs < length:
            what = "of training" if not self.restarts else "between two of --lr-restarts"
            raise ValueError(
                f"--warmup must be less than --epochs {self.epochs} and at least 0: a warm-up is "
                f"shorter than the {length:g} epochs {what}, got {self.warmup_epochs}"
            )
        if not all(a < b for a, b in pairwise(self.milestones)):
            raise ValueError(f"--lr-milestones must increase, got {list(self.milestones)}")
        if self.end_lr != 0 and self.kind != "cosine":
            raise ValueError(f"end_lr {self.end_lr} has no effect on the {self.kind} schedule")

    def __call__(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 0."""
        warmup, length = self.warmup_epochs, float(self.epochs)
        epoch = step / self.steps_per_epoch if self.per_step else step // self.steps_per_epoch
        for begin, end in pairwise([0.0, *self.restarts, float(self.epochs)]):
            if begin <= epoch < end or end == self.epochs:
                epoch, length = epoch - begin, end - begin
                break
        if epoch < warmup:
            return self.base_lr * (
                epoch / warmup if self.per_step else min(1, (epoch + 1) / warmup)
            )
        epoch = min(epoch, length)
        if self.kind == "step":
            return self.base_lr * self.gamma ** sum(epoch >= m for m in self.milestones)
        progress = (epoch - warmup) / (length - warmup)
        if self.kind == "linear":
            return self.base_lr * (1 - progress)
        return self.end_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (self.base_lr - self.end_lr)


class Ema(AveragedModel):
    """Exponential moving average of a model's parameters and BatchNorm statistics.

    Update n (from 0) is average = mu average + (1 - mu) model with mu = min(decay,
    (1 + n) / (10 + n)), so that early updates forget the random start quickly. Counters of
    BatchNorm are copied. It starts as a copy of the model, and its state_dict holds n.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average toward `model`; call it once per optimizer step.

        The parent's update copies its counter to the device and waits for it; here the counter
        stays on the host, and all tensors are updated by a few kernels.

        Args:
            model: Parameters and buffers like those of the averaged model, in the same order; a
                wrapper such as DistributedDataParallel will do.
        """
        num_updates = int(self.n_averaged)
        mu = min(self.decay, (1 + num_updates) / (10 + num_updates))
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        torch._foreach_lerp_([ours for ours, _ in floats], [theirs for _, theirs in floats], 1 - mu)
        if counters:
            torch._foreach_copy_([ours for ours, _ in counters], [theirs for _, theirs in counters])
        self.n_averaged += 1


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield what this process has of parameters and buffers."""
    return map(local, chain(model.parameters(), model.buffers()))


def create_ema(model: nn.Module, decay: float) -> Ema:
    """Return a moving average of `model` with the final decay `decay`, in (0, 1).

    `.module` is the averaged network, on the device of `model`.
    """
    if decay not in EMA_DECAY:
        raise ValueError(f"EMA decay must be {EMA_DECAY}, got {decay}")
    return Ema(model, decay)


def mixup(alpha: float, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a function that mixes each image of a batch with its neighbor (arXiv:1710.09412).

    The function maps float images (N, C, H, W) and class indices (N,) to mixed images and soft
    targets (N, num_classes). The one mixing ratio of a batch comes from Beta(alpha, alpha) by
    torch's global CPU generator; nothing waits for a GPU.

    Args:
        alpha: Above 0; the smaller, the closer the ratio is to 0 or 1.
        num_classes: Length of a soft target.
    """
    if alpha <= 0:
        raise ValueError(f"MixUp's alpha must be above 0, got {alpha}")
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = v2.MixUp(
        alpha=alpha, num_classes=num_classes
    )
    return mix


def create_loss(label_smoothing: float = 0.0) -> nn.CrossEntropyLoss:
    """Return the mean cross entropy of logits (N, C) to class indices (N,) or soft targets (N, C).

    Args:
        label_smoothing: Share of the target spread evenly over all classes, the true one included
            (Szegedy et al. 2016, section 7), in [0, 1). Evaluation uses 0.
    """
    if label_smoothing not in LABEL_SMOOTHING:
        raise ValueError(f"label_smoothing must be {LABEL_SMOOTHING}, got {label_smoothing}")
    return nn.CrossEntropyLoss(label_smoothing=label_smoothing)
