"""Flags of the trainer: one frozen dataclass, the parser made from it, and the checks on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from image_classification import checkpoint, data, flags, models, optim
from image_classification.data import AUGMENTATIONS, BACKENDS, INTERPOLATIONS, check_backend
from image_classification.flags import argument, flag, ineffective, spelling
from image_classification.optimizers import (
    OPTIMIZERS,
    WEIGHT_DECAY,
    describe_optimizers,
    describe_setting,
    users,
)
from image_classification.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, Range
from image_classification.trackers import TRACKERS, require

ConsoleFormat = Literal["auto", "summary", "dllogger"]
"""What a run prints; auto is summary on a terminal and dllogger elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything the trainer can be told; names and defaults follow NVIDIA's ConvNets harness."""

    data: str | None = argument("directory with train/ and val/", None, metavar="DATA")

    # data
    data_backend: str = flag("dali-cpu", "where images are decoded and augmented", choices=BACKENDS)
    interpolation: str = flag(
        "bilinear",
        "resampling filter; triangular exists with DALI only; tensorflow is RigL's: bicubic, not "
        "antialiased, and validation crops before it resizes",
        choices=INTERPOLATIONS,
    )
    augmentation: str | None = flag(None, "extra training augmentation", choices=AUGMENTATIONS)
    image_size: int | None = flag(None, "side of the square input; the model's own by default")
    workers: int = flag(5, "loader workers or DALI threads per process", "-j")
    prefetch: int = flag(2, "batches prepared ahead, per worker (pytorch) or per process (DALI)")
    max_bad_files: float = flag(
        0.001, "share of the images of a split that may be unreadable; they are left out"
    )
    synthetic_batches: int = flag(100, "batches per epoch and process of the synthetic backend")

    # model
    arch: str = flag(
        "resnet50",
        f"model: a torchvision name, {', '.join(models.OWN)}; --evaluate: by default what the "
        "checkpoint holds",
        "-a",
    )
    num_classes: int | None = flag(
        None, "classes of the network; those of DATA by default, else 1000", "--num_classes"
    )
    model_config: str = flag(
        "torchvision", "initialization: NVIDIA's classic (fan-out) or fanin, or the model's own",
        "-c", "--init", choices=models.INITS,
    )  # fmt: skip
    last_bn_0_init: bool = flag(
        False, "start the last BatchNorm scale of each residual block at zero",
        "--last_bn_0_init", "--zero-gamma",
    )  # fmt: skip
    stem: str = flag("imagenet", "cifar: 3x3 first layer, no max-pool", choices=models.STEMS)
    width: float = flag(1.0, f"width multiplier of {' or '.join(models.with_width())}")
    pretrained_from_file: str | None = flag(
        None, "file of weights that training starts from: ours, or one that convert reads",
        "--pretrained-weights",
    )  # fmt: skip
    new_head: bool = flag(
        False, "leave the last layer of --pretrained-from-file out: for other classes"
    )

    # schedule
    epochs: int = flag(90, "epochs of the whole run")
    run_epochs: int = flag(-1, "stop after this many epochs of this invocation; -1: run them all")
    early_stopping_patience: int = flag(-1, "stop after this many epochs without a better top-1")
    batch_size: int = flag(256, "images per process and micro-batch", "-b")
    optimizer_batch_size: int = flag(
        -1, "images per optimizer step over all processes, reached by accumulation; -1: no more"
    )
    lr: float = flag(0.1, "peak learning rate", "--learning-rate")
    lr_schedule: optim.LrKind = flag("step", "shape of the learning rate")
    lr_milestones: list[float] = flag(
        [30.0, 60.0, 80.0], "epochs at which the step schedule decays", nargs="+"
    )
    lr_gamma: float = flag(0.1, "factor of the step schedule")
    lr_per_step: bool = flag(False, "change the learning rate every step, not every epoch")
    lr_restarts: list[float] = flag(
        [], "epochs at which schedule and warm-up begin anew, until the next of them", nargs="*"
    )
    end_lr: float = flag(0.0, "floor of the cosine schedule")
    warmup: float = flag(0.0, "epochs of linear warm-up", "--warmup-epochs")

    # optimizer and loss
    optimizer: str = flag("sgd", describe_optimizers(), choices=OPTIMIZERS)
    momentum: float = flag(0.9, describe_setting("momentum"), "--mom")
    nesterov: bool = flag(False, describe_setting("nesterov"))
    weight_decay: float = flag(1e-4, "weight decay; never on biases", "--wd")
    bn_weight_decay: bool = flag(False, "decay normalization layers too", "--bn-wd")
    rmsprop_alpha: float = flag(0.9, describe_setting("rmsprop_alpha"))
    rmsprop_eps: float = flag(1e-3, describe_setting("rmsprop_eps"))
    label_smoothing: float = flag(0.0, "probability mass spread over all classes, in [0, 1)")
    mixup: float = flag(0.0, "alpha of MixUp's Beta distribution; 0: no MixUp")
    use_ema: float | None = flag(None, "decay of the averaged weights; evaluated and saved too")

    # precision and speed
    amp: bool = flag(False, "mixed precision")
    amp_dtype: Literal["float16", "bfloat16"] = flag("float16", "type of mixed precision")
    static_loss_scale: float = flag(1.0, "first loss scale of float16; it adapts from there")
    dynamic_loss_scale: bool = flag(False, "first loss scale 65536 in place of the above")
    tf32: bool = flag(False, "TensorFloat-32 matrix products and convolutions on CUDA")
    fast: bool = flag(
        False,
        "what is fast on a GPU, unless other flags say otherwise: --amp, --dynamic-loss-scale, "
        "--tf32, --memory-format nhwc, and --data-backend dali-gpu where DALI finds a GPU",
    )
    memory_format: Literal["nchw", "nhwc"] = flag("nchw", "layout of activations and weights")
    compile: bool = flag(False, "torch.compile the model")
    deterministic: bool = flag(
        False,
        "algorithms that repeat bit for bit, maybe slower; an operation that has none ends the run",
    )
    fsdp: bool = flag(
        False, "shard weights, gradients and optimizer state over the processes (FSDP2)"
    )
    cpu: bool = flag(False, "stay on the CPU where there is a GPU")

    # run
    seed: int | None = flag(None, "seed of everything random; drawn and logged when absent")
    resume: str | None = flag(None, "checkpoint to continue; auto: the newest in the workspace")
    preempt_grace: float = flag(
        25.0, "seconds from SIGTERM or SIGUSR1 to the end of the process, checkpoint included"
    )
    max_bad_steps: int = flag(10, "optimizer steps in a row whose loss may be infinite or NaN")
    evaluate: bool = flag(False, "validate once and stop", "-e")
    training_only: bool = flag(False, "no validation")
    prof: int = flag(-1, "stop after this many iterations of training and of validation")
    topk: int = flag(5, "k of the second accuracy")
    dry_run: bool = flag(False, "print the resolved plan as JSON and exit")
    version: bool = flag(False, "print the versions of everything that matters and exit")

    # output
    workspace: str = flag("./", "directory of checkpoints and raport", "--checkpoint-dir")
    save_checkpoints: bool = flag(True, "write no checkpoints", switch="--no-checkpoints")
    checkpoint_every_steps: int = flag(
        0, "optimizer steps between checkpoints within an epoch; 0: at its end only"
    )
    checkpoint_filename: str = flag("checkpoint.pth.tar", "name of the newest checkpoint")
    gather_checkpoints: int = flag(
        0, "checkpoints of single epochs to keep; -1: all, 0: the newest and the best only"
    )
    raport_file: str = flag("experiment_raport.json", "log in DLLogger's format, in the workspace")
    tensorboard: str | None = flag(None, "directory of TensorBoard events")
    log_to: str | None = flag(
        None, "service that follows the run, too; its package must be installed", choices=TRACKERS
    )
    log_project: str = flag("image-classification", "project or experiment of --log-to")
    console: ConsoleFormat = flag(
        "auto",
        "summary: one line per epoch; dllogger: the lines of NVIDIA's harness; auto: the former on "
        "a terminal, the latter elsewhere",
    )
    print_freq: int = flag(10, "iterations between log lines", "-p")


