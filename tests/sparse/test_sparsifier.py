"""The step contract of the Sparsifier, on CPUs with real optimizers."""

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparse
from tests.sparse.nets import (
    METHODS,
    assert_inactive_zero,
    backward,
    convnet,
    images,
    make,
    mlp,
    rows,
    sgd,
    train,
)

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "maximize": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, maximize=True),
    "foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "adamw_fused": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2, initial_accumulator_value=0.1),
    "radam": lambda p: torch.optim.RAdam(p, 1e-2),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer_name", ["nesterov", "adamw"])
def test_inactive_connections_are_exactly_zero(method: str, optimizer_name: str) -> None:
    model = convnet()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    sparsifier = make(method, model, optimizer)
    for _ in train(model, optimizer, range(18)):
        assert_inactive_zero(sparsifier, model, optimizer)
    active = sum(sparsifier.num_active.values())
    total = sum(weight.numel() for weight in sparse.prunable(model).values())
    # All rows have the same number: what is left of a layer's budget is not used.
    assert active == pytest.approx(0.2 * total, rel=0.08 if "srigl" in method else 0.05)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_any_optimizer_keeps_the_contract(optimizer_name: str) -> None:
    model = convnet()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    sparsifier = make("rigl", model, optimizer)
    start = copy.deepcopy(sparsifier.masks)
    for _ in train(model, optimizer, range(10)):
        assert_inactive_zero(sparsifier, model, optimizer)
    assert sparsifier.num_updates == 3
    assert any(not torch.equal(start[name], mask) for name, mask in sparsifier.masks.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision_keeps_the_contract(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    optimizer = sgd(model)
    sparsifier = make("rigl", model, optimizer)
    for step in range(10):
        optimizer.zero_grad()
        inputs, labels = rows(step)
        backward(model, (inputs.to(dtype), labels))
        optimizer.step()
        assert_inactive_zero(sparsifier, model, optimizer)
        for name, mask in sparsifier.masks.items():
            assert int(mask.sum()) == sparsifier.num_active[name]


def test_channels_last_gives_the_masks_of_the_other_layout() -> None:
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = convnet().to(memory_format=memory_format).double()
        optimizer = sgd(model)
        sparsifier = make("rigl", model, optimizer)
        for step in range(10):
            optimizer.zero_grad()
            inputs, labels = images(step)
            backward(model, (inputs.double().to(memory_format=memory_format), labels))
            optimizer.step()
            assert_inactive_zero(sparsifier, model, optimizer)
        results.append(sparsifier.masks)
    for name, mask in results[0].items():
        assert torch.equal(mask, results[1][name]), name


def test_a_compiled_model_trains_sparse() -> None:
    model = convnet()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = sgd(compiled)
    sparsifier = make("rigl", compiled, optimizer)
    assert list(sparsifier.masks) == list(sparse.prunable(model))
    for _ in train(compiled, optimizer, range(6)):
        assert_inactive_zero(sparsifier, model, optimizer)
    assert sparsifier.num_updates == 2


def test_a_vision_transformer_trains_sparse() -> None:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16
    )
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier = make("rigl", model, optimizer)
    for step in range(6):
        optimizer.zero_grad()
        backward(model, (torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])))
        optimizer.step()
        assert_inactive_zero(sparsifier, model, optimizer)
        assert sparsifier.step == step + 1


def test_rigl_replaces_a_step_and_restores_the_gradients() -> None:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make("rigl", model, optimizer)
    list(train(model, optimizer, range(4)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {p: s["momentum_buffer"].clone() for p, s in optimizer.state.items()}
    old = sparsifier.masks
    assert sparsifier.is_update_step
    optimizer.zero_grad()
    backward(model, images(4))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    new = sparsifier.masks
    assert (sparsifier.step, sparsifier.num_updates) == (5, 2)
    assert not sparsifier.is_update_step
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name])
        stays = old[name] & new[name] if name in old else torch.ones_like(parameter).bool()
        assert torch.equal(parameter.detach(), before[name] * stays)
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert torch.equal(momentum, buffers[parameter] * stays)


