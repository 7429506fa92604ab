"""Images: data directories, and loaders that hand out normalized batches on the device."""

from __future__ import annotations

from image_classification.data.backends import BACKENDS, check_backend
from image_classification.data.bad_files import BadFiles, DataError, share_bad_files
from image_classification.data.config import (
    AUGMENTATIONS,
    INTERPOLATIONS,
    RANGES,
    DataConfig,
    Loader,
)
from image_classification.data.folder import (
    DatasetInfo,
    check_num_classes,
    inspect_dataset,
    list_images,
)
from image_classification.data.loader import BackendSpec, EpochLoader, Source
from image_classification.data.order import BatchPlan
from image_classification.data.stage import DeviceStage

__all__ = [
    "AUGMENTATIONS",
    "BACKENDS",
    "INTERPOLATIONS",
    "RANGES",
    "BackendSpec",
    "DataConfig",
    "DataError",
    "DatasetInfo",
    "Loader",
    "Source",
    "check_backend",
    "create_train_loader",
    "create_val_loader",
    "inspect_dataset",
    "share_bad_files",
]


def create_train_loader(config: DataConfig) -> Loader:
    """Return the training batches of this rank.

    Each epoch is a new permutation of all images, the same on all ranks, which share it out; the
    images that do not fill a batch on every rank are left out of that epoch. Random resized crop
    and horizontal flip; synthetic batches are the same each time.

    Raises:
        ValueError: The directory does not fit, there are too few images for one batch, or the
            backend is not available.
    """
    return _create(config, training=True)


def create_val_loader(config: DataConfig) -> Loader:
    """Return the validation batches of this rank.

    Every image comes once, on one rank, in the order of the directory: the last batch may be
    short, and with fewer images than ranks a rank has no batch at all. Resize and center crop.

    Raises:
        ValueError: The directory does not fit, or the backend is not available.
    """
    return _create(config, training=False)


def _create(config: DataConfig, *, training: bool) -> Loader:
    source: Source
    skipped: dict[str, str] = {}
    backend = BACKENDS[config.backend]
    if not backend.reads_images:
        source = backend.source(config)
        num_samples = config.synthetic_length * config.batch_size * config.world_size
    else:
        assert config.path is not None
        split = "train" if training else "val"
        images = list_images(config.path, split)
        check_num_classes(config.path / split, images.classes, config.num_classes)
        num_samples, skipped = len(images), images.skipped
        source = backend.source(config, images, training=training)
    plan = BatchPlan(
        num_samples=num_samples,
        batch_size=config.batch_size,
        rank=config.rank,
        world_size=config.world_size,
        seed=config.seed,
        training=training,
    )
    if training and not len(plan):
        raise ValueError(
            f"--batch-size {config.batch_size} on {config.world_size} processes needs"
            f" {plan.global_batch} images, {config.path}/train has {num_samples}: pass a smaller"
            " batch size"
        )
    stage = DeviceStage(
        device=config.device, memory_format=config.memory_format, image_size=config.image_size
    )
    bad_files = BadFiles(
        config.path and config.path / ("train" if training else "val"),
        num_files=num_samples,
        limit=config.max_bad_files,
        found=skipped,
    )
    return EpochLoader(plan, source, stage, bad_files)
