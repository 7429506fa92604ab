"""Optimizers, schedulers and averages of timm with its models."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

import sparse

OPTIMIZERS = "sgd adamw nadamw lamb lion adopt adafactor rmsproptf madgrad lookahead_adamw".split()
MODELS = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_mambaout"]


def train(model: torch.nn.Module, optimizer: str, steps: int = 8) -> None:
    """Train as timm's script does, and check weights, records and average at each update."""
    stepped = create_optimizer_v2(model, opt=optimizer, lr=1e-2, weight_decay=0.05, momentum=0.9)
    sparsifier = sparse.rigl(model, stepped, sparsity=0.8, delta_t=3, t_end=6)
    scheduler, _ = create_scheduler_v2(stepped, sched="cosine", num_epochs=steps)
    average = ModelEmaV3(model, decay=0.5)
    for step in range(steps):
        inputs = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        F.cross_entropy(model(inputs), torch.arange(4)).backward()
        stepped.step()
        stepped.zero_grad()
        average.update(model, step=step)
        scheduler.step(step + 1)
        assert sparsifier.metrics()["sparsity"] == pytest.approx(0.8, abs=0.01)
    assert sparsifier.num_updates == 3
    sparsifier.apply_to(average.module)
    for name, mask in sparsifier.masks.items():
        assert not sparse.prunable(model)[name][~mask].any(), name
        assert not sparse.prunable(average.module)[name][~mask].any(), name
    for weight in sparse.prunable(model).values():
        assert weight.isfinite().all()


def create(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 32} if "vit" in name else {}
    return timm.create_model(name, num_classes=4, **size)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(optimizer: str) -> None:
    train(create("test_vit"), optimizer)


@pytest.mark.parametrize("model", MODELS)
def test_models(model: str) -> None:
    train(create(model), "nadamw")


def test_muon_is_refused() -> None:
    model = create("test_vit")
    with pytest.raises(ValueError, match="Muon cannot train sparse weights"):
        sparse.rigl(model, create_optimizer_v2(model, opt="muon"), sparsity=0.8, t_end=6)