def test_rigl_grows_where_the_dense_gradient_is_largest() -> None:
    model = mlp()
    optimizer = sgd(model)
    sparsifier = make("rigl", model, optimizer, drop_anneal="constant")
    list(train(model, optimizer, range(4), rows))
    old, weights = sparsifier.masks, {n: w.clone() for n, w in sparse.prunable(model).items()}
    optimizer.zero_grad()
    backward(model, rows(4))
    optimizer.step()
    for name, mask in sparsifier.masks.items():
        dropped = int(0.3 * int(old[name].sum()))
        kept = sparse.topk_mask(weights[name], int(old[name].sum()) - dropped, old[name])
        gradient = sparse.prunable(model)[name].grad
        assert torch.equal(mask, kept | sparse.topk_mask(gradient, dropped, ~kept))


@pytest.mark.parametrize("method", ["set", "snfs", "gmp", "rigl_reset"])
def test_other_methods_step_first(method: str) -> None:
    model, twin = convnet(), convnet()
    optimizer, twin_optimizer = sgd(model), sgd(twin)
    options = {"prune_start": 0} if method == "gmp" else {"drop_anneal": "constant"}
    sparsifier = make(method, model, optimizer, **options)
    # The twin takes the same steps with the same masks and no updates.
    full = {name: weight.numel() for name, weight in sparse.prunable(twin).items()}
    masks = {name: mask for name, mask in sparsifier.masks.items() if not mask.all()}
    counts = {name: int(masks[name].sum()) if name in masks else full[name] for name in full}
    static = sparse.methods.Static(sparsity=0.0)
    sparse.Sparsifier(twin, twin_optimizer, static, num_active=counts, masks=masks)
    list(train(model, optimizer, range(1)))
    list(train(twin, twin_optimizer, range(1)))
    assert sparsifier.num_updates == 1
    for name, mask in sparsifier.masks.items():
        weight, expected = sparse.prunable(model)[name], sparse.prunable(twin)[name]
        unchanged = weight == expected
        assert unchanged[mask & (weight != 0)].all()
        assert not weight[~mask].any()


def test_accumulated_gradients_give_the_masks_of_one_large_batch() -> None:
    results = []
    for parts in (1, 4):
        model = mlp()
        optimizer = sgd(model)
        sparsifier = make("rigl", model, optimizer)
        for step in range(10):
            optimizer.zero_grad()
            inputs, labels = rows(step)
            for chunk in zip(inputs.chunk(parts), labels.chunk(parts), strict=True):
                loss = nn.functional.cross_entropy(model(chunk[0]), chunk[1])
                (loss / parts).backward()
            optimizer.step()
        results.append((sparsifier.step, sparsifier.masks))
    assert results[0][0] == results[1][0] == 10
    for name, mask in results[0][1].items():
        assert torch.equal(mask, results[1][1][name])


def test_without_hooks_two_calls_do_the_same() -> None:
    results = []
    for hooks in (True, False):
        model = convnet()
        optimizer = sgd(model)
        sparsifier = make("rigl", model, optimizer, hooks=hooks)
        for step in range(10):
            optimizer.zero_grad()
            backward(model, images(step))
            if not hooks:
                sparsifier.before_step()
            optimizer.step()
            if not hooks:
                sparsifier.after_step()
        results.append(copy.deepcopy(model.state_dict()))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name])


def test_removed_hooks_leave_a_dense_trainer() -> None:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make("rigl", model, optimizer)
    sparsifier.remove()
    moved = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    weights = sparse.prunable(model)
    for _ in train(model, optimizer, range(2)):
        for name, weight in weights.items():
            moved[name] |= weight.grad != 0
    assert sparsifier.step == 0
    for name, weight in weights.items():
        assert torch.equal(weight != 0, moved[name]), name


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda m: torch.optim.LBFGS(m.parameters()), "LBFGS cannot train"),
        (lambda m: torch.optim.Muon([m[7].weight, m[9].weight]), "Muon cannot train"),
        (lambda m: torch.optim.Adam(m.parameters(), eps=0.0), "eps=0"),
        (lambda m: torch.optim.SGD(m[0].parameters(), 0.1), "7.weight is not among"),
    ],
)
def test_optimizers_that_would_break_the_contract_are_refused(optimizer: Any, message: str) -> None:
    model = convnet()
    with pytest.raises(ValueError, match=message):
        make("rigl", model, optimizer(model), dense_layers=["0", "3"])


