"""GraNet: the number on its ramp, what it drops and grows, and by which gradient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse
from sparse.methods import Granet
from tests.sparse.nets import backward, convnet, images, make, mlp, rows, sgd, train


def total(sparsifier: sparse.Sparsifier) -> int:
    return sum(sparsifier.num_active.values())


@pytest.mark.parametrize(("method", "initial"), [("granet", 0.5), ("granet_dense", 0.0)])
def test_the_number_of_weights_follows_the_ramp(method: str, initial: float) -> None:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make(method, model, optimizer, sparsity=0.9, delta_t=3, prune_end=13, t_end=30)
    sizes = {name: weight.numel() for name, weight in sparse.prunable(model).items()}
    shapes = {name: weight.shape for name, weight in sparse.prunable(model).items()}
    assert sparsifier.num_active == sparse.allocate(shapes, sparsity=initial)
    numel, expected = sum(sizes.values()), total(sparsifier)
    for step in train(model, optimizer, range(20)):
        if (step + 1) % 3 == 0:
            progress = min((step + 1) // 3 / 4, 1.0)
            zeros = initial + (0.9 - initial) * (1 - (1 - progress) ** 3)
            expected = int(numel * (1 - zeros)) if progress < 1 else numel - math.floor(0.9 * numel)
        assert total(sparsifier) == expected
    assert sparsifier.num_updates == 6
    assert expected == sparsifier.method.final_total


def test_updates_go_on_when_the_ramp_has_ended() -> None:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make("granet", model, optimizer, t_end=40)
    list(train(model, optimizer, range(13)))
    before, counts = sparsifier.masks, sparsifier.num_active
    list(train(model, optimizer, range(13, 17)))
    assert sparsifier.num_active == counts
    assert any(not torch.equal(before[name], mask) for name, mask in sparsifier.masks.items())


def test_growth_is_by_the_gradient_of_the_step_itself() -> None:
    """And every layer drops what is smallest after that step."""
    model = mlp()
    optimizer = sgd(model)
    sparsifier = make("granet", model, optimizer, delta_t=4, t_end=40, prune_end=4, sparsity=0.7)
    list(train(model, optimizer, range(7), rows))
    old = sparsifier.masks
    optimizer.zero_grad()
    backward(model, rows(7))
    weights = sparse.prunable(model)
    gradients = {name: weight.grad.clone() for name, weight in weights.items()}
    moved: dict[str, torch.Tensor] = {}
    handle = optimizer.register_step_post_hook(lambda *_: None)
    copies = {name: weight.detach().clone() for name, weight in weights.items()}
    buffers = {name: optimizer.state[w]["momentum_buffer"].clone() for name, w in weights.items()}
    optimizer.step()
    handle.remove()
    for name, gradient in gradients.items():
        buffer = 0.9 * buffers[name] + gradient * old[name] + 1e-3 * copies[name]
        moved[name] = copies[name] - 0.1 * buffer
    fraction = sparsifier.method.fraction_at(7)
    assert fraction == pytest.approx(0.005 + 0.495 / 2 * (1 + math.cos(math.pi * 8 / 40)))
    for name, mask in sparsifier.masks.items():
        count = math.ceil(fraction * int(old[name].sum()))
        expected = sparse.drop_and_grow(old[name], moved[name], gradients[name], count)
        assert torch.equal(mask, expected)


def test_what_the_ramp_prunes_returns_at_0_and_what_the_drop_takes_keeps_its_value() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(10, 1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    sparsifier = sparse.granet(
        model,
        optimizer,
        sparsity=0.5,
        initial_sparsity=0.0,
        delta_t=1,
        prune_end=1,
        t_end=10,
        drop_fraction=0.5,
        drop_fraction_min=0.5,
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 11.0))
    model[0].weight.grad = torch.tensor([[0.0, 9, 0, 0, 0, 0, 0, 8, 0, 7]])
    optimizer.step()
    # 1 to 5 are pruned, 6 to 8 dropped; of these 2, 8 and, at a tie, the first one return.
    assert sparsifier.masks["0.weight"].flatten().nonzero().flatten().tolist() == [0, 1, 7, 8, 9]
    assert model[0].weight.flatten()[[0, 1, 7, 8, 9]].tolist() == [0, 0, 8, 9, 10]
    momentum = optimizer.state[model[0].weight]["momentum_buffer"].flatten()
    assert momentum.tolist() == [0, 0, 0, 0, 0, 0, 0, 8, 0, 7]


def test_dense_gradients_are_needed_at_updates_alone() -> None:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make("granet", model, optimizer)
    for step in range(12):
        assert sparsifier.needs_dense_gradients == (step % 4 == 3)
        list(train(model, optimizer, range(step, step + 1)))
        assert not sparsifier.state_dict()["averages"]


def test_a_layer_without_a_gradient_is_pruned_and_regrows_nothing() -> None:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make("granet_dense", model, optimizer, prune_end=4)
    list(train(model, optimizer, range(3)))
    optimizer.zero_grad()
    backward(model, images(3))
    model[7].weight.grad = None
    optimizer.step()
    assert total(sparsifier) == sparsifier.method.final_total
    weight, mask = model[7].weight, sparsifier.masks["7.weight"]
    assert not mask.all()
    assert weight[mask].abs().min() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initial_sparsity": 0.95}, r"initial_sparsity must be in \[0, 0.8\].* got 0.95"),
        ({"initial_sparsity": -0.1}, r"initial_sparsity must be in \[0, 0.8\].* got -0.1"),
        ({"prune_end": 0}, "prune_end must be at least 1 and t_start 0, got 0"),
        ({"drop_anneal": "constant", "drop_fraction_min": 0.1}, "has no effect with 'constant'"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, object], message: str) -> None:
    model = convnet()
    with pytest.raises(ValueError, match=message):
        make("granet", model, sgd(model), **arguments)


def test_the_usual_minimum_gives_way() -> None:
    base = {"sparsity": 0.8, "t_end": 10, "prune_end": 3}
    assert Granet(**base, drop_anneal="constant").fraction_at(5) == 0.5
    assert Granet(**base, drop_fraction=0.0).fraction_at(5) == 0.0
    assert Granet(**base).fraction_at(9) == pytest.approx(0.005)


@given(st.integers(1, 30), st.integers(1, 200), st.sampled_from([0.0, 0.5, 0.8]))
def test_costs_are_the_average_over_the_steps(delta_t: int, prune_end: int, initial: float) -> None:
    method = Granet(
        sparsity=0.8, initial_sparsity=initial, delta_t=delta_t, prune_end=prune_end, t_end=150
    )
    zeros, cost = initial, 0.0
    for step in range(200):
        forward = 1.0 - zeros / 0.8 * (1.0 - 0.3)
        cost += 3 * forward
        if method.due(step):
            cost += 1.0 - forward
            numel = 10**9
            zeros = max(zeros, 1 - method.num_kept(numel, step) / numel)
    assert method.step_flops(1.0, 0.3, 200) == pytest.approx(cost / 200, rel=1e-6)
    with pytest.raises(ValueError, match="pass total_steps"):
        method.step_flops(1.0, 0.3)
