"""Going on with other settings: every combination works with all invariants, or is refused."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch

import sparse
from tests.sparse.nets import METHODS, assert_inactive_zero, convnet, make, sgd, train

LAYERS: list[dict[str, Any]] = [
    {"sparsity": 0.5},
    {"sparsity": 0.95},
    {"distribution": "uniform", "dense_layers": []},
    {"power_scale": 0.5},
    {"sparsity_map": {"3": 0.3}},
]
FEWER_LAYERS: list[dict[str, Any]] = [{"dense_layers": ["3"]}, {"distribution": "uniform"}]
SCHEDULES: list[dict[str, Any]] = [
    {"t_end": 5},
    {"t_end": 40},
    {"delta_t": 3},
    {"t_start": 7, "t_end": 9},
    {"drop_fraction": 1.0},
    {"drop_fraction": 0.0},
    {"drop_anneal": "constant"},
    {"drop_anneal": "exponential", "drop_power": 3.0},
    {"drop_noise": 0.1},
    {"grow_init": "random"},
    {"initial_acc_scale": 1.0},
    {"drop_fraction_min": 0.1},
    {"growth": "random"},
    {"redistribution": "magnitude"},
    {"redistribution": "numel"},
    {"seed": 7},
    {"prune_end": 5},
    {"prune_end": 60},
    {"prune_end": 400},
    {"prune_every": 1},
    {"prune_start": 8},
    {"total_steps": 40},
    {"initial_sparsity": 0.7},
    {"phase": 3},
    {"num_phases": 1},
    {"partitions": ["0", "3,7", "9"]},
    {"mask_init": "random"},
    {"min_salient": 0.9},
    {"min_salient": 2.0, "never_ablated": []},
    {"gradient_steps": 1},
    {"sparse_phase": 1},
    {"dense_warmup": 7, "dense_phase": 1},
    {"last_dense": 1, "last_sparse": 9},
]
KEEPS_COUNTS = (
    "static",
    "magnitude",
    "set",
    "rigl",
    "rigl_blocks",
    "rigl_reset",
    "snfs_none",
    "srigl_whole",
)


def start(method: str, steps: int, **options: Any) -> tuple[Any, Any, sparse.Sparsifier]:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make(method, model, optimizer, **options)
    list(train(model, optimizer, range(steps)))
    return model, optimizer, sparsifier


def go_on(method: str, run: tuple[Any, Any, sparse.Sparsifier], **options: Any) -> None:
    """Resume with other settings, train, and check what must always hold."""
    model, optimizer, sparsifier = start(method, 0, **options)
    before = run[2].masks
    model.load_state_dict(run[0].state_dict())
    optimizer.load_state_dict(copy.deepcopy(run[1].state_dict()))  # torch would share tensors
    sparsifier.load_state_dict(run[2].state_dict())
    counts = sparsifier.num_active
    for _ in train(model, optimizer, range(run[2].step, run[2].step + 10)):
        assert_inactive_zero(sparsifier, model, optimizer)
        masks = sparsifier.masks
        if method in KEEPS_COUNTS:
            assert sparsifier.num_active == counts
        elif method.startswith("gmp") or (method.startswith("snip") and run[2].num_updates):
            assert all(not (masks[name] & ~before[name]).any() for name in masks)
        before = masks
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    expected = sum(counts.values()) / 10  # none dies out
    assert sum(sparsifier.num_active.values()) > min(expected, 20)


def accepted(method: str, changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = inspect.signature(METHODS[method][0]).parameters
    none = method == "snfs_none"
    chosen = [c for c in changes if c.keys() <= names.keys()]
    chosen = [c for c in chosen if not (none and ("redistribution" in c or "growth" in c))]
    if method.startswith("gap"):  # whose first layer is dense by choice alone
        chosen = [c for c in chosen if c != {"distribution": "uniform"}]
    if method == "granet_dense":  # nothing is shared out at a dense start
        chosen = [c for c in chosen if "power_scale" not in c]
    if method == "srigl_whole":
        chosen = [c for c in chosen if "min_salient" not in c]
    if method.endswith("global"):  # which refuses what is said about single layers
        return [c for c in chosen if not c.keys() & {"distribution", "power_scale", "sparsity_map"}]
    return chosen


@pytest.mark.parametrize("method", METHODS)
def test_another_schedule_goes_on(method: str) -> None:
    run = start(method, 6)
    for change in [{}, *accepted(method, SCHEDULES)]:
        go_on(method, run, **change)


@pytest.mark.parametrize("method", METHODS)
def test_other_layers_go_on_where_counts_may_change(method: str) -> None:
    run = start(method, 6)
    schedules = [{}, *accepted(method, [{"t_end": 40}, {"prune_end": 60}])]
    for change in accepted(method, LAYERS):
        for schedule in schedules:
            options: Mapping[str, Any] = {**change, **schedule}
            if method in KEEPS_COUNTS:
                with pytest.raises(ValueError, match=r"^[^\n]*weight[^\n]*$"):
                    go_on(method, run, **options)
            else:
                go_on(method, run, **options)


@pytest.mark.parametrize("method", METHODS)
def test_fewer_masks_than_the_state_has_are_refused(method: str) -> None:
    run = start(method, 6)
    for change in accepted(method, FEWER_LAYERS):
        with pytest.raises(ValueError, match=r"^[^\n]*(0|3)\.weight[^\n]*$"):
            go_on(method, run, **change)


@pytest.mark.parametrize("ends", [(14, 40), (14, 120), (40, 14), (120, 15)])
@pytest.mark.parametrize("method", ["gmp", "gmp_global"])
def test_a_ramp_that_is_stretched_keeps_what_is_left(method: str, ends: tuple[int, int]) -> None:
    run = start(method, 12, prune_end=ends[0])
    left = run[2].num_active
    model, optimizer, sparsifier = start(method, 0, prune_end=ends[1])
    model.load_state_dict(run[0].state_dict())
    optimizer.load_state_dict(copy.deepcopy(run[1].state_dict()))  # torch would share tensors
    sparsifier.load_state_dict(run[2].state_dict())
    list(train(model, optimizer, range(12, 15)))
    if ends[1] > ends[0]:  # the longer ramp asks for more than there is
        assert sparsifier.num_updates > run[2].num_updates
        assert sparsifier.num_active == left
    list(train(model, optimizer, range(15, ends[1] + 1)))
    full = start(method, ends[1] + 1, prune_end=ends[1])[2]
    assert sparsifier.num_active == full.num_active or method == "gmp_global"
    assert sum(sparsifier.num_active.values()) == sum(full.num_active.values())


@pytest.mark.parametrize("scopes", [("layer", "global"), ("global", "layer")])
def test_pruning_goes_on_in_another_scope(scopes: tuple[str, str]) -> None:
    go_on("gmp", start("gmp", 6, scope=scopes[0]), scope=scopes[1])


def test_redistribution_of_snfs_may_be_switched_on_but_not_off_once_counts_moved() -> None:
    go_on("snfs", start("snfs", 6, redistribution="none"), redistribution="momentum")
    with pytest.raises(ValueError, match="redistribution"):
        go_on("snfs_none", start("snfs", 6))


def test_states_of_snfs_without_redistribution_load_under_their_former_name() -> None:
    run = start("snfs_none", 6)
    state = run[2].state_dict()
    assert state["method"] == "snfs"
    model = convnet()
    sparsifier = make("snfs_none", model, sgd(model))
    sparsifier.load_state_dict({**state, "method": "snfs-fixed"})
    assert all(torch.equal(m, run[2].masks[n]) for n, m in sparsifier.masks.items())
