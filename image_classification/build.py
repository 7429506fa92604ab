"""From flags to a run that is ready to start: data, model, optimizer, trainer, resume."""

import dataclasses
import random
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from image_classification import (
    checkpoint,
    data,
    distributed,
    models,
    optim,
    optimizers,
    sharding,
    weights,
)
from image_classification.config import Config, Steps, create_schedule, cut
from image_classification.distributed import World
from image_classification.log import Logger
from image_classification.run import Extension, Run
from image_classification.trainer import Precision, Trainer
from image_classification.weights import Weights

IMAGENET = data.DatasetInfo(num_train=1_281_167, num_val=50_000, classes=())

Attach = Callable[[nn.Module, Optimizer, int, int], Extension]
"""Joins something to (model, optimizer, total steps, seed) before training starts."""

ReadWeights = Callable[[Path], Weights]
"""Returns the weights in a file; raises ValueError (one line) where it cannot."""


def inspect(config: Config) -> data.DatasetInfo:
    """Return the facts of DATA; those of ImageNet-1k where a dry run has none."""
    if not data.BACKENDS[config.data_backend].reads_images:
        images = config.synthetic_batches * config.batch_size
        images *= distributed.world_from_env().world_size
        return data.DatasetInfo(num_train=images, num_val=images, classes=())
    if config.dry_run and (config.data is None or not Path(config.data).is_dir()):
        return IMAGENET
    assert config.data is not None
    return data.inspect_dataset(
        Path(config.data),
        num_classes=config.num_classes,
        training=not config.evaluate,
        validation=not config.training_only,
    )


def plan(config: Config, dataset: data.DatasetInfo, *, world_size: int) -> dict[str, Any]:
    """Return what the run would be, without touching data or a device."""
    steps = cut(config, num_train=dataset.num_train, world_size=world_size)
    settings = optimizers.OPTIMIZERS[config.optimizer].settings
    return {
        "arch": config.arch,
        "epochs": config.epochs,
        "steps_per_epoch": steps.steps_per_epoch,
        "total_steps": config.epochs * steps.steps_per_epoch,
        "optimizer_batch_size": steps.optimizer_batch_size,
        "accumulation": steps.accumulation,
        "optimizer": config.optimizer,
        "lr": config.lr,
        "lr_schedule": config.lr_schedule,
        "lr_milestones": config.lr_milestones if config.lr_schedule == "step" else None,
        "lr_per_step": config.lr_per_step,
        "lr_restarts": config.lr_restarts or None,
        "warmup_epochs": config.warmup,
        "momentum": config.momentum if "momentum" in settings else None,
        "nesterov": config.nesterov,
        "weight_decay": config.weight_decay,
        "label_smoothing": config.label_smoothing,
        "mixup": config.mixup,
        "precision": _precision_name(config),
        "image_size": image_size(config),
        "world_size": world_size,
    }


def image_size(config: Config) -> int:
    """Return the side of the network's input."""
    return config.image_size or models.default_image_size(config.arch)


def num_classes(config: Config, dataset: data.DatasetInfo) -> int:
    """Return the classes of the network: as told, else those of the data, else ImageNet's 1000."""
    return config.num_classes or len(dataset.classes) or 1000


def adopt(config: Config) -> Config:
    """Return the flags with the network and its image size as the checkpoint has them.

    For --evaluate, where the flags do not name them.
    """
    named = config.arch != Config().arch
    if not config.evaluate or (named and config.image_size is not None):
        return config
    path, _ = _find_checkpoint(config)
    state = checkpoint.load(path) if path else {}
    arch = config.arch if named else state.get("arch") or config.arch
    size = config.image_size
    if size is None and arch == state.get("arch"):
        size = state.get("config", {}).get("image_size")
    return dataclasses.replace(config, arch=arch, image_size=size)


def sketch_model(config: Config, dataset: data.DatasetInfo) -> nn.Module:
    """Return the network of the flags on the meta device.

    Raises:
        ValueError: One line: it does not exist, or takes no images of their size.
    """
    with torch.device("meta"):
        model = create_model(config, dataset)
    models.check_image_size(model, config.arch, image_size(config))
    return model


