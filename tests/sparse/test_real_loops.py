"""Training loops of other packages, run for real, give what a plain loop gives, bit for bit."""

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

import sparse
from tests.sparse.nets import assert_inactive_zero, backward, convnet, images, make, sgd, train
from tests.sparse.test_checkpoints import assert_identical

# Their own deprecations are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = ["rigl", "set", "snfs", "snip", "gmp"]
STEPS = 14


def batches() -> list[tuple[Tensor, Tensor]]:
    return [images(step) for step in range(STEPS)]


def dataset() -> TensorDataset:
    inputs, labels = zip(*batches(), strict=True)
    return TensorDataset(torch.cat(inputs), torch.cat(labels))


def ends(model: nn.Module, optimizer: Any, sparsifier: sparse.Sparsifier) -> dict[str, Any]:
    assert_inactive_zero(sparsifier, model, optimizer)
    weights = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    return {"weights": weights, "sparse": sparsifier.state_dict()}


def plain(method: str, accumulation: int = 1) -> dict[str, Any]:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make(method, model, optimizer)
    for step, (inputs, labels) in enumerate(batches(), 1):
        (F.cross_entropy(model(inputs), labels) / accumulation).backward()
        if step % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    return ends(model, optimizer, sparsifier)


@pytest.fixture
def accelerator() -> Iterator[Callable[..., Any]]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    yield lambda **options: Accelerator(cpu=True, **options)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("attach", ["before prepare", "after prepare"])
def test_accelerate(
    method: str, accumulation: int, attach: str, accelerator: Callable[..., Any]
) -> None:
    helper = accelerator(gradient_accumulation_steps=accumulation)
    model: Any = convnet()
    optimizer: Any = sgd(model)
    if attach == "before prepare":
        sparsifier = make(method, model, optimizer)
    model, optimizer = helper.prepare(model, optimizer)
    if attach == "after prepare":
        sparsifier = make(method, model, optimizer)
    for inputs, labels in batches():
        with helper.accumulate(model):
            helper.backward(F.cross_entropy(model(inputs), labels))
            optimizer.step()
            optimizer.zero_grad()
    found = ends(helper.unwrap_model(model), optimizer, sparsifier)
    assert_identical(found, plain(method, accumulation))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("automatic", [True, False])
def test_lightning(method: str, automatic: bool, tmp_path: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = convnet()
            self.automatic_optimization = automatic

        def configure_optimizers(self) -> Any:
            optimizer = sgd(self.network)
            self.sparsifier = make(method, self.network, optimizer)
            return optimizer

        def training_step(self, batch: Any, index: int) -> Any:
            loss = F.cross_entropy(self.network(batch[0]), batch[1])
            if automatic:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Module()
    lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    ).fit(module, DataLoader(dataset(), batch_size=6))
    optimizer = module.trainer.optimizers[0]
    assert_identical(ends(module.network, optimizer, module.sparsifier), plain(method))


@pytest.mark.parametrize("method", METHODS)
def test_transformers(method: str, tmp_path: Path) -> None:
    import transformers

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = convnet()

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.network(inputs)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    model = Classifier()
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    sparsifier = make(method, model.network, optimizer)
    rows = [{"inputs": inputs, "labels": label} for inputs, label in dataset()]
    InOrder(
        model,
        transformers.TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_grad_norm=0.0,
            per_device_train_batch_size=6,
            num_train_epochs=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        optimizers=(optimizer, schedule),
    ).train()
    assert_identical(ends(model.network, optimizer, sparsifier), plain(method))


@pytest.mark.parametrize("method", METHODS)
def test_lookahead_of_timm(method: str) -> None:
    """Its slow weights, which come back at every sixth step, follow the masks."""
    model = convnet()
    optimizer = timm.optim.Lookahead(sgd(model))
    sparsifier = make(method, model, optimizer)
    for _ in train(model, optimizer, range(STEPS)):
        sparsifier.metrics()
        assert_inactive_zero(sparsifier, model, optimizer)


def test_an_average_of_timm_holds_the_plain_model() -> None:
    from timm.utils import ModelEmaV3

    model = convnet()
    optimizer = sgd(model)
    sparsifier = make("static", model, optimizer)
    average = ModelEmaV3(model, decay=0.5)
    for step in range(4):
        optimizer.zero_grad()
        backward(model, images(step))
        optimizer.step()
        average.update(model, step=step)
    before = copy.deepcopy(average.module.state_dict())
    sparsifier.apply_to(average.module)
    assert_identical(average.module.state_dict(), before)