COUNT_OR_ALL = Range("-1 or at least 1", lambda value: value == -1 or value >= 1)
RANGES = {
    **{name: within for name, within in data.RANGES.items() if name != "synthetic_length"},
    "synthetic_batches": data.RANGES["synthetic_length"],
    "num_classes": models.NUM_CLASSES,
    "width": models.WIDTH,
    "weight_decay": WEIGHT_DECAY,
    "label_smoothing": optim.LABEL_SMOOTHING,
    "use_ema": optim.EMA_DECAY,
    **dict.fromkeys("lr end_lr momentum mixup lr_gamma".split(), AT_LEAST_0),
    **dict.fromkeys("seed checkpoint_every_steps".split(), AT_LEAST_0),
    **dict.fromkeys("print_freq topk max_bad_steps".split(), AT_LEAST_1),
    **dict.fromkeys("prof run_epochs".split(), COUNT_OR_ALL),
    "static_loss_scale": ABOVE_0,
    "preempt_grace": Range("above 0 seconds", lambda value: value > 0),
    "gather_checkpoints": Range("-1 or more", lambda value: value >= -1),
}
"""What the number of a flag may be; None is always allowed."""

# Flags that say how an invocation runs, not what it trains.
PER_INVOCATION = frozenset(
    "workers prefetch run_epochs cpu fsdp seed resume preempt_grace evaluate training_only prof "
    "dry_run version pretrained_from_file workspace save_checkpoints checkpoint_every_steps "
    "checkpoint_filename gather_checkpoints raport_file tensorboard log_to log_project console "
    "print_freq".split()
)