def create_model(config: Config, dataset: data.DatasetInfo) -> nn.Module:
    """Return the network of the flags, on the default device."""
    return models.create_model(
        config.arch,
        num_classes=num_classes(config, dataset),
        init=config.model_config,
        zero_gamma=config.last_bn_0_init,
        stem=config.stem,
        width=config.width,
    )


@dataclass(frozen=True)
class Start:
    """Where a run begins: a checkpoint that was read and fits, or none."""

    steps: Steps
    path: Path | None = None
    state: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    pretrained: Mapping[str, Any] = field(default_factory=dict)
    """What --pretrained-from-file holds: `state_dict`, without the last layer where --new-head says
    so, and all other entries as they are."""
    notes: tuple[str, ...] = ()
    """What the log should say of the files."""


def prepare(
    config: Config,
    dataset: data.DatasetInfo,
    model: nn.Module,
    *,
    read_weights: ReadWeights = weights.read,
) -> Start:
    """Check all that can be checked before a process group or a device is started.

    Args:
        config: The flags.
        dataset: The facts of DATA.
        model: The network of the flags; on the meta device it is enough.
        read_weights: Reads --pretrained-from-file.

    Raises:
        ValueError: One line: the processes do not divide the batch, or the checkpoint is missing,
            damaged or of another network.
    """
    path, warnings = _find_checkpoint(config)
    state: Mapping[str, Any] = checkpoint.load(path) if path else {}
    if path and not config.evaluate and state.get("arch") != config.arch:
        raise ValueError(f"{path} holds {state.get('arch')}, --arch is {config.arch}")
    if path:
        checkpoint.check({"state_dict": model}, state, path)
    if path and not config.evaluate:
        _check_resume(config, model, state, path)
    pretrained: Mapping[str, Any] = {}
    notes = _evaluation_notes(config, path, state) if path and config.evaluate else ()
    if config.pretrained_from_file:
        pretrained, notes = _read_pretrained(config, model, read_weights)
    world_size = distributed.world_from_env().world_size
    kept_batch = state.get("optimizer_batch_size")
    steps = cut(config, num_train=dataset.num_train, world_size=world_size, kept_batch=kept_batch)
    return Start(steps, path, state, warnings, pretrained, notes)


def _evaluation_notes(config: Config, path: Path, state: Mapping[str, Any]) -> tuple[str, ...]:
    """Say in what an evaluation departs from the training of its checkpoint."""
    notes = [f"{path} holds {state.get('arch')}, evaluated as {config.arch}"]
    trained = (state.get("config") or {}).get("interpolation", config.interpolation)
    reads_images = data.BACKENDS[config.data_backend].reads_images
    if trained != config.interpolation and reads_images:
        notes.append(
            f"{path} was trained with --interpolation {trained}, "
            f"images are resized with {config.interpolation}"
        )
    return tuple(notes if state.get("arch") != config.arch else notes[1:])


