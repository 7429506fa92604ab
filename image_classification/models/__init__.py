"""Model architectures by name."""

from image_classification.models.factory import (
    ARCHES,
    check_image_size,
    classifier,
    count_classes,
    create_model,
    default_image_size,
)

__all__ = [
    "ARCHES",
    "check_image_size",
    "classifier",
    "count_classes",
    "create_model",
    "default_image_size",
]
