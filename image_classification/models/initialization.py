"""Weight initialization that does not depend on the architecture."""

import math
from typing import Literal

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

INITS = ("torchvision", "classic", "fanin")


def init_convolutions(model: nn.Module, mode: Literal["fan_in", "fan_out"]) -> int:
    """Redraw every convolution from Kaiming's normal distribution and reset every BatchNorm.

    The weights of a convolution get the standard deviation sqrt(2 / fan) of He et al. 2015
    (arXiv:1502.01852, eq. 10 and 14), the gain being that of ReLU; BatchNorm scales become 1 and
    shifts 0. Linear layers and biases of convolutions keep what they have.

    Args:
        model: Changed in place; parameters may be on any device, "meta" included.
        mode: The fan that the variance is divided by.

    Returns:
        The number of convolutions found; with 0 there was nothing to redraw.
    """
    num_convolutions = 0
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            num_convolutions += 1
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    return num_convolutions


def zero_last_batchnorms(model: nn.Module) -> int:
    """Set the scale of the last BatchNorm of every residual block to 0 (arXiv:1706.02677, 5.1).

    Returns:
        The number of blocks found; only torchvision's ResNet blocks have such a last BatchNorm.
    """
    num_blocks = 0
    for module in model.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            last = module.bn2 if isinstance(module, BasicBlock) else module.bn3
            nn.init.zeros_(last.weight)
            num_blocks += 1
    return num_blocks


def truncated_fan_in_(weight: Tensor) -> None:
    """Fill `weight` from a normal distribution cut at two deviations, of variance 1 / fan_in.

    The deviation before the cut is 1 / 0.8796 times larger, so that the result has the stated one:
    the "variance scaling" of TensorFlow at scale 1 (half the variance of He's).
    """
    fan_in = weight[0].numel()
    std = 1 / (math.sqrt(fan_in) * _STD_OF_CUT_NORMAL)
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


# Standard deviation of a standard normal distribution cut at -2 and 2.
_STD_OF_CUT_NORMAL = math.sqrt(
    1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2))
)
