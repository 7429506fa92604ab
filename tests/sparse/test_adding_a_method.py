"""The walk-through of docs/adding_a_method.md, run as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_method.md"


def run_page(blocks: slice = slice(None)) -> dict[str, Any]:
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(code) == 3
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "page"}
    exec("\n".join(code[blocks]), namespace)
    return namespace


def test_the_page_trains_a_sparse_network(capsys: pytest.CaptureFixture[str]) -> None:
    page = run_page()
    sparsifier = page["sparsifier"]
    assert page["loss"].item() < 0.1
    assert capsys.readouterr().out.endswith("at sparsity 0.80\n")
    assert (sparsifier.step, sparsifier.num_updates) == (100, 8)
    for name, mask in sparsifier.masks.items():
        assert int(mask.sum()) == sparsifier.method.num_active[name]
        assert not sparse.prunable(page["model"])[name][~mask].any()


def test_its_state_is_saved_and_belongs_to_it() -> None:
    page = run_page()
    state = page["sparsifier"].state_dict()
    page["sparsifier"].load_state_dict(state)
    page["sparsifier"].remove()
    with pytest.raises(ValueError, match="written by method 'sensitivity', this run uses 'rigl'"):
        sparse.rigl(page["model"], page["optimizer"], sparsity=0.8, t_end=9).load_state_dict(state)


def test_it_traces_on_a_fake_device() -> None:
    page = run_page(slice(2))
    with FakeTensorMode():
        model = torch.nn.Linear(20, 10, device="meta")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier = page["sensitivity"](model, optimizer, sparsity=0.8, t_end=10)
        model.weight.grad = torch.randn_like(model.weight)
        optimizer.step()
        assert sparsifier.num_updates == 1
