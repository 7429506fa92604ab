"""Models by name: torchvision's and our own."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from image_classification.models import (
    initialization,
    mobilenet,
    small_cnn,
    tf_resnet,
    wide_resnet,
)
from image_classification.models.spec import ModelSpec
from image_classification.ranges import AT_LEAST_1, Range

OWN: dict[str, ModelSpec] = {
    "mobilenet_v1": mobilenet.SPEC,
    "tf_resnet50": tf_resnet.SPEC,
    "wrn22_2": wide_resnet.WRN22_2,
    "small_cnn": small_cnn.SPEC,
}
"""Models of our own by name."""

STEMS = ("imagenet", "cifar")
NUM_CLASSES = AT_LEAST_1
WIDTH = Range("above 0 and at most 100", lambda value: 0 < value <= 100)


def names() -> list[str]:
    """Return the names of all models: ours and torchvision's."""
    return [*OWN, *torchvision.models.list_models(module=torchvision.models)]


def with_width() -> list[str]:
    """Return the names of the models whose channels --width multiplies."""
    return [name for name, spec in OWN.items() if spec.has_width]


def create_model(
    arch: str,
    *,
    num_classes: int = 1000,
    init: str = "torchvision",
    zero_gamma: bool = False,
    stem: str = "imagenet",
    width: float = 1.0,
) -> nn.Module:
    """Return a freshly initialized model; nothing is ever downloaded.

    The model is built on the default device, so `with torch.device("meta"):` costs no memory.

    Args:
        arch: One of `names()`. `resnet50` is v1.5 (the stride is in the 3x3 convolution);
            `tf_resnet50` has the same weights, and the max-pooling of TensorFlow.
        num_classes: Length of the logits, at least 1.
        init: "torchvision" leaves what the architecture's own constructor drew; "classic" and
            "fanin" redraw all convolutions from Kaiming's normal distribution over fan_out or
            fan_in, as NVIDIA's model configurations of these names do.
        zero_gamma: Set the last BatchNorm scale of each residual block to 0 (ResNets).
        stem: "cifar" replaces the 7x7 stride-2 convolution and the max-pool of a ResNet by a 3x3
            stride-1 convolution (He et al. 2016, section 4.2).
        width: Multiplier on the channels of the models that have one (`with_width`).

    Raises:
        ValueError: Unknown `arch`, a value out of range, or an option without effect on `arch`.
    """
    _check_arch(arch)
    if num_classes not in NUM_CLASSES:
        raise ValueError(f"num_classes must be {NUM_CLASSES}, got {num_classes}")
    if init not in initialization.INITS:
        raise ValueError(f"init must be one of {', '.join(initialization.INITS)}, got {init!r}")
    if stem not in STEMS:
        raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {stem!r}")
    if width not in WIDTH:
        raise ValueError(f"width must be {WIDTH}, got {width}")
    if width != 1 and arch not in with_width():
        raise ValueError(
            f"width {width} has no effect on {arch}; use it with {' or '.join(with_width())}"
        )

    model = _build(arch, num_classes, width)
    if stem == "cifar":
        _use_cifar_stem(model, arch)
    if init != "torchvision":
        fan: Literal["fan_in", "fan_out"] = "fan_out" if init == "classic" else "fan_in"
        if initialization.init_convolutions(model, fan) == 0:
            raise ValueError(f"init {init} has no effect on {arch}, which has no convolutions")
    if zero_gamma and initialization.zero_last_batchnorms(model) == 0:
        raise ValueError(
            f"zero gamma has no effect on {arch}, which has no ResNet blocks that end in BatchNorm"
        )
    return model


def default_image_size(arch: str) -> int:
    """Return the side in pixels of the square input that `arch` was designed for.

    For torchvision's models this is the smallest crop its published weights are evaluated with.

    Raises:
        ValueError: Unknown `arch`.
    """
    _check_arch(arch)
    if arch in OWN:
        return OWN[arch].image_size
    weights = torchvision.models.get_model_weights(arch)
    (size,) = min(entry.transforms().crop_size for entry in weights)
    return int(size)


def check_image_size(model: nn.Module, arch: str, image_size: int) -> None:
    """Raise ValueError (one line) if `model` does not take such images.

    Args:
        model: The network of `arch`; on the meta device trying it out costs nothing.
        arch: Its name.
        image_size: Side of the square images.
    """
    reason = OWN[arch].size_fault(image_size) if arch in OWN else None
    training = model.training
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            model.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:  # each model has its own words
        reason = str(error).partition("\n")[0]
    finally:
        model.train(training)
    if reason is not None:
        raise ValueError(
            f"--image-size {image_size} does not suit {arch}, whose own is "
            f"{default_image_size(arch)}: {reason}"
        )


def classifier(model: nn.Module) -> str:
    """Return the name of the layer that ends a network: one row or element per class."""
    *_, last = model.state_dict()
    return last.rpartition(".")[0]


def count_classes(arch: str, state_dict: Mapping[str, Tensor]) -> int:
    """Return the length of the logits of weights of `arch`, in whatever order they come.

    Raises:
        ValueError: Unknown `arch`, or weights that have no classifier of its name.
    """
    with torch.device("meta"):
        *_, last = create_model(arch).state_dict()
    if last not in state_dict:
        raise ValueError(f"it is no {arch}: {last} is missing")
    return len(state_dict[last])


def _check_arch(arch: str) -> None:
    known = names()
    if arch in known:
        return
    close = difflib.get_close_matches(arch.lower().replace("-", "_"), known, n=3)
    remedy = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}"
    raise ValueError(f"unknown arch {arch!r}; {remedy}")


def _build(arch: str, num_classes: int, width: float) -> nn.Module:
    if arch in OWN:
        options = {"width": width} if OWN[arch].has_width else {}
        return OWN[arch].create(num_classes=num_classes, **options)
    model: nn.Module
    if arch in ("googlenet", "inception_v3"):
        # one output like every other model: the auxiliary classifiers of training are left out
        model = torchvision.models.get_model(
            arch, weights=None, num_classes=num_classes, aux_logits=False, init_weights=True
        )
    elif arch.startswith("regnet"):
        with _SequencesOnCpu():
            model = torchvision.models.get_model(arch, weights=None, num_classes=num_classes)
        model = model.to(torch.get_default_device())  # the counters of BatchNorm
    else:
        model = torchvision.models.get_model(arch, weights=None, num_classes=num_classes)
    return model


class _SequencesOnCpu(TorchFunctionMode):
    """Let RegNets be built on the meta device, although they compute their widths with tensors."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.arange, torch.tensor):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def _use_cifar_stem(model: nn.Module, arch: str) -> None:
    if arch in OWN and (fault := OWN[arch].stem_fault):
        raise ValueError(fault)
    if not isinstance(model, torchvision.models.ResNet):
        raise ValueError(f"stem cifar has no effect on {arch}; only ResNets have such a stem")
    channels = model.conv1.out_channels
    model.conv1 = nn.Conv2d(3, channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