# Flags of the originals that are refused -> what to use instead.
RETIRED = {
    "--jit": "use --compile",
    "--fp16": "use --amp",
    "--gpu-affinity": "use torchrun --numa-binding",
    "--pretrained": "nothing is downloaded; use --pretrained-from-file PATH",
    "--fused_se": "no model here has squeeze-and-excitation blocks of its own",
    "--trt": "TensorRT is not supported",
    "--conv_init": "use -c fanin or -c classic",
    "--lr-decay-epochs": "use --lr-milestones",
    "--lr-file": "use --lr-schedule with --lr-milestones",
    "--widths": "not supported; --width scales mobilenet_v1",
}


def parse(
    argv: Sequence[str],
    *sections: type,
    description: str,
    retired: Mapping[str, str] = RETIRED,
) -> list[Any]:
    """Return an instance of each of `sections`, made of the flags of main.py.

    Args:
        argv: The flags.
        *sections: Dataclasses of flags.
        description: Head of `--help`.
        retired: Flags that are refused -> what to use instead.

    Raises:
        ValueError: One line naming the flag and, where known, the remedy.
    """
    for word in argv:
        name = word.partition("=")[0]
        if name in retired:
            raise ValueError(f"{name} is not a flag any more: {retired[name]}")
    return flags.parse("main.py", argv, *sections, description=description, config_file=True)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return "--flag old -> new" for every flag that has another value than before.

    Args:
        before: Field names and values, as a checkpoint keeps them in its `config`; a flag that is
            not there is passed over.
        now: Those of this run.
    """
    return [
        f"{spelling(name)} {before[name]} -> {value}"
        for name, value in now.items()
        if name in before and name not in PER_INVOCATION and before[name] != value
    ]


def check(config: Config) -> None:
    """Raise ValueError (one line) for a value out of range or a combination without effect."""
    for name, within in RANGES.items():
        value = getattr(config, name)
        if value is not None and value not in within:
            raise ValueError(f"{spelling(name)} must be {within}, got {value}")
    if config.evaluate and config.training_only:
        raise ValueError("--evaluate and --training-only exclude each other")
    if config.data is None and BACKENDS[config.data_backend].reads_images:
        if not config.dry_run:
            raise ValueError("DATA is missing: name the directory that holds train/ and val/")
    elif config.data is not None and not config.dry_run and not Path(config.data).is_dir():
        raise ValueError(f"DATA directory {config.data} does not exist")
    if config.fsdp and config.memory_format == "nhwc":
        raise ValueError("--fsdp shards contiguous weights only: leave --memory-format nhwc out")
    if config.fsdp and not OPTIMIZERS[config.optimizer].shards:
        raise ValueError(f"--optimizer {config.optimizer} takes no sharded weights: drop --fsdp")
    if not config.evaluate:
        checkpoint.check_names(config.checkpoint_filename, {"--raport-file": config.raport_file})
    check_backend(config.data_backend, config.interpolation, config.augmentation)
    if config.log_to is not None and not config.dry_run:
        require(config.log_to)
    if lines := ineffective(config, [*_rules(config), *_optimizer_rules(config)]):
        raise ValueError("; ".join(lines))
    create_schedule(config, steps_per_epoch=1)


def advice(config: Config) -> list[str]:
    """Return a line for every choice that is likely not meant."""
    scaled = config.dynamic_loss_scale or config.static_loss_scale != Config.static_loss_scale
    if not config.amp or config.amp_dtype != "float16" or scaled or config.evaluate:
        return []
    return [
        "--amp starts at a loss scale of 1, at which small gradients become 0 in float16: add "
        "--dynamic-loss-scale, or use --amp-dtype bfloat16"
    ]


def speed_up(config: Config, *, has_gpu: bool) -> tuple[Config, str]:
    """Spell out --fast: return the flags that it comes to, and those that it set, as words.

    A flag that was changed from its default stays as it is.

    Args:
        config: The flags.
        has_gpu: Whether this machine has one. A plan (--dry-run) needs none.

    Raises:
        ValueError: There is no GPU; one line.
    """
    if not config.fast or config.cpu:
        return config, ""
    if not has_gpu and not config.dry_run:
        raise ValueError("--fast needs a GPU, and torch finds none on this machine: leave it out")
    wanted: dict[str, Any] = {"amp": True, "tf32": True}
    if not config.fsdp:
        wanted["memory_format"] = "nhwc"
    if config.amp_dtype == "float16" and config.static_loss_scale == Config.static_loss_scale:
        wanted["dynamic_loss_scale"] = True
    asked_for = {config.interpolation, config.augmentation}
    if has_gpu and data.has_dali() and not asked_for & BACKENDS["dali-gpu"].refuses.keys():
        wanted["data_backend"] = "dali-gpu"
    left = {n: v for n, v in wanted.items() if getattr(config, n) == getattr(Config, n)}
    words = [spelling(name) if v is True else f"{spelling(name)} {v}" for name, v in left.items()]
    return replace(config, **left), " ".join(words)


def _rules(c: Config) -> list[tuple[bool, str, str]]:
    fp16 = c.amp and c.amp_dtype == "float16"
    reads_images = BACKENDS[c.data_backend].reads_images
    return [
        (c.lr_schedule == "step", "lr_milestones lr_gamma", "--lr-schedule step"),
        (c.lr_schedule == "cosine", "end_lr", "--lr-schedule cosine"),
        (c.pretrained_from_file is not None, "new_head", "--pretrained-from-file"),
        (c.amp, "amp_dtype", "--amp"),
        (fp16, "static_loss_scale dynamic_loss_scale", "--amp in float16"),
        (not c.dynamic_loss_scale, "static_loss_scale", "dropping --dynamic-loss-scale"),
        (not c.training_only, "early_stopping_patience topk", "dropping --training-only"),
        (
            c.save_checkpoints,
            "gather_checkpoints checkpoint_filename checkpoint_every_steps",
            "checkpoints",
        ),
        (not reads_images, "synthetic_batches", "--data-backend synthetic"),
        (reads_images, "interpolation workers prefetch max_bad_files", "images to read"),
        (not c.cpu, "tf32 fast", "a GPU"),
        (c.log_to is not None, "log_project", "--log-to"),
        (
            not c.evaluate,
            "gather_checkpoints checkpoint_every_steps run_epochs early_stopping_patience "
            "max_bad_steps",
            "training",
        ),
    ]


def _optimizer_rules(c: Config) -> list[tuple[bool, str, str]]:
    """Return for each setting of some optimizers whether it has an effect on the chosen one."""
    rules = []
    for setting in sorted({name for spec in OPTIMIZERS.values() for name in spec.settings}):
        effective = setting in OPTIMIZERS[c.optimizer].settings
        rules.append((effective, setting, f"--optimizer {users(setting)}"))
    return rules


def create_schedule(config: Config, *, steps_per_epoch: int) -> optim.LrSchedule:
    """Return the learning rate of the flags.

    Raises:
        ValueError: One line: the schedule makes no sense.
    """
    return optim.LrSchedule(
        kind=config.lr_schedule,
        base_lr=config.lr,
        end_lr=config.end_lr,
        epochs=config.epochs,
        warmup_epochs=config.warmup,
        milestones=tuple(config.lr_milestones),
        gamma=config.lr_gamma,
        per_step=config.lr_per_step,
        restarts=tuple(config.lr_restarts),
        steps_per_epoch=steps_per_epoch,
    )


@dataclass(frozen=True)
class Steps:
    """How a run is cut into micro-batches, optimizer steps and epochs."""

    accumulation: int
    """Micro-batches per optimizer step."""
    steps_per_epoch: int
    """Optimizer steps per epoch; a last, incomplete one is dropped."""
    optimizer_batch_size: int
    """Images per optimizer step over all processes."""
    batch_size: int
    """Images per process and micro-batch."""


def _largest_part(wanted: int, batch_size: int, world_size: int) -> int:
    """Return the largest micro-batch of at most `batch_size` images into which `wanted` divides.

    Raises:
        ValueError: The processes do not divide them.
    """
    share, rest = divmod(wanted, world_size)
    if rest or not share:
        raise ValueError(
            f"{world_size} processes do not divide the {wanted} images per optimizer step of the "
            "run that is continued: start a number that does, or pass --optimizer-batch-size"
        )
    return max(b for b in range(1, batch_size + 1) if share % b == 0)


def cut(config: Config, *, num_train: int, world_size: int, kept_batch: int | None = None) -> Steps:
    """Cut an epoch of `num_train` images into steps for `world_size` processes.

    Args:
        config: The flags.
        num_train: Training images.
        world_size: Processes.
        kept_batch: Images per optimizer step of the run that is continued. Unless
            --optimizer-batch-size says otherwise, this number stays the same on another number of
            processes: by accumulation, and by smaller micro-batches if accumulation is not enough.

    Raises:
        ValueError: The images of an optimizer step are no multiple of those of one micro-batch
            over all processes, or an epoch holds less than one step.
    """
    batch_size, wanted = config.batch_size, config.optimizer_batch_size
    if config.evaluate:
        return Steps(1, 1, batch_size * world_size, batch_size)  # no step is taken
    if kept_batch is not None and wanted in (-1, kept_batch):
        wanted = kept_batch
        batch_size = _largest_part(wanted, batch_size, world_size)
    one = batch_size * world_size
    if wanted == -1:
        wanted = one
    if wanted < one or wanted % one:
        raise ValueError(
            f"--optimizer-batch-size {wanted} is not a multiple of {world_size} processes x "
            f"--batch-size {config.batch_size} = {one}"
        )
    accumulation = wanted // one
    steps = num_train // one // accumulation
    if steps == 0:
        raise ValueError(
            f"{num_train} training images are fewer than one optimizer step of {wanted}; "
            "lower --batch-size or --optimizer-batch-size"
        )
    return Steps(accumulation, steps, wanted, batch_size)
