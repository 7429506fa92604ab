"""Wide residual networks for 32x32 images (Zagoruyko and Komodakis 2016, arXiv:1605.07146)."""

import functools

import torch.nn.functional as F
from torch import Tensor, nn

from image_classification.models.spec import ModelSpec


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution, twice, around a shortcut (basic-wide, figure 1c).

    Where shapes change, the shortcut is a 1x1 convolution of the first activation.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(activated)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return x + out


class WideResNet(nn.Module):
    """WRN-`depth`-`widen`: three stages of (depth - 4) / 6 blocks at 16, 32 and 64 times `widen`.

    Convolutions start from He's normal distribution over fan_out, as in the authors' code.

    Args:
        depth: Number of convolutions, the three of the shortcuts included; 6 n + 4.
        widen: Factor on the channels of the three stages.
        num_classes: Length of the output.
    """

    def __init__(self, *, depth: int, widen: int, num_classes: int) -> None:
        super().__init__()
        assert (depth - 4) % 6 == 0, f"depth {depth} is not 6 n + 4"
        blocks_per_stage = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        channels = 16
        stages = []
        for channels_out, stride in ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)):
            blocks = []
            for index in range(blocks_per_stage):
                block_stride = stride if index == 0 else 1
                blocks.append(PreActivationBlock(channels, channels_out, block_stride))
                channels = channels_out
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.BatchNorm2d(channels)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, 3, H, W)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = self.avgpool(F.relu(self.bn(x))).flatten(1)
        logits: Tensor = self.fc(x)
        return logits


WRN22_2 = ModelSpec(create=functools.partial(WideResNet, depth=22, widen=2), image_size=32)
