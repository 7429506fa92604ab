"""The pytorch backend: torchvision's decoder and transforms in DataLoader workers."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator, Sequence, Sized

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from image_classification.data.config import DataConfig
from image_classification.data.crop import EXTRA, FLIP, crop_parameters, crop_windows
from image_classification.data.decode import read_image
from image_classification.data.folder import ImageList
from image_classification.data.order import FloatArray, IntArray
from image_classification.data.resize import resize_crop
from image_classification.data.stage import Batch

Key = tuple[int, IntArray]


class TorchvisionSource:
    """Read images with a DataLoader; what a batch holds does not depend on its workers."""

    def __init__(self, config: DataConfig, images: ImageList, *, training: bool) -> None:
        self._labels = torch.from_numpy(images.labels)
        self._keys = _Keys()
        self._loader: DataLoader[Tensor | ValueError] | None = DataLoader(
            _BatchDataset(config, images, training=training),
            sampler=self._keys,
            batch_size=None,  # the dataset is indexed by batches
            num_workers=config.workers,
            prefetch_factor=config.prefetch if config.workers else None,
            persistent_workers=config.workers > 0,
            pin_memory=config.device.type == "cuda",
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # leaves the generator of the training alone
        )

    def read(self, epoch: int, batches: Sequence[IntArray]) -> Generator[Batch, None, None]:
        """Yield the images of each batch of indices."""
        assert self._loader is not None
        if not batches:
            return
        self._keys.keys = [(epoch, indices) for indices in batches]
        for indices, images in zip(batches, self._loader, strict=True):
            if isinstance(images, ValueError):
                raise images
            yield images, self._labels[torch.from_numpy(indices)]

    def close(self) -> None:
        """Stop the workers, which end with the iterator that the DataLoader keeps."""
        self._loader = None


class _Keys(Sampler[Key]):
    """Say which batches the DataLoader is to load in the coming epoch."""

    def __init__(self) -> None:
        self.keys: list[Key] = []

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class _BatchDataset(Dataset[Tensor | ValueError], Sized):
    """Load whole batches: `dataset[epoch, indices]` is uint8 [n, S, S, 3].

    An image that cannot be read makes the batch a ValueError instead: raised in a worker it would
    arrive wrapped in the traceback of that process.
    """

    def __init__(self, config: DataConfig, images: ImageList, *, training: bool) -> None:
        self._images = images
        self._training = training
        self._seed = config.seed
        self._size = config.image_size
        self._shorter_side = config.shorter_side
        self._interpolation = v2.InterpolationMode(config.interpolation)
        self._policy = v2.AutoAugment() if training and config.augmentation else None

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, key: Key) -> Tensor | ValueError:
        epoch, indices = key
        try:
            if self._training:
                rows = crop_parameters(self._seed, epoch, indices)
                loaded = [self._train(i, row) for i, row in zip(indices, rows, strict=True)]
            else:
                loaded = [self._validate(i) for i in indices]
        except ValueError as error:
            return error
        # In a worker this stacks into shared memory at once.
        batch: Tensor = default_collate([image.permute(1, 2, 0) for image in loaded])
        return batch

    def _train(self, index: int, row: FloatArray) -> Tensor:
        image = read_image(self._images.path(index))
        size = np.array([image.shape[1:]])
        ((top, left, height, width),) = crop_windows(size, row[None]).tolist()
        image = resize_crop(
            image[:, top : top + height, left : left + width],
            size=self._size,
            interpolation=self._interpolation.value,
            flip=bool(row[FLIP]),
        )
        return image if self._policy is None else self._augment(image, row[EXTRA])

    def _augment(self, image: Tensor, number: float) -> Tensor:
        assert self._policy is not None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(number * 2**53))
            augmented: Tensor = self._policy(image)
        return augmented

    def _validate(self, index: int) -> Tensor:
        image = self._resize(read_image(self._images.path(index)), [self._shorter_side])
        cropped: Tensor = F.center_crop(image, [self._size, self._size])
        return cropped

    def _resize(self, image: Tensor, size: list[int]) -> Tensor:
        resized: Tensor = F.resize(image, size, interpolation=self._interpolation, antialias=True)
        return resized


def _ignore_signals(worker: int) -> None:
    # A terminal signals all processes; the training process decides when to stop.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
