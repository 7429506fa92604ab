"""ResNet-50 as the RigL repository trained it."""

import torchvision
from torch import nn

from image_classification.models.spec import ModelSpec


def create(num_classes: int) -> nn.Module:
    """Return torchvision's ResNet-50 with TensorFlow's max-pooling, which pads at the end only.

    TensorFlow's SAME does so where a stride of 2 divides the rows. Convolutions pad as torch's do,
    and the epsilon of BatchNorm is torch's 1e-5.
    """
    model: nn.Module = torchvision.models.resnet50(weights=None, num_classes=num_classes)
    model.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=0, ceil_mode=True)
    return model


def size_fault(image_size: int) -> str | None:
    """Return why images of this size are not padded as TensorFlow pads them."""
    if image_size % 4 in (1, 2):
        return "TensorFlow pads other sizes than multiples of 4 in another way"
    return None


SPEC = ModelSpec(
    create=create,
    image_size=224,
    size_fault=size_fault,
    stem_fault="stem cifar leaves out the max-pool that tf_resnet50 is for: use resnet50",
)
