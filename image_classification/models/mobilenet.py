"""MobileNet-v1 (Howard et al. 2017, arXiv:1704.04861)."""

from torch import Tensor, nn

from image_classification.models.initialization import truncated_fan_in_
from image_classification.models.spec import ModelSpec

# Table 1 of the paper: (channels out, stride) of the 13 depthwise separable blocks.
BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)


class SeparableBlock(nn.Module):
    """A 3x3 depthwise and a 1x1 pointwise convolution, each with BatchNorm and ReLU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(
            channels_in, channels_in, 3, stride, padding=1, groups=channels_in, bias=False
        )
        self.dw_bn = nn.BatchNorm2d(channels_in)
        self.pw = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.pw_bn = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.dw_bn(self.dw(x)))
        out: Tensor = self.relu(self.pw_bn(self.pw(x)))
        return out


class MobileNetV1(nn.Module):
    """MobileNet-v1 with a width multiplier: conv1, 13 separable blocks, average pool, fc.

    At width 1 and 1000 classes the 28 kernels hold 4,209,088 weights, as in the graph that the
    RigL results were trained with (Evci et al. 2020). Initialization follows it too: convolutions
    and fc with variance 1 / fan_in, depthwise kernels Glorot-uniform, BatchNorm scales 1.
    """

    def __init__(self, num_classes: int, width: float) -> None:
        super().__init__()
        channels = scale_channels(32, width)
        self.conv1 = nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        blocks = []
        for channels_out, stride in BLOCKS:
            blocks.append(SeparableBlock(channels, scale_channels(channels_out, width), stride))
            channels = scale_channels(channels_out, width)
        self.blocks = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                truncated_fan_in_(module.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, 3, H, W)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.avgpool(self.blocks(x)).flatten(1)
        logits: Tensor = self.fc(x)
        return logits


def scale_channels(channels: int, width: float) -> int:
    """Return `width * channels` rounded to the nearest multiple of 8 (halves up), at least 8.

    Deviations: the paper does not round; multiples of 8 are what tensor cores need. The widths it
    reports (1, 0.75, 0.5, 0.25) give its own channel counts.
    """
    return max(8, int(channels * width / 8 + 0.5) * 8)


SPEC = ModelSpec(create=MobileNetV1, image_size=224, has_width=True)
