"""Accelerate's checkpoints hold the state of a registered sparsifier."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tests.sparse.nets import assert_inactive_zero, convnet, images, make
from tests.sparse.test_checkpoints import assert_identical


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Run:
    """The objects of a run, made for the first time or anew."""

    def __init__(self, method: str, seed: int, **options: Any) -> None:
        self.helper = Accelerator(cpu=True, **options)
        model = convnet(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        self.model, self.optimizer, self.schedule = self.helper.prepare(model, optimizer, schedule)
        self.sparsifier = make(method, self.model, self.optimizer)
        self.helper.register_for_checkpointing(self.sparsifier)

    def train(self, steps: range) -> None:
        for step in steps:
            with self.helper.accumulate(self.model):
                inputs, labels = images(step)
                self.helper.backward(F.cross_entropy(self.model(inputs), labels))
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()


@pytest.mark.parametrize("method", ["rigl", "snfs", "snip", "gmp"])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2},
                                     {"mixed_precision": "bf16"}], ids=str)  # fmt: skip
def test_a_loaded_state_is_continued(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    whole, other = (Run(method, seed, **options) for seed in (0, 1))
    whole.train(range(10))
    whole.helper.save_state(str(tmp_path))
    whole.train(range(10, 20))
    other.helper.load_state(str(tmp_path))
    assert_inactive_zero(other.sparsifier, other.model, other.optimizer)
    other.train(range(10, 20))
    assert_identical(other.model.state_dict(), whole.model.state_dict())
    assert_identical(other.sparsifier.state_dict(), whole.sparsifier.state_dict())
    assert_inactive_zero(other.sparsifier, other.model, other.optimizer)
