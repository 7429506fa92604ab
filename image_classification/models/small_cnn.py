"""A small convolutional network for demonstrations on images of 8x8 to 32x32 pixels."""

from torch import Tensor, nn

from image_classification.models.spec import ModelSpec

# (channels out, stride) of the 3x3 convolutions
CONVOLUTIONS = ((32, 1), (64, 2), (64, 1), (128, 2))


class SmallCNN(nn.Module):
    """Four 3x3 convolutions, each with BatchNorm and ReLU, average pool, fc.

    131,168 kernel weights with 10 classes and, at 32x32, 19.7 million multiply-adds per image:
    an epoch over a thousand images takes a few seconds on one CPU core.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        channels = 3
        layers: list[nn.Module] = []
        for channels_out, stride in CONVOLUTIONS:
            conv = nn.Conv2d(channels, channels_out, 3, stride, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers += [conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)]
            channels = channels_out
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, 3, H, W)."""
        logits: Tensor = self.fc(self.avgpool(self.features(x)).flatten(1))
        return logits


SPEC = ModelSpec(create=SmallCNN, image_size=32)