def _read_pretrained(
    config: Config, model: nn.Module, read_weights: ReadWeights
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Return what --pretrained-from-file holds for `model`, and what was left out of it."""
    source = Path(str(config.pretrained_from_file))
    found = read_weights(source)
    head = models.classifier(model)
    own = model.state_dict()
    kernel = f"{head}.weight"
    theirs = len(found.state_dict.get(kernel, own[kernel]))
    if theirs != len(own[kernel]) and not config.new_head:
        raise ValueError(
            f"{source} has {theirs} classes, the network {len(own[kernel])}: "
            f"--new-head leaves its {head} out and starts a new one"
        )
    new_layer = head if config.new_head else ""
    try:
        fitted = weights.fit(found.state_dict, own, config.arch, new_layer=new_layer)
    except ValueError as error:
        raise ValueError(f"{source} does not fit --arch {config.arch}: {error}") from error
    left = [f"its averaged weights ({name})" for name in found.left]
    left += [name for name in found.state_dict if name not in fitted]
    entry = "" if found.entry is None else f", entry '{found.entry}'"
    notes = [
        f"starting from {source}{entry}: {len(fitted)} of the {len(own)} tensors of the network; "
        f"left out: {', '.join(left) or 'nothing'}"
    ]
    if found.arch not in (None, config.arch):
        notes.append(f"{source} holds {found.arch}, its weights fit {config.arch} and are taken")
    return {**found.rest, "state_dict": fitted}, tuple(notes)


def _check_resume(config: Config, model: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Check that a run can take from a checkpoint what it needs besides the weights."""
    if state.get("optimizer") is None:
        raise ValueError(
            f"{path} holds weights alone, which cannot be resumed: start from them with "
            f"--pretrained-from-file {path}"
        )
    trained = str(state.get("config", {}).get("optimizer", config.optimizer))
    if _equivalent(trained) != _equivalent(config.optimizer):
        raise ValueError(
            f"{path} was trained with --optimizer {trained}, not {config.optimizer}: repeat it, or "
            "start from the weights alone with --pretrained-from-file"
        )
    parts: dict[str, Any] = {"optimizer": stand_in_optimizer(config, model)}
    if config.use_ema is not None:
        if state.get("ema") is None:
            raise ValueError(f"{path} has no averaged weights to go on with: leave --use-ema out")
        parts["ema"] = optim.create_ema(model, config.use_ema)
    checkpoint.check(parts, state, path)


def stand_in_optimizer(config: Config, model: nn.Module) -> Optimizer:
    """Return an optimizer to try things out with, on the CPU or the meta device."""
    config = dataclasses.replace(config, optimizer=_equivalent(config.optimizer))
    return create_optimizer(config, model, next(model.parameters()).device)


def _equivalent(optimizer: str) -> str:
    """Return an optimizer with the same state that needs no GPU to exist."""
    spec = optimizers.OPTIMIZERS.get(optimizer)
    return optimizer if spec is None else spec.equivalent or optimizer


def create_optimizer(config: Config, model: nn.Module, device: torch.device) -> Optimizer:
    """Return the optimizer of the flags for a model on `device`."""
    groups = optimizers.parameter_groups(
        model, weight_decay=config.weight_decay, bn_weight_decay=config.bn_weight_decay
    )
    settings = optimizers.OPTIMIZERS[config.optimizer].settings
    return optimizers.create_optimizer(
        config.optimizer,
        groups,
        lr=config.lr,
        weight_decay=config.weight_decay,
        device=device,
        **{name: getattr(config, name) for name in settings},
    )


def build(
    config: Config,
    dataset: data.DatasetInfo,
    start: Start,
    *,
    world: World,
    logger: Logger,
    attach: Attach,
) -> Run:
    """Return the run of the flags; `attach` may join something to its model and optimizer.

    Raises:
        ValueError: One line: a file that is missing, damaged or does not fit, or ranks that begin
            at different checkpoints.
    """
    _announce(config, start, logger)
    seed = _choose_seed(config, start.state)
    logger.parameters({"seed": seed})
    _seed_generators(seed)  # the same on all ranks: they start from one network
    _set_backends(config)
    model = create_model(config, dataset).to(world.device)
    model = model.to(memory_format=_memory_format(config))
    if config.pretrained_from_file:
        # `prepare` compared the names; only a new head may be missing here
        model.load_state_dict(start.pretrained["state_dict"], strict=False)
    ema = optim.create_ema(model, config.use_ema) if config.use_ema else None
    if config.fsdp and world.world_size > 1:
        for network in [model] if ema is None else [model, ema.module]:
            sharding.shard(network, _amp_dtype(config))
    steps = start.steps
    optimizer = create_optimizer(config, model, world.device)
    extension = attach(model, optimizer, config.epochs * steps.steps_per_epoch, seed)
    loading = _data_config(config, dataset, world, seed, steps.batch_size)
    run = Run(
        config,
        _create_trainer(
            config, model, ema, optimizer, extension, steps, world, num_classes(config, dataset)
        ),
        train_loader=None if config.evaluate else data.create_train_loader(loading),
        val_loader=None if config.training_only else data.create_val_loader(loading),
        steps_per_epoch=steps.steps_per_epoch,
        optimizer_batch_size=steps.optimizer_batch_size,
        logger=logger,
        extension=extension,
        seed=seed,
    )
    _seed_generators(seed + 1 + world.rank)  # MixUp and dropout differ between ranks
    if start.path and config.evaluate:
        run.load_weights(start.path, start.state)
    elif start.path:
        run.resume(start.path, start.state)
    return run


def _find_checkpoint(config: Config) -> tuple[Path | None, tuple[str, ...]]:
    if config.resume is None:
        return None, ()
    if config.resume != "auto":
        return Path(config.resume), ()
    found = checkpoint.find(Path(config.workspace), config.checkpoint_filename)
    return found.path, found.warnings


def _announce(config: Config, start: Start, logger: Logger) -> None:
    """Say where the run begins, on which all ranks must agree."""
    for warning in start.warnings:
        logger.warning(warning)
    for note in start.notes:
        logger.message(note)
    if start.path:
        logger.message(f"loading {start.path}")
    elif config.resume:
        logger.message(f"no checkpoint in {config.workspace}: starting at epoch 0")
    elif config.evaluate and not config.pretrained_from_file:
        logger.warning("--evaluate without --resume: the weights are random")
    elif not config.evaluate and config.save_checkpoints:
        earlier = checkpoint.newest(Path(config.workspace), config.checkpoint_filename)
        if earlier is not None:
            logger.warning(
                f"{earlier} is of an earlier run: this run replaces such files, and until it has, "
                "--resume auto goes on with the earlier run"
            )
    steps = start.steps
    if steps.batch_size != config.batch_size:
        logger.message(
            f"{steps.optimizer_batch_size} images per optimizer step are kept with micro-batches "
            f"of {steps.batch_size}"
        )
    begins = distributed.all_gather_object((str(start.path), start.state.get("step")))
    for rank, begin in enumerate(begins):
        if begin != begins[0]:
            raise ValueError(
                f"rank 0 begins at checkpoint {begins[0][0]} (step {begins[0][1]}), rank {rank} at "
                f"{begin[0]} (step {begin[1]}): put --workspace on a disk that all nodes share"
            )


def _choose_seed(config: Config, state: Mapping[str, Any]) -> int:
    """Return --seed, else the checkpoint's, else a fresh one that all ranks share."""
    for seed in (config.seed, state.get("seed")):
        if seed is not None:
            return int(seed)
    return distributed.broadcast_object(secrets.randbits(31))


def _seed_generators(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _set_backends(config: Config) -> None:
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.backends.cudnn.deterministic = config.deterministic
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
    precision = "tf32" if config.tf32 else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]


def _memory_format(config: Config) -> torch.memory_format:
    return torch.channels_last if config.memory_format == "nhwc" else torch.contiguous_format


def _precision_name(config: Config) -> str:
    if config.amp:
        return config.amp_dtype
    return "tf32" if config.tf32 else "float32"


def _amp_dtype(config: Config) -> torch.dtype | None:
    """Return the type of mixed precision, None without --amp."""
    types = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    return types[config.amp_dtype] if config.amp else None


def _create_trainer(
    config: Config,
    model: nn.Module,
    ema: AveragedModel | None,
    optimizer: Optimizer,
    extension: Extension,
    steps: Steps,
    world: World,
    classes: int,
) -> Trainer:
    scale = 65536.0 if config.dynamic_loss_scale else config.static_loss_scale
    return Trainer(
        model,
        optimizer,
        create_schedule(config, steps_per_epoch=steps.steps_per_epoch),
        optim.create_loss(config.label_smoothing),
        world=world,
        precision=Precision(_amp_dtype(config), scale),
        accumulation=steps.accumulation,
        ema=ema,
        prepare_ema=extension.prepare_ema,
        max_bad_steps=config.max_bad_steps,
        mixup=optim.mixup(config.mixup, classes) if config.mixup else None,
        compiled=config.compile,
        prepare_ddp=extension.prepare_ddp,
    )


def _data_config(
    config: Config, dataset: data.DatasetInfo, world: World, seed: int, batch_size: int
) -> data.DataConfig:
    return data.DataConfig(
        path=Path(config.data) if config.data is not None else None,
        backend=config.data_backend,
        image_size=image_size(config),
        interpolation=config.interpolation,
        batch_size=batch_size,
        workers=config.workers,
        prefetch=config.prefetch,
        seed=seed,
        rank=world.rank,
        world_size=world.world_size,
        device=world.device,
        memory_format=_memory_format(config),
        num_classes=num_classes(config, dataset),
        augmentation=config.augmentation,
        synthetic_length=config.synthetic_batches,
        max_bad_files=config.max_bad_files,
    )
