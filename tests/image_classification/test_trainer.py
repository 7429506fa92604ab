"""The training loop against loops written by hand."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from image_classification import optim
from image_classification.distributed import World
from image_classification.evaluate import evaluate
from image_classification.log import Logger
from image_classification.trainer import Precision, Trainer

WORLD = World(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
SILENT = Logger(raport=None, append=False, console=None)


class Batches:
    """A loader of given batches."""

    def __init__(self, images: Tensor, targets: Tensor, size: int | list[int]) -> None:
        self._batches = list(zip(images.split(size), targets.split(size), strict=True))

    def __len__(self) -> int:
        return len(self._batches)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._batches)


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5)
    return nn.Sequential(*layers).to(dtype)


def pictures(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(count, 3, 8, 8, generator=generator, dtype=dtype)
    return images, torch.randint(5, (count,), generator=generator)


def trainer(model: nn.Module, schedule=lambda step: 0.1 / (1 + step), **changes) -> Trainer:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, nesterov=True)
    options = {"world": WORLD, "precision": Precision(), **changes}
    return Trainer(model, optimizer, schedule, nn.CrossEntropyLoss(), **options)


def test_an_epoch_equals_a_hand_written_loop() -> None:
    images, targets = pictures(32)
    model, by_hand = network(), network()
    ours = trainer(model)
    record = ours.train_epoch(Batches(images, targets, 8), 0, steps=4, logger=SILENT)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=1.0, momentum=0.9, nesterov=True)
    losses = []
    for step, (x, y) in enumerate(zip(images.split(8), targets.split(8), strict=True)):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        loss = nn.functional.cross_entropy(by_hand(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for a, b in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(a, b)
    assert record["train.loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert ours.step == 4


def test_accumulated_micro_batches_equal_one_batch() -> None:
    images, targets = pictures(48)
    whole, parts = network(), network()
    trainer(whole).train_epoch(Batches(images, targets, 24), 0, steps=2, logger=SILENT)
    accumulating = trainer(parts, accumulation=3)
    accumulating.train_epoch(Batches(images, targets, 8), 0, steps=2, logger=SILENT)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert accumulating.step == 2


def test_a_micro_batch_without_images_adds_nothing() -> None:
    images, targets = pictures(8)

    def normalized() -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(3), network()).double()

    model, by_hand = normalized(), normalized()
    ours = trainer(model, accumulation=2)
    record = ours.train_epoch(Batches(images, targets, [8, 0]), 0, steps=1, logger=SILENT)
    loss = nn.functional.cross_entropy(by_hand(images), targets)
    (loss / 2).backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9, nesterov=True).step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name])
    assert record["train.loss"] == pytest.approx(loss.item())

    before = copy.deepcopy(model.state_dict())
    record = trainer(model).train_epoch(
        Batches(images[:0], targets[:0], 1), 0, steps=1, logger=SILENT
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert math.isnan(record["train.loss"])
    assert record["train.total_ips"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_and_follows_float32(dtype: torch.dtype) -> None:
    images, targets = pictures(64, torch.float32)
    losses = {}
    for name, precision in (("full", Precision()), ("mixed", Precision(dtype, 256.0))):
        ours = trainer(network(torch.float32), lambda step: 0.02, precision=precision)
        epochs = [
            ours.train_epoch(Batches(images, targets, 16), e, steps=4, logger=SILENT)
            for e in range(8)
        ]
        losses[name] = [epoch["train.loss"] for epoch in epochs]
    assert losses["mixed"][-1] < 0.7 * losses["mixed"][0]
    assert losses["mixed"] == pytest.approx(losses["full"], rel=0.05)
    assert ours.scaler.is_enabled() == (dtype == torch.float16)


def test_an_overflow_moves_nothing_and_lowers_the_scale() -> None:
    images, targets = pictures(8, torch.float32)
    model = network(torch.float32)
    ours = trainer(model, precision=Precision(torch.float16, 2.0**120))
    before = copy.deepcopy(model.state_dict())
    ours.train_epoch(Batches(images, targets, 8), 0, steps=1, logger=SILENT)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert ours.scaler.get_scale() == 2.0**119


def test_ema_follows_every_optimizer_step() -> None:
    images, targets = pictures(24)
    model = network()
    ours = trainer(model, accumulation=3, ema=optim.create_ema(model, 0.9))
    start = model[0].weight.detach().clone()
    ours.train_epoch(Batches(images, targets, 8), 0, steps=1, logger=SILENT)
    assert ours.ema is not None
    averaged, weight = ours.ema.module[0].weight, model[0].weight
    moved = (averaged - start).norm() / (weight - start).norm()
    assert 0 < moved <= 1  # one update: between the start and the new weights
    torch.testing.assert_close((averaged - start) / moved, weight - start)


def test_mixup_targets_reach_the_loss() -> None:
    images, targets = pictures(16)
    seen = []

    def loss(output: Tensor, mixed: Tensor) -> Tensor:
        seen.append(mixed)
        return nn.functional.cross_entropy(output, mixed)

    model = network(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ours = Trainer(
        model, optimizer, lambda step: 0.1, loss,
        world=WORLD, precision=Precision(), mixup=optim.mixup(0.5, 5),
    )  # fmt: skip
    ours.train_epoch(Batches(images.float(), targets, 8), 0, steps=2, logger=SILENT)
    assert [tuple(t.shape) for t in seen] == [(8, 5), (8, 5)]
    torch.testing.assert_close(seen[0].sum(1), torch.ones(8))


def test_evaluation_counts_every_image_once() -> None:
    images, targets = pictures(21)
    model = network()
    options = {"world": WORLD, "precision": Precision(), "logger": SILENT, "step": (0, 0)}
    record = evaluate(model, Batches(images, targets, 8), topk=3, **options)
    output = model(images)
    ranked = output.argsort(dim=1, descending=True)
    top1 = (ranked[:, 0] == targets).double().mean()
    top3 = (ranked[:, :3] == targets[:, None]).any(1).double().mean()
    assert record["val.top1"] == pytest.approx(100 * top1.item())
    assert record["val.top3"] == pytest.approx(100 * top3.item())
    assert record["val.loss"] == pytest.approx(
        nn.functional.cross_entropy(output, targets).item(), rel=1e-6
    )
    few = Batches(images, targets, 8)
    assert evaluate(model, few, topk=9, **options)["val.top9"] == 100.0  # more than the classes


def test_nothing_to_validate_is_an_error() -> None:
    empty = Batches(*pictures(8), 8)
    empty._batches = []
    with pytest.raises(ValueError, match="no validation image"):
        evaluate(
            network(), empty, world=WORLD, precision=Precision(), topk=5, logger=SILENT, step=(0, 0)
        )
