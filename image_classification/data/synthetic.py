"""Random images, to run without data and to time training without loading."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from image_classification.data.config import DataConfig
from image_classification.data.loader import BackendSpec
from image_classification.data.order import IntArray
from image_classification.data.stage import Batch


class SyntheticSource:
    """Hand out one batch of random pixels and random targets again and again."""

    def __init__(self, config: DataConfig) -> None:
        # Ranks differ as they do on real images.
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + config.rank)
        size = config.image_size
        shape = (config.batch_size, size, size, 3)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        targets = torch.randint(0, config.num_classes, shape[:1], generator=generator)
        self._images, self._targets = images.to(config.device), targets.to(config.device)

    def read(self, epoch: int, batches: Sequence[IntArray]) -> Generator[Batch, None, None]:
        """Yield the batch once for each batch of indices."""
        for indices in batches:
            yield Batch(self._images[: len(indices)], self._targets[: len(indices)], {})

    def close(self) -> None:
        """Do nothing: there is nothing to stop."""


SPEC = BackendSpec(source=SyntheticSource, reads_images=False)
