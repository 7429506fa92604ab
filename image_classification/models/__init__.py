"""Model architectures by name."""

from image_classification.models.factory import ARCHES, create_model, default_image_size

__all__ = ["ARCHES", "create_model", "default_image_size"]
