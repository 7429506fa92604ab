"""GradScaler: an overflow moves nothing and does not count, also where hooks run regardless."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse
from tests.sparse.nets import assert_inactive_zero, backward, convnet, images, make

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3),
    "sgd_fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3, fused=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
}
METHODS = ["rigl", "set", "snfs", "snfs_none", "snip", "gmp", "acdc", "granet", "srigl", "gap"]


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    tensors = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        state = optimizer.state.get(parameter, {})
        tensors += [v.clone() for v in state.values() if isinstance(v, Tensor)]
    return tensors


def scaled_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    step: int,
    overflow: bool,
) -> None:
    optimizer.zero_grad()
    inputs, labels = images(step)
    scaler.scale(nn.functional.cross_entropy(model(inputs), labels)).backward()
    if overflow:
        model[3].weight.grad[0, 0, 0, 0] = float("inf")
        model[7].weight.grad[:] = float("nan")
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_overflows_leave_no_trace(method: str, optimizer_name: str) -> None:
    # Overflows at ordinary steps, at the steps where an update is due, and twice in a row.
    overflows = {0, 3, 6, 7, 8, 13}
    runs = []
    for planted in (overflows, set()):
        model = convnet()
        optimizer = OPTIMIZERS[optimizer_name](model.parameters())
        sparsifier = make(method, model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        taken = 0
        for attempt in range(18 + len(planted)):
            overflow = attempt in planted
            before = snapshot(model, optimizer)
            masks, updates = sparsifier.masks, sparsifier.num_updates
            scaled_step(model, optimizer, scaler, taken, overflow)
            if overflow:
                after = snapshot(model, optimizer)
                if len(before) == len(after):  # the first call may create (zero) optimizer state
                    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
                assert sparsifier.num_updates == updates
                for name, mask in sparsifier.masks.items():
                    assert torch.equal(mask, masks[name])
            else:
                taken += 1
            if attempt % 3 == 0:  # reading the step waits for the device; not reading must do too
                expected = taken - (1 if method == "snip" and taken else 0)
                assert sparsifier.step == expected
            assert_inactive_zero(sparsifier, model, optimizer)
        runs.append((sparsifier, copy.deepcopy(model.state_dict())))
    # Scales are powers of two, so that the run without overflows is the same to the bit, except
    # that BatchNorm saw the batches of the skipped steps.
    (with_overflows, _), (without, _) = runs
    assert with_overflows.step == without.step
    assert with_overflows.num_updates == without.num_updates


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("method", ["rigl", "snfs", "snip", "gmp", "granet", "srigl"])
def test_a_scaled_run_is_the_unscaled_run(method: str, optimizer_name: str) -> None:
    results = []
    for scale in (None, 1024.0):
        model = convnet()
        optimizer = OPTIMIZERS[optimizer_name](model.parameters())
        options = {"grow_init": "gradient"} if method == "rigl" else {}
        sparsifier = make(method, model, optimizer, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(14):
            scaled_step(model, optimizer, scaler, step, overflow=False)
        results.append((sparsifier.masks, model.state_dict(), sparsifier.state_dict()["averages"]))
    for name, mask in results[0][0].items():
        assert torch.equal(mask, results[1][0][name])
    for one, other in zip(results[0][1].values(), results[1][1].values(), strict=True):
        torch.testing.assert_close(one, other)
    for name, average in results[0][2].items():
        torch.testing.assert_close(average, results[1][2][name])


def test_unscaling_by_hand_before_a_fused_step() -> None:
    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
    sparsifier = sparse.rigl(model, optimizer, sparsity=0.8, delta_t=2, t_end=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(backward_loss(model, step)).backward()
        if step in (2, 3):
            model[0].weight.grad[0] = float("inf")
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert sparsifier.step == 4
    assert sparsifier.num_updates == 2
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def backward_loss(model: nn.Module, step: int) -> Tensor:
    inputs, labels = images(step)
    return nn.functional.cross_entropy(model(inputs), labels)


def test_autocast_in_bfloat16() -> None:
    model = convnet()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sparsifier = make("rigl", model, optimizer)
    for step in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            backward(model, images(step))
        optimizer.step()
        assert_inactive_zero(sparsifier, model, optimizer)
    assert sparsifier.num_updates == 2
