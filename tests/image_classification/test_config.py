"""Flags: names, defaults, aliases, and one clear line for every mistake."""

from dataclasses import replace

import pytest

from image_classification import config
from image_classification.config import Config, cut


def parse(*argv: str) -> Config:
    (c,) = config.parse(argv, Config, description="")
    return c


def test_defaults_are_those_of_the_original_harness() -> None:
    c = parse("/data")
    assert (c.arch, c.batch_size, c.epochs, c.lr, c.momentum) == ("resnet50", 256, 90, 0.1, 0.9)
    assert (c.data_backend, c.workers, c.print_freq, c.weight_decay) == ("dali-cpu", 5, 10, 1e-4)
    assert (c.lr_schedule, c.warmup, c.workspace) == ("step", 0, "./")
    assert (c.raport_file, c.checkpoint_filename) == (
        "experiment_raport.json", "checkpoint.pth.tar"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "name", "value"),
    [
        ("--mom 0.875", "momentum", 0.875),
        ("--wd 3e-5", "weight_decay", 3e-5),
        ("--weight-decay 3e-5", "weight_decay", 3e-5),
        ("--learning-rate 2", "lr", 2.0),
        ("-b 64", "batch_size", 64),
        ("-a resnet18", "arch", "resnet18"),
        ("-j 8", "workers", 8),
        ("-p 100", "print_freq", 100),
        ("-c fanin", "model_config", "fanin"),
        ("--data-backend syntetic", "data_backend", "syntetic"),
        ("--raport-file r.json", "raport_file", "r.json"),
        ("--raport r.json", "raport_file", "r.json"),
        ("--optimizer-batch-size 2048", "optimizer_batch_size", 2048),
        ("--optimizer-batch 2048", "optimizer_batch_size", 2048),
        ("--checkpoint-dir out", "workspace", "out"),
        ("--no-checkpoints", "save_checkpoints", False),
        ("--num_classes 10", "num_classes", 10),
        ("--use-ema 0.999", "use_ema", 0.999),
        ("--lr-milestones 30 70 90", "lr_milestones", [30.0, 70.0, 90.0]),
        ("--training-only", "training_only", True),
        ("--static-loss-scale 128", "static_loss_scale", 128.0),
    ],
)
def test_spelling(typed: str, name: str, value: object) -> None:
    assert getattr(parse("/data", *typed.split()), name) == value


def test_yaml_file_gives_flags_and_the_command_line_wins(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("batch_size: 32\nlr_schedule: cosine\nlr_milestones: [1, 2]\n")
    c = parse("/data", "--config", str(path), "-b", "64")
    assert (c.batch_size, c.lr_schedule, c.lr_milestones) == (64, "cosine", [1.0, 2.0])


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--batch-size many", "--batch-size"),
        ("--lr-schedule never", "--lr-schedule"),
        ("--labelsmoothing 0.1", "did you mean --label-smoothing?"),
        ("--jit script", "--compile"),
        ("--gpu-affinity socket", "--numa-binding"),
        ("--config nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_wrong_flags_are_named_in_one_line(typed: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as caught:
        parse("/data", *typed.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"lr": -1.0}, "--lr must be at least 0, got -1.0"),
        ({"max_bad_files": -0.1}, r"--max-bad-files must be in \[0, 1\], got -0.1"),
        ({"label_smoothing": 1.0}, r"--label-smoothing must be in \[0, 1\)"),
        ({"warmup": 90.0}, "--warmup must be less than --epochs 90"),
        ({"evaluate": True, "training_only": True}, "exclude each other"),
        ({"data": None}, "DATA is missing"),
        ({"data": "/no/such/place"}, "/no/such/place does not exist"),
        ({"lr_milestones": [60.0, 30.0]}, "--lr-milestones must increase"),
        ({"interpolation": "triangular", "data_backend": "pytorch"}, "needs a DALI backend"),
        ({"end_lr": 0.1}, "--end-lr has no effect without --lr-schedule cosine"),
        ({"lr_schedule": "cosine", "lr_gamma": 0.5}, "--lr-gamma has no effect"),
        ({"optimizer": "adamw", "momentum": 0.8}, "--momentum has no effect"),
        ({"nesterov": True, "optimizer": "adamw"}, "--nesterov has no effect"),
        ({"rmsprop_alpha": 0.5}, "--rmsprop-alpha has no effect"),
        ({"amp_dtype": "bfloat16"}, "--amp-dtype has no effect without --amp"),
        ({"static_loss_scale": 128.0}, "--static-loss-scale has no effect"),
        ({"data_backend": "synthetic", "workers": 3}, "--workers has no effect"),
        ({"cpu": True, "tf32": True}, "--tf32 has no effect without a GPU"),
        ({"save_checkpoints": False, "gather_checkpoints": 3}, "--gather-checkpoints has no"),
    ],
)
def test_values_and_combinations_are_checked(tmp_path, changes, message) -> None:
    c = replace(Config(data=str(tmp_path)), **changes)
    with pytest.raises(ValueError, match=message) as caught:
        config.check(c)
    assert "\n" not in str(caught.value)


def test_accumulation_keeps_the_global_batch() -> None:
    c = Config(batch_size=256, optimizer_batch_size=2048)
    for world_size, accumulation in ((1, 8), (4, 2), (8, 1)):
        steps = cut(c, num_train=1_281_167, world_size=world_size)
        assert (steps.accumulation, steps.steps_per_epoch) == (accumulation, 625)
        assert steps.optimizer_batch_size == 2048


@pytest.mark.parametrize(("optimizer_batch", "images"), [(2000, 10**6), (128, 10**6), (2048, 2047)])
def test_batches_that_do_not_divide_are_refused(optimizer_batch: int, images: int) -> None:
    c = Config(batch_size=256, optimizer_batch_size=optimizer_batch)
    with pytest.raises(ValueError, match=str(optimizer_batch)):
        cut(c, num_train=images, world_size=1)
