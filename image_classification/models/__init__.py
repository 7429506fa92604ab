"""Model architectures by name."""

from image_classification.models.factory import (
    NUM_CLASSES,
    OWN,
    STEMS,
    WIDTH,
    check_image_size,
    classifier,
    count_classes,
    create_model,
    default_image_size,
    names,
    with_width,
)
from image_classification.models.initialization import INITS
from image_classification.models.spec import ModelSpec

__all__ = [
    "INITS",
    "NUM_CLASSES",
    "OWN",
    "STEMS",
    "WIDTH",
    "ModelSpec",
    "check_image_size",
    "classifier",
    "count_classes",
    "create_model",
    "default_image_size",
    "names",
    "with_width",
]
