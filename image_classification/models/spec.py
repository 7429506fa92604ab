"""What the trainer knows of a model of its own."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


def _takes_any_size(image_size: int) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model that `--arch` can name, besides those of torchvision."""

    create: Callable[..., nn.Module]
    """Called with num_classes, and with width if the model has one, by keyword."""
    image_size: int
    """Side in pixels of the square images that the model was designed for."""
    has_width: bool = False
    """Whether --width has an effect on the model."""
    size_fault: Callable[[int], str | None] = _takes_any_size
    """Returns why the model takes no images of a size; a size with which it fails needs none."""
    stem_fault: str | None = None
    """Why a ResNet of ours does not take --stem cifar."""
