"""SRigL: constant fan-in, ablated rows, growth by the mean gradient of the last steps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse
from sparse.methods import Srigl
from tests.sparse.nets import backward, convnet, images, make, mlp, rows, sgd, train


def fan_ins(sparsifier: sparse.Sparsifier) -> dict[str, list[int]]:
    masks = {n: m for n, m in sparsifier.masks.items() if n in sparsifier.maskable}
    return {name: sorted(set(mask.flatten(1).sum(1).tolist())) for name, mask in masks.items()}


@pytest.mark.parametrize("method", ["srigl", "srigl_whole"])
def test_every_row_has_as_many_weights(method: str) -> None:
    model = convnet()
    optimizer = sgd(model)
    options = {"drop_anneal": "constant", "drop_fraction": 0.5}
    options |= {"min_salient": 0.9} if method == "srigl" else {}
    sparsifier = make(method, model, optimizer, **options)
    record = sparsifier.method
    assert isinstance(record, Srigl)
    first = {name: [record.budgets[name] // len(m)] for name, m in sparsifier.masks.items()}
    assert fan_ins(sparsifier) == {n: first[n] for n in sparsifier.maskable}
    assert sparsifier.num_active == record.num_active
    ablated = 0
    for _ in train(model, optimizer, range(20)):
        found = fan_ins(sparsifier)
        for name, counts in found.items():
            mask = sparsifier.masks[name]
            rows = int((mask.flatten(1).sum(1) > 0).sum())
            assert counts[-1] == record.budgets[name] // rows
            assert counts in ([counts[-1]], [0, counts[-1]])
            ablated += len(mask) - rows
        if method == "srigl_whole":
            assert found == {n: first[n] for n in sparsifier.maskable}
    assert sparsifier.num_updates == 4
    assert (ablated > 0) == (method == "srigl")
    assert sparsifier.masks["9.weight"].flatten(1).any(1).all()  # the last layer keeps its rows


def update(
    weights: Tensor, gradient: Tensor, mask: Tensor, budget: int, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Run one update of a layer by its settings; return mask and weights."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    model[0].weight = nn.Parameter(weights * mask)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = Srigl(
        sparsity=0.5,
        delta_t=1,
        t_end=3,
        drop_anneal="constant",
        budgets={"0.weight": budget},
        **settings,
    )
    sparsifier = sparse.Sparsifier(
        model,
        optimizer,
        method,
        num_active={"0.weight": int(mask.sum())},
        maskable=["0.weight"],
        masks={"0.weight": mask},
    )
    model[0].weight.grad = gradient.clone()
    optimizer.step()
    assert sparsifier.num_updates == 1
    return sparsifier.masks["0.weight"], model[0].weight.detach()


def test_an_update_by_hand() -> None:
    """8 weights in 4 rows of 5. The last row has the smallest weights and no gradient."""
    weights = torch.tensor(
        [[9.0, 8, 0, 0, 0], [7, 6, 0, 0, 0], [5, 0.4, 0, 0, 0], [0.3, 0.2, 0, 0, 0]]
    )
    gradient = torch.tensor(
        [[0.0, 0, 1, 2, 3], [0, 0, 9, 8, 0], [0, 4, 0, 7, 0], [0, 0, 0.1, 0, 0]]
    )
    # Three are dropped: 0.2, 0.3 and 0.4. Of the gradients 9, 8 and 7 matter. So rows 0 and 1 and 2
    # have 2, 4 and 2 weights that matter, the last row none: it is ablated. 8 // 3 weights a row.
    new, values = update(weights, gradient, weights != 0, 8, drop_fraction=0.375, min_salient=1.0)
    assert new.int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0],
    ]
    assert values.tolist()[2] == [5, 0, 0, 0, 0]
    # Without ablation every row gets its two back: the last one 0.3 by index, and its gradient.
    new, values = update(weights, gradient, weights != 0, 8, drop_fraction=0.375, min_salient=0.0)
    assert new.int().tolist()[3] == [1, 0, 1, 0, 0]
    assert values[3, 0] == pytest.approx(0.3)


def test_so_many_rows_stay_that_they_can_hold_the_weights() -> None:
    weights = torch.tensor([[3.0, 0, 2, 1], [9, 8, 7, 0], [6, 5, 4, 0]])
    gradient = torch.full((3, 4), 0.1)
    new, _ = update(weights, gradient, weights != 0, 9, drop_fraction=0.0, min_salient=4.0)
    assert new.sum(1).tolist() == [3, 3, 3]  # two rows cannot hold 9; all have 3 that matter
    weights = torch.tensor([[3.0, 0, 0, 0], [9, 8, 7, 0], [6, 5, 4, 2]])
    new, _ = update(weights, gradient, weights != 0, 8, drop_fraction=0.0, min_salient=4.0)
    assert new.sum(1).tolist() == [2, 2, 2]  # 8 // 4 + 1 rows have to stay


@pytest.mark.parametrize("number", [1, 3])
def test_growth_is_by_the_mean_gradient_of_the_last_steps(number: int) -> None:
    model = convnet()
    optimizer = sgd(model, lr=0.0, momentum=0.0)
    sparsifier = make("srigl_whole", model, optimizer, gradient_steps=number)
    total = {name: torch.zeros_like(w) for name, w in sparse.prunable(model).items()}
    for step in range(4):
        optimizer.zero_grad()
        backward(model, images(step))
        assert sparsifier.needs_dense_gradients == (step >= 4 - number)
        if step >= 4 - number:
            for name, weight in sparse.prunable(model).items():
                total[name] += weight.grad / number
        before = sparsifier.masks
        optimizer.step()
    weights = sparse.prunable(model)
    expected = sparsifier.method.update(before, weights, total, 3, {})
    for name, mask in sparsifier.masks.items():
        assert torch.equal(mask, expected[name])


@pytest.mark.parametrize("stop", [5, 6, 7])
def test_a_run_goes_on_among_the_steps_it_gathers(stop: int) -> None:
    runs = []
    for stops in (False, True):
        model = convnet()
        optimizer = sgd(model)
        sparsifier = make("srigl", model, optimizer, gradient_steps=3)
        list(train(model, optimizer, range(stop)))
        if stops:
            saved = model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()
            assert (saved[2]["averaged"] != "[]") == (stop in (6, 7))
            model = convnet(seed=1)
            optimizer = sgd(model)
            sparsifier = make("srigl", model, optimizer, gradient_steps=3)
            for part, state in zip((model, optimizer, sparsifier), saved, strict=True):
                part.load_state_dict(state)
        list(train(model, optimizer, range(stop, 12)))
        runs.append([model.state_dict(), sparsifier.masks])
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_salient": -0.1}, "min_salient must not be negative, got -0.1"),
        ({"gradient_steps": 0}, r"gradient_steps must be in \[1, 4\], up to delta_t, got 0"),
        ({"gradient_steps": 5}, r"gradient_steps must be in \[1, 4\], up to delta_t, got 5"),
        ({"never_ablated": ["fc"]}, "never_ablated: 'fc' matches no prunable layer"),
        ({"sparsity": 0.99}, r"\d\.weight would have \d+ weights for \d+ outputs, less than one"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    model = convnet()
    with pytest.raises(ValueError, match=message):
        make("srigl", model, sgd(model), **arguments)


def test_costs() -> None:
    method = Srigl(sparsity=0.9, t_end=100, delta_t=10, gradient_steps=2)
    assert method.step_flops(1.0, 0.2) == pytest.approx((8 * 3 * 0.2 + 2 * (0.4 + 1.0)) / 10)


def test_steps_that_a_scaler_skips_are_not_gathered() -> None:
    """A fused step that overflowed has run its hooks; only the device knows that it was skipped."""
    results = []
    for planted in ({0, 1, 6}, set()):
        model = mlp().float()
        optimizer = sgd(model, fused=True)
        options = {"delta_t": 4, "t_end": 20, "gradient_steps": 3}
        sparsifier = make("srigl", model, optimizer, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
        step = 0
        for attempt in range(12 + len(planted)):
            optimizer.zero_grad()
            inputs, labels = rows(step)
            loss = nn.functional.cross_entropy(model(inputs.float()), labels)
            scaler.scale(loss).backward()
            if attempt in planted:
                model[0].weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            step += attempt not in planted
        assert (sparsifier.step, sparsifier.num_updates) == (12, 3)
        results.append([model.state_dict(), sparsifier.masks])
    torch.testing.assert_close(results[0], results[1])
