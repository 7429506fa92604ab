"""The pytorch backend: torchvision's decoder and transforms in DataLoader workers."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
from collections.abc import Generator, Iterator, Sequence, Sized
from threading import Thread

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms import v2

from image_classification.data.config import DataConfig
from image_classification.data.crop import EXTRA, FLIP, crop_parameters, crop_windows
from image_classification.data.decode import UnreadableImageError, read_image
from image_classification.data.folder import ImageList
from image_classification.data.loader import BackendSpec
from image_classification.data.order import FloatArray, IntArray
from image_classification.data.resize import resize_crop, validation_crop
from image_classification.data.stage import Batch

Key = tuple[int, IntArray]
Loaded = tuple[Tensor, dict[int, str]]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PULSE = 1.0  # seconds between looks at whether the training process lives


class TorchvisionSource:
    """Read images with a DataLoader; what a batch holds does not depend on its workers."""

    def __init__(self, config: DataConfig, images: ImageList, *, training: bool) -> None:
        self._images = images
        self._labels = torch.from_numpy(images.labels)
        self._keys = _Keys()
        self._loader: DataLoader[Loaded] | None = DataLoader(
            _BatchDataset(config, images, training=training),
            sampler=self._keys,
            batch_size=None,  # the dataset is indexed by batches
            num_workers=config.workers,
            prefetch_factor=config.prefetch if config.workers else None,
            persistent_workers=config.workers > 0,
            pin_memory=config.device.type == "cuda",
            worker_init_fn=_leave_signals_to_parent,
            generator=torch.Generator(),  # leaves the generator of the training alone
        )

    def read(self, epoch: int, batches: Sequence[IntArray]) -> Generator[Batch, None, None]:
        """Yield the images of each batch of indices."""
        assert self._loader is not None
        if not batches:
            return
        self._keys.keys = [(epoch, indices) for indices in batches]
        with _forking():
            loaded = iter(self._loader)
        for indices, (images, bad) in zip(batches, loaded, strict=True):
            good = [index for index in indices.tolist() if index not in bad]
            bad_files = {self._images.path(index): reason for index, reason in bad.items()}
            yield Batch(images, self._labels[good], bad_files)

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


class _BatchDataset(Dataset[Loaded], Sized):
    """Load whole batches: `dataset[epoch, indices]` is uint8 [n, S, S, 3].

    With it come the indices that are missing because their files cannot be read, and the reasons:
    an error raised in a worker would cost the whole batch.
    """

    def __init__(self, config: DataConfig, images: ImageList, *, training: bool) -> None:
        self._images = images
        self._training = training
        self._seed = config.seed
        self._size = config.image_size
        self._shorter_side = config.shorter_side
        self._interpolation = config.interpolation
        self._policy = v2.AutoAugment() if training and config.augmentation else None

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, key: Key) -> Loaded:
        epoch, indices = key
        rows = crop_parameters(self._seed, epoch, indices) if self._training else indices
        loaded: list[Tensor] = []
        bad: dict[int, str] = {}
        for index, row in zip(indices.tolist(), rows, strict=True):
            try:
                image = read_image(self._images.path(index))
            except UnreadableImageError as error:
                bad[index] = str(error)
                continue
            image = self._train(image, row) if self._training else self._validate(image)
            loaded.append(image.permute(1, 2, 0))
        if not loaded:
            return torch.empty(0, self._size, self._size, 3, dtype=torch.uint8), bad
        # In a worker this stacks into shared memory at once.
        return default_collate(loaded), bad

    def _train(self, image: Tensor, row: FloatArray) -> Tensor:
        size = np.array([image.shape[1:]])
        ((top, left, height, width),) = crop_windows(size, row[None]).tolist()
        image = resize_crop(
            image[:, top : top + height, left : left + width],
            size=self._size,
            interpolation=self._interpolation,
            flip=bool(row[FLIP]),
        )
        return image if self._policy is None else self._augment(image, row[EXTRA])

    def _augment(self, image: Tensor, number: float) -> Tensor:
        assert self._policy is not None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(number * 2**53))
            augmented: Tensor = self._policy(image)
        return augmented

    def _validate(self, image: Tensor) -> Tensor:
        return validation_crop(
            image,
            size=self._size,
            shorter_side=self._shorter_side,
            interpolation=self._interpolation,
        )


@contextlib.contextmanager
def _forking() -> Iterator[None]:
    """Keep signals and finalizers of this process away from processes forked in this context.

    The finalizers are those of garbage of this process. For example, a DALI pipeline in a reference
    cycle would wait, in the forked process, for threads that do not exist there.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_parent(worker: int) -> None:
    """Make a worker ignore signals, except a SIGTERM of the training process.

    Launchers, schedulers and terminals send signals to every process, but only the training process
    decides when to stop. It ends its workers with a message, or if need be with SIGTERM.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # of the threads to come, too
    parent = multiprocessing.parent_process()
    assert parent is not None
    # If the training process has ended by now, getppid would tell who adopted the worker.
    is_served = multiprocessing.get_start_method() == "forkserver"
    forked_by = os.getppid() if is_served else parent.pid
    Thread(target=_obey, args=(parent.pid, forked_by), daemon=True).start()


def _obey(parent: int | None, forked_by: int | None) -> None:
    while os.getppid() == forked_by:  # an orphan gets another parent
        received = signal.sigtimedwait([signal.SIGTERM], _PULSE)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)


SPEC = BackendSpec(
    source=TorchvisionSource,
    refuses={
        "triangular": "needs a DALI backend: pass bilinear, which filters the same way, or"
        " --data-backend dali-cpu"
    },
)
