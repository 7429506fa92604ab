"""The parts of a training step: loss, MixUp, optimizer, learning rate, averaged weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms import v2

NORMALIZATIONS = (
    nn.modules.batchnorm._NormBase,  # BatchNorm*, SyncBatchNorm, InstanceNorm*
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
OPTIMIZERS = ("sgd", "rmsprop", "adamw", "apex-sgd")


def parameter_groups(
    model: nn.Module, *, weight_decay: float, bn_weight_decay: bool
) -> list[dict[str, Any]]:
    """Split the trainable parameters into one group with weight decay and one without.

    The split goes by the type of the module that owns a parameter, so the BatchNorm of a shortcut
    is found whatever it is called. For ResNet-50: 54 kernels decay, 107 parameters (53 scales,
    53 shifts, the bias of fc) do not.

    Args:
        model: Parameters that occur twice are taken once, frozen ones not at all.
        weight_decay: Coefficient of the first group, at least 0.
        bn_weight_decay: Decay scales and shifts of normalization layers too. Biases of other layers
            never decay.

    Returns:
        Groups for a `torch.optim` optimizer, in traversal order; none of them is empty.

    Deviations: NVIDIA's harness looks for "bn" in the name and so decays the BatchNorm of ResNet
    shortcuts; it also decays the bias of fc.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            if isinstance(module, NORMALIZATIONS):
                decays = bn_weight_decay
            else:
                decays = name != "bias" and not name.endswith("_bias")
            (decayed if decays else undecayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def create_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    *,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    rmsprop_alpha: float = 0.9,
    rmsprop_eps: float = 1e-3,
    device: torch.device,
) -> Optimizer:
    """Return an optimizer over `groups`, on the fastest implementation that `device` has.

    Create it after the model has its final device and memory format: the momentum of SGD is laid
    out here like the parameters.

    Args:
        name: "sgd", "rmsprop", "adamw" (decoupled weight decay) or "apex-sgd", NVIDIA apex's
            FusedSGD.
        groups: As of `parameter_groups`.
        lr: Learning rate until a schedule sets another.
        momentum: Of sgd, apex-sgd and rmsprop; adamw keeps its own averages (0.9 and 0.999).
        nesterov: Of sgd and apex-sgd.
        weight_decay: Coefficient of groups that name none.
        rmsprop_alpha: Smoothing constant of the squared gradient.
        rmsprop_eps: Added to the root of the squared gradient.
        device: Where the parameters are.

    Raises:
        ValueError: Unknown `name`, Nesterov where there is none, or apex is not installed.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; known are {', '.join(OPTIMIZERS)}")
    if nesterov and name not in ("sgd", "apex-sgd"):
        raise ValueError(f"Nesterov momentum has no effect on {name}; use it with sgd")
    if nesterov and momentum == 0:
        raise ValueError("Nesterov momentum needs a momentum above 0")
    common: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    # The fused step of SGD on a CPU takes a third to a quarter of the time of the others.
    fused = device.type in ("cuda", "cpu")
    if name == "rmsprop":
        return RMSprop(groups, alpha=rmsprop_alpha, eps=rmsprop_eps, momentum=momentum, **common)
    if name == "adamw":
        return AdamW(groups, fused=fused, **common)
    if name == "apex-sgd":
        optimizer: Optimizer = _apex_sgd()(groups, momentum=momentum, nesterov=nesterov, **common)
        return optimizer
    sgd = SGD(groups, momentum=momentum, nesterov=nesterov, fused=fused, **common)
    if momentum > 0:
        _start_momentum_at_zero(sgd)
    return sgd


def _start_momentum_at_zero(optimizer: SGD) -> None:
    """Allocate the momentum of fused SGD before its first step.

    Otherwise the first step allocates the buffers without initializing them. If GradScaler finds
    that this step overflowed, as first steps often do, they stay uninitialized, and the next step
    adds whatever the memory held. Starting from zero gives the same numbers in the first step:
    m * 0 + g = g.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _apex_sgd() -> Callable[..., Optimizer]:
    try:
        # An unrelated package on PyPI is called apex as well; it has no optimizers.
        from apex.optimizers import FusedSGD
    except ImportError as error:
        raise ValueError(
            f"optimizer apex-sgd needs NVIDIA apex built with its CUDA extensions ({error}); "
            "use sgd, which is fused too"
        ) from error
    factory: Callable[..., Optimizer] = FusedSGD
    return factory


@dataclass(frozen=True, kw_only=True)
class LrSchedule:
    """Learning rate as a pure function of the optimizer step.

    Let e be the epoch: the whole epochs done, or with `per_step` the exact ratio
    step / steps_per_epoch. With base b, floor f, length E and warm-up w:

    - warm-up, e < w: b (e + 1) / w per epoch; b e / w, from 0, per step
    - cosine: f + (b - f) (1 + cos(pi (e - w) / (E - w))) / 2
    - linear: b (1 - (e - w) / (E - w))
    - step: b gamma^n with n the milestones <= e

    Per epoch these are the formulas of NVIDIA's ConvNets harness. From the end of training on, the
    value of e = E is kept. Having no state, it needs nothing in a checkpoint but the step.

    Deviations: a warm-up of a fractional number of epochs never exceeds b.
    """

    kind: Literal["step", "cosine", "linear"]
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

    def __post_init__(self) -> None:
        """Raise ValueError for a value out of range."""
        if self.kind not in ("step", "cosine", "linear"):
            raise ValueError(f"lr schedule must be step, cosine or linear, got {self.kind!r}")
        if self.epochs < 1 or self.steps_per_epoch < 1:
            raise ValueError(
                f"a schedule needs at least one epoch of one step, got {self.epochs} epochs "
                f"of {self.steps_per_epoch}"
            )
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warm-up must be at least 0 and shorter than the {self.epochs} epochs of "
                f"training, got {self.warmup_epochs}"
            )
        if not all(a < b for a, b in pairwise(self.milestones)):
            raise ValueError(f"milestones must increase, got {self.milestones}")
        if self.end_lr != 0 and self.kind != "cosine":
            raise ValueError(f"end_lr {self.end_lr} has no effect on the {self.kind} schedule")

    def __call__(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 0."""
        warmup = self.warmup_epochs
        epoch = step / self.steps_per_epoch if self.per_step else step // self.steps_per_epoch
        if epoch < warmup:
            return self.base_lr * (
                epoch / warmup if self.per_step else min(1, (epoch + 1) / warmup)
            )
        epoch = min(epoch, self.epochs)
        if self.kind == "step":
            return self.base_lr * self.gamma ** sum(epoch >= m for m in self.milestones)
        progress = (epoch - warmup) / (self.epochs - warmup)
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


def _tensors(model: nn.Module) -> chain[Tensor]:
    return chain(model.parameters(), model.buffers())


def create_ema(model: nn.Module, decay: float) -> Ema:
    """Return a moving average of `model` with the final decay `decay`, in (0, 1).

    `.module` is the averaged network, on the device of `model`.
    """
    if not 0 < decay < 1:
        raise ValueError(f"EMA decay must be above 0 and below 1, got {decay}")
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
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    return nn.CrossEntropyLoss(label_smoothing=label_smoothing)
