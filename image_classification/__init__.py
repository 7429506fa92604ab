"""The image-classification harness: data, models, trainer, checkpoints and logging."""
