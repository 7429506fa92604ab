"""Models by name: torchvision's and our own."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from image_classification.models import initialization
from image_classification.models.mobilenet import MobileNetV1
from image_classification.models.small_cnn import SmallCNN
from image_classification.models.wide_resnet import WideResNet

OWN_IMAGE_SIZES = {"mobilenet_v1": 224, "tf_resnet50": 224, "wrn22_2": 32, "small_cnn": 32}
ARCHES: tuple[str, ...] = (
    *OWN_IMAGE_SIZES,
    *torchvision.models.list_models(module=torchvision.models),
)
STEMS = ("imagenet", "cifar")


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
        arch: One of `ARCHES`. `resnet50` is v1.5 (the stride is in the 3x3 convolution);
            `tf_resnet50` has the same weights, and the max-pooling of TensorFlow.
        num_classes: Length of the logits, at least 1.
        init: "torchvision" leaves what the architecture's own constructor drew; "classic" and
            "fanin" redraw all convolutions from Kaiming's normal distribution over fan_out or
            fan_in, as NVIDIA's model configurations of these names do.
        zero_gamma: Set the last BatchNorm scale of each residual block to 0 (ResNets).
        stem: "cifar" replaces the 7x7 stride-2 convolution and the max-pool of a ResNet by a 3x3
            stride-1 convolution (He et al. 2016, section 4.2).
        width: Multiplier on the channels of mobilenet_v1, above 0.

    Raises:
        ValueError: Unknown `arch`, a value out of range, or an option without effect on `arch`.
    """
    _check_arch(arch)
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if init not in initialization.INITS:
        raise ValueError(f"init must be one of {', '.join(initialization.INITS)}, got {init!r}")
    if stem not in STEMS:
        raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {stem!r}")
    if width <= 0:
        raise ValueError(f"width must be above 0, got {width}")
    if width != 1 and arch != "mobilenet_v1":
        raise ValueError(f"width {width} has no effect on {arch}; only mobilenet_v1 has a width")

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
    if arch in OWN_IMAGE_SIZES:
        return OWN_IMAGE_SIZES[arch]
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
    reason = None
    if arch == "tf_resnet50" and image_size % 4 in (1, 2):
        reason = "TensorFlow pads other sizes than multiples of 4 in another way"
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
    if arch in ARCHES:
        return
    close = difflib.get_close_matches(arch.lower().replace("-", "_"), ARCHES, n=3)
    remedy = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(ARCHES)}"
    raise ValueError(f"unknown arch {arch!r}; {remedy}")


def _build(arch: str, num_classes: int, width: float) -> nn.Module:
    if arch == "mobilenet_v1":
        return MobileNetV1(num_classes, width)
    if arch == "wrn22_2":
        return WideResNet(depth=22, widen=2, num_classes=num_classes)
    if arch == "small_cnn":
        return SmallCNN(num_classes)
    if arch == "tf_resnet50":
        return _tf_resnet50(num_classes)
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


def _tf_resnet50(num_classes: int) -> nn.Module:
    """Return ResNet-50 as the RigL repository trained it: its max-pooling pads at the end only.

    TensorFlow's SAME does so where a stride of 2 divides the rows. Convolutions pad as torch's do,
    and the epsilon of BatchNorm is torch's 1e-5.
    """
    model: nn.Module = torchvision.models.resnet50(weights=None, num_classes=num_classes)
    model.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=0, ceil_mode=True)
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
    if arch == "tf_resnet50":
        raise ValueError("stem cifar leaves out the max-pool that tf_resnet50 is for: use resnet50")
    if not isinstance(model, torchvision.models.ResNet):
        raise ValueError(f"stem cifar has no effect on {arch}; only ResNets have such a stem")
    channels = model.conv1.out_channels
    model.conv1 = nn.Conv2d(3, channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
