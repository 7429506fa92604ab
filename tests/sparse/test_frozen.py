"""Frozen weights keep value and mask, from the start or for a while, and count as what they are."""

import io

import pytest
import torch
from torch import nn

import sparse
from tests.sparse.nets import LONGER, METHODS, assert_inactive_zero, convnet, make, sgd, train

UPDATING = [name for name in METHODS if not name.startswith(("snip", "static", "magnitude"))]


def assert_metrics_are_true(sparsifier: sparse.Sparsifier, model: nn.Module) -> None:
    """Compare the sparsity that is reported with the masks, layer by layer."""
    metrics = sparsifier.metrics()
    for name, mask in sparsifier.masks.items():
        zeros = 1 - mask.double().mean().item()
        assert metrics[f"sparsity.{name.removesuffix('.weight')}"] == pytest.approx(zeros)
        assert not sparse.prunable(model)[name][~mask].any()


@pytest.mark.parametrize("method", UPDATING)
def test_a_layer_frozen_from_the_start(method: str) -> None:
    model = convnet()
    frozen = model[3].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    sparsifier = make(method, model, optimizer, sparsity=0.5)
    value, before = frozen.clone(), sparsifier.masks
    for _ in train(model, optimizer, range(18)):
        assert torch.equal(frozen, value)
        assert torch.equal(sparsifier.masks["3.weight"], before["3.weight"])
    assert sparsifier.num_updates >= 4
    if method != "rigl_reset" and "gap" not in method:  # what it grew so briefly is smallest
        assert not torch.equal(sparsifier.masks["7.weight"], before["7.weight"])
    assert_metrics_are_true(sparsifier, model)


@pytest.mark.parametrize("method", UPDATING)
def test_a_layer_frozen_for_a_while(method: str) -> None:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make(method, model, optimizer, sparsity=0.5, **LONGER[method])
    list(train(model, optimizer, range(6)))
    weight = model[3].weight.requires_grad_(False)
    weight.grad = None
    value, mask = weight.clone(), sparsifier.masks["3.weight"]
    state = optimizer.state[weight]["momentum_buffer"].clone()
    for _ in train(model, optimizer, range(6, 14)):
        assert torch.equal(weight, value)
        assert torch.equal(sparsifier.masks["3.weight"], mask)
        assert torch.equal(optimizer.state[weight]["momentum_buffer"], state)
    assert sparsifier.num_updates >= 3
    weight.requires_grad_(True)
    list(train(model, optimizer, range(14, 22)))
    assert not torch.equal(weight, value)
    if method != "rigl_reset" and "gap" not in method:  # what it grew so briefly is smallest
        assert not torch.equal(sparsifier.masks["3.weight"], mask)
    assert_inactive_zero(sparsifier, model, optimizer)
    assert_metrics_are_true(sparsifier, model)


def test_snfs_holds_the_number_of_the_layers_that_are_trained() -> None:
    model = convnet()
    model[7].weight.requires_grad_(False)
    optimizer = sgd(model)
    sparsifier = make("snfs", model, optimizer, sparsity=0.5, delta_t=1, t_end=60)
    planned = sum(sparsifier.num_active.values())
    list(train(model, optimizer, range(60)))
    assert abs(sum(sparsifier.num_active.values()) - planned) <= 4  # rounding, made good over time


@pytest.mark.parametrize("method", ["snip", "snip_global"])
def test_snip_names_the_remedy(method: str) -> None:
    model = convnet()
    model[3].weight.requires_grad_(False)
    optimizer = sgd(model)
    make(method, model, optimizer)
    with pytest.raises(RuntimeError, match=r"gradient of 3\.weight.*dense_layers"):
        list(train(model, optimizer, range(1)))
    model = convnet()
    model[3].weight.requires_grad_(False)
    optimizer = sgd(model)
    sparsifier = make(method, model, optimizer, dense_layers=["3"])
    value = model[3].weight.clone()
    list(train(model, optimizer, range(2)))
    assert sparsifier.num_updates == 1
    assert torch.equal(model[3].weight, value)


def test_a_thawed_weight_without_an_optimizer_is_named() -> None:
    model = convnet()
    model[3].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    make("rigl", model, optimizer)
    model[3].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"3\.weight is not among the optimizer's parameters"):
        list(train(model, optimizer, range(1)))


def test_a_run_saved_with_a_frozen_layer_goes_on_without() -> None:
    model = convnet()
    model[3].weight.requires_grad_(False)
    optimizer = sgd(model)
    sparsifier = make("set", model, optimizer)
    list(train(model, optimizer, range(6)))
    buffer = io.BytesIO()
    torch.save([model.state_dict(), sparsifier.state_dict()], buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    other = convnet(seed=1)
    resumed = make("set", other, sgd(other))
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert torch.equal(other[3].weight, model[3].weight)
    assert torch.equal(resumed.masks["3.weight"], sparsifier.masks["3.weight"])