def test_an_average_of_the_weights_is_masked_before_use() -> None:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make("rigl", model, optimizer, drop_anneal="constant")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in train(model, optimizer, range(10)):
        average.update_parameters(model)
    weights = sparse.prunable(average)
    assert any(weights[name][~mask].any() for name, mask in sparsifier.masks.items())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    sparsifier.apply_to(average)
    for name, mask in sparsifier.masks.items():
        assert torch.equal(weights[name], before[name] * mask)


def test_another_module_must_fit_to_be_masked() -> None:
    model = convnet()
    sparsifier = make("static", model, sgd(model))
    with pytest.raises(ValueError, match=r"has no parameter 3\.weight"):
        sparsifier.apply_to(nn.Sequential(nn.Conv2d(2, 8, 3)))
    other = convnet()
    other[3] = nn.Conv2d(8, 9, 3)
    with pytest.raises(ValueError, match=r"3.weight has shape \(9, 8, 3, 3\)"):
        sparsifier.apply_to(other)


def test_metrics_tell_what_happened() -> None:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make("rigl", model, optimizer, track_exploration=True)
    metrics = sparsifier.metrics()
    assert metrics["sparsity"] == pytest.approx(0.8, abs=2e-3)
    assert metrics["exploration_rate"] == pytest.approx(1 - metrics["sparsity"], abs=0.1)
    assert "dropped" not in metrics
    before, ever = sparsifier.masks, {n: m.clone() for n, m in sparsifier.masks.items()}
    for _ in train(model, optimizer, range(9)):
        for name, mask in sparsifier.masks.items():
            ever[name] |= mask
        if sparsifier.step == 5:
            after = sparsifier.masks
            gone = sum(int((before[name] & ~after[name]).sum()) for name in after)
            metrics = sparsifier.metrics()
            assert metrics["dropped"] == metrics["grown"] == gone > 0
            assert metrics["drop_fraction"] == pytest.approx(sparsifier.method.fraction_at(4))
        before = sparsifier.masks
    for name, mask in sparsifier.masks.items():
        layer = name.removesuffix(".weight")
        assert sparsifier.metrics()[f"sparsity.{layer}"] == pytest.approx(1 - mask.float().mean())
    masked = [name for name, mask in sparsifier.masks.items() if not mask.all()]
    share = sum(int(ever[n].sum()) for n in masked) / sum(ever[n].numel() for n in masked)
    assert sparsifier.metrics()["exploration_rate"] == pytest.approx(share)


