"""AC/DC: its phases, its counts, what a decompression resets, its costs."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse
from sparse.methods import Acdc
from tests.sparse.nets import ACDC, assert_inactive_zero, convnet, make, sgd, train

EPOCHS = {"dense_warmup": 10, "sparse_phase": 5, "dense_phase": 5}
EPOCHS |= {"last_dense": 10, "last_sparse": 15}


def phases(method: Acdc, steps: int) -> str:
    """Write down what follows from the steps at which an update is due, a letter per step."""
    found, is_sparse = "", False
    for step in range(steps):
        found += "S" if is_sparse else "D"
        if method.due(step):
            is_sparse = method.events[step + 1]
    return found


@pytest.mark.parametrize("epochs", [100, 150, 200])
def test_the_published_phases(epochs: int) -> None:
    middle = ("S" * 5 + "D" * 5) * ((epochs - 40) // 10)
    expected = "D" * 10 + middle + "S" * 5 + "D" * 10 + "S" * 15
    assert phases(Acdc(sparsity=0.9, total_steps=epochs, **EPOCHS), epochs) == expected


@given(
    st.integers(2, 60),
    *(st.integers(1, 12) for _ in range(5)),
)
def test_a_run_ends_with_its_last_phases(
    total: int, warmup: int, sparse_phase: int, dense_phase: int, last_dense: int, last_sparse: int
) -> None:
    settings: Mapping[str, Any] = {
        "dense_warmup": warmup,
        "sparse_phase": sparse_phase,
        "dense_phase": dense_phase,
        "last_dense": last_dense,
        "last_sparse": last_sparse,
    }
    if warmup + last_sparse > total:
        with pytest.raises(ValueError, match=r"^dense_warmup \d+ and last_sparse \d+ are longer"):
            Acdc(sparsity=0.9, total_steps=total, **settings)
        return
    found = phases(Acdc(sparsity=0.9, total_steps=total, **settings), total)
    assert found.startswith("D" * warmup)
    assert found.endswith("D" * min(last_dense, warmup) + "S" * last_sparse)
    runs = found.replace("DS", "D S").replace("SD", "S D").split()
    assert all(len(run) >= sparse_phase for run in runs[1:-1] if run[0] == "S")
    assert len(found) == total


def test_phases_of_a_run() -> None:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make("acdc", model, optimizer, sparsity=0.8)
    method = sparsifier.method
    assert isinstance(method, Acdc)
    final = method.final_counts
    sizes = {name: weight.numel() for name, weight in sparse.prunable(model).items()}
    for step in train(model, optimizer, range(20)):
        is_sparse = step + 1 in (3, 4, 7, 8, 11, 12) or step + 1 >= 16
        assert sparsifier.num_active == (final if is_sparse else sizes)
        assert_inactive_zero(sparsifier, model, optimizer)
    assert final == {
        name: math.ceil(size * (1 - method.allocation.sparsities[name])) - 1
        for name, size in sizes.items()
    }


def test_all_layers_are_ranked_together_with_the_global_scope() -> None:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make("acdc_global", model, optimizer, sparsity=0.8)
    list(train(model, optimizer, range(3)))
    total = sum(weight.numel() for weight in sparse.prunable(model).values())
    assert sum(sparsifier.num_active.values()) == math.ceil(total * (1 - 0.8)) - 1
    assert sparsifier.method.final_total == sum(sparsifier.num_active.values())
    shares = [int(mask.sum()) / mask.numel() for mask in sparsifier.masks.values()]
    assert max(shares) > 1.5 * min(shares)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_decompression_resets_the_state_of_all_parameters(kind: str) -> None:
    """The next step is that of a new optimizer; weights do not move by the event itself."""
    model = convnet()
    makes = {"sgd": sgd, "adamw": lambda m: torch.optim.AdamW(m.parameters(), 0.01)}
    optimizer = makes[kind](model)
    make("acdc", model, optimizer)
    list(train(model, optimizer, range(4)))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    assert all(optimizer.state[parameter] for parameter in model.parameters())
    optimizer.param_groups[0]["lr"] = 0.0
    list(train(model, optimizer, range(4, 5)))
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
    optimizer.param_groups[0]["lr"] = 0.1
    other = convnet()
    other.load_state_dict(model.state_dict())
    fresh = makes[kind](other)
    fresh.param_groups[0]["lr"] = 0.1
    list(train(model, optimizer, range(5, 6)))
    list(train(other, fresh, range(5, 6)))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_compression_keeps_the_state_of_what_is_left() -> None:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make("acdc", model, optimizer)
    list(train(model, optimizer, range(3)))
    for name, weight in sparse.prunable(model).items():
        kept = optimizer.state[weight]["momentum_buffer"][sparsifier.masks[name]]
        assert kept.all()


def test_costs_are_those_of_the_phases() -> None:
    method = Acdc(sparsity=0.9, total_steps=100, **EPOCHS)
    dense, pruned = 8.2121e9, 1.0676e9
    assert method.step_flops(dense, pruned) / (3 * dense) == pytest.approx(0.565, abs=1e-4)
    short = Acdc(sparsity=0.9, **ACDC)
    assert short.step_flops(1.0, 0.0) / 3 == pytest.approx(1 - (2 + 2 + 2 + 4) / 20)


@pytest.mark.parametrize("name", ACDC)
def test_a_phase_takes_a_step_at_least(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, got 0$"):
        Acdc(sparsity=0.9, **{**ACDC, name: 0})