def live_bytes() -> int:
    """Count the bytes of all ordinary tensors there are, shared storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):  # not what compiling left of other tests
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize(("method", "allowed"), [("rigl", 4), ("set", 4), ("gmp", 4), ("snfs", 8)])
def test_masks_are_all_that_is_kept_between_updates(method: str, allowed: int) -> None:
    usage = []
    weights = 256 * 256
    for sparse_run in (False, True):
        before = live_bytes()
        model = nn.Linear(256, 256)
        optimizer = sgd(model)
        sparsifier = make(method, model, optimizer) if sparse_run else None
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(4, 256)).square().sum().backward()
            optimizer.step()
        optimizer.zero_grad()
        usage.append(live_bytes() - before)
        del model, optimizer, sparsifier
    extra = usage[1] - usage[0]
    assert (allowed - 4) * weights < extra <= allowed * weights + 1024


@pytest.mark.parametrize("method", ["snip", "gmp"])
def test_methods_that_begin_dense_say_so(method: str) -> None:
    model = convnet()
    sparsifier = make(method, model, sgd(model))
    assert sparsifier.metrics()["sparsity"] == 0.0
    assert all(mask.all() for mask in sparsifier.masks.values())
    sizes = {name: weight.numel() for name, weight in sparse.prunable(model).items()}
    assert sparsifier.num_active == sizes


@pytest.mark.parametrize("grow_init", ["random", "gradient"])
def test_new_connections_may_start_elsewhere(grow_init: str) -> None:
    model = mlp()
    optimizer = sgd(model, lr=0.25)
    sparsifier = make("rigl", model, optimizer, grow_init=grow_init)
    list(train(model, optimizer, range(4), rows))
    old, weights = sparsifier.masks, {n: w.clone() for n, w in sparse.prunable(model).items()}
    list(train(model, optimizer, range(4, 5), rows))
    fresh_values: list[Tensor] = []
    for name, weight in sparse.prunable(model).items():
        fresh = sparsifier.masks[name] & ~old[name]
        stays = sparsifier.masks[name] & old[name]
        assert torch.equal(weight[stays], weights[name][stays])
        if grow_init == "gradient":
            assert torch.equal(weight[fresh], weight.grad[fresh] * -0.25)
        fresh_values.append(
            weight.detach()[fresh] / weights[name][old[name]].square().mean().sqrt()
        )
    values = torch.cat(fresh_values)
    assert values.all()
    if grow_init == "random":
        assert 0.6 < values.std() < 1.4


def test_momentum_of_new_connections_may_start_with_the_gradient() -> None:
    model = mlp()
    optimizer = sgd(model)
    sparsifier = make("rigl", model, optimizer, initial_acc_scale=0.5)
    old = sparsifier.masks
    list(train(model, optimizer, range(1), rows))  # the first update, before any momentum exists
    for name, weight in sparse.prunable(model).items():
        fresh = sparsifier.masks[name] & ~old[name]
        momentum = optimizer.state[weight]["momentum_buffer"]
        assert torch.equal(momentum, torch.where(fresh, weight.grad * 0.5, 0.0))


def test_who_maximizes_does_what_a_minimizer_of_the_negative_does() -> None:
    ends = []
    for maximize in (False, True):
        model = mlp()
        groups = [
            {"params": model[0].parameters(), "lr": 0.2, "maximize": maximize},
            {"params": model[2:].parameters(), "maximize": maximize},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        sparsifier = make("rigl", model, optimizer, grow_init="gradient", initial_acc_scale=0.5)
        for step in range(9):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(rows(step)[0]), rows(step)[1])
            (-loss if maximize else loss).backward()
            optimizer.step()
        ends.append((model.state_dict(), sparsifier.masks, loss.item()))
    torch.testing.assert_close(ends[0], ends[1])


def test_choices_without_effect_are_refused() -> None:
    model = convnet()
    without_rate = sgd(model)
    without_rate.param_groups[0]["lr"] = None  # as that of Adafactor, which computes it itself
    with pytest.raises(ValueError, match="this SGD has no learning rate"):
        make("rigl", model, without_rate, grow_init="gradient")
    with pytest.raises(ValueError, match="initial_acc_scale needs"):
        make("rigl", model, torch.optim.AdamW(model.parameters()), initial_acc_scale=0.5)
    with pytest.raises(ValueError, match="method 'set' sees no gradient"):
        make("set", model, sgd(model), grow_init="gradient")
    with pytest.raises(ValueError, match="grow_init must be"):
        make("rigl", model, sgd(model), grow_init="ones")


def test_state_left_by_earlier_training_is_masked() -> None:
    model = convnet()
    optimizer = sgd(model)
    list(train(model, optimizer, range(3)))
    sparsifier = make("static", model, optimizer)
    assert_inactive_zero(sparsifier, model, optimizer)


def test_masks_do_not_depend_on_the_global_generator() -> None:
    results = []
    for seed in (1, 2):
        model = convnet()
        torch.manual_seed(seed)
        optimizer = sgd(model)
        sparsifier = make("set", model, optimizer)
        list(train(model, optimizer, range(9)))
        results.append(sparsifier.masks)
    model = convnet()
    other = make("set", model, sgd(model), seed=1)
    for name, mask in results[0].items():
        assert torch.equal(mask, results[1][name])
    assert any(not torch.equal(results[0][n], m) for n, m in other.masks.items())
