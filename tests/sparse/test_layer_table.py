"""`sparse.summary`: the table of the layers, for a terminal and for a notebook."""

import copy
import re
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import sparse
from sparse import costs
from tests.sparse.nets import METHODS, convnet, make, sgd, train


def small() -> tuple[nn.Sequential, sparse.Sparsifier]:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5))
    return model, sparse.static(model, sgd(model), sparsity=0.75, distribution="uniform",
                                dense_layers=["2.*"])  # fmt: skip


def words(text: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


def test_the_table_is_readable() -> None:
    model, sparsifier = small()
    with torch.no_grad():
        model[0].weight[sparsifier.masks["0.weight"]] = 1.0
    for given in (model, sparsifier):
        lines = str(sparse.summary(given)).splitlines()
        assert words("\n".join(lines)) == [
            ["layer", "shape", "density", "active"],
            [lines[1]],
            ["0.weight", "8 x 4", "25.0%", "8 of 32"],
            ["2.weight", "5 x 8", "100.0%", "40 of 40"],
            [lines[1]],
            ["2 layers", "66.7%", "48 of 72"],
            ["all parameters", "71.8%", "61 of 85"],
        ]
        assert set(lines[1]) == {"-"}
        assert lines[1] == lines[4]
        columns = [line.rindex("of") for line in lines if " of " in line]
        assert len(set(columns)) == 1  # aligned


@pytest.mark.parametrize("method", METHODS)
def test_it_agrees_with_the_metrics_and_the_costs(method: str) -> None:
    model = nn.Sequential(convnet()[:-1], nn.Linear(20, 4))
    optimizer = sgd(model)
    options = {"partitions": ["0.*", "1.*"]} if method.startswith("gap") else {}
    sparsifier = make(method, model, optimizer, **options)
    for _ in train(model, optimizer, range(6)):
        found = sparse.summary(sparsifier, (2, 6, 6))
        assert found.sparsity == pytest.approx(sparsifier.metrics()["sparsity"])
        assert {layer.name: layer.num_active for layer in found.layers} == sparsifier.num_active
    shares = [layer.flops_share for layer in found.layers]
    assert sum(shares) == pytest.approx(1.0)
    traced = costs.trace_layers(model, 6, in_channels=2)
    densities = {layer.name: layer.num_active / layer.num_weights for layer in found.layers}
    assert found.flops == costs.inference_flops(traced, densities, "true")
    assert found.dense_flops == costs.inference_flops(traced, None, "true")
    assert f"{shares[0]:.1%}" in str(found).splitlines()[2]
    assert f"{found.flops / found.dense_flops:.1%} of the dense model's" in str(found)


def test_asking_changes_nothing() -> None:
    model = convnet()
    sparsifier = make("rigl", model, sgd(model))
    before = copy.deepcopy((model.state_dict(), sparsifier.state_dict()))
    print(sparse.summary(sparsifier, (2, 6, 6)), sparse.summary(model))
    assert str(before) == str((model.state_dict(), sparsifier.state_dict()))


def test_a_notebook_shows_it_with_names_escaped() -> None:
    model = nn.Sequential(OrderedDict({"<b>&": nn.Conv2d(2, 3, 3), "flat": nn.Flatten()}))
    page = sparse.summary(model, (2, 6, 6))._repr_html_()
    assert "<td>&lt;b&gt;&amp;.weight</td><td>3 x 2 x 3 x 3</td><td>100.0%</td>" in page
    assert "<b>" not in page
    assert re.sub(r"<(/?)\w+>", "", page).count("<") == 0
    assert page.count("<tr>") == page.count("</tr>") == 4
    assert "<th>FLOPs</th>" in page
    assert "FLOPs" not in sparse.summary(model)._repr_html_()


def test_what_is_not_prunable_counts_as_dense() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    found = sparse.summary(model, (4, 8, 8))
    assert [layer.name for layer in found.layers] == ["1.weight"]
    assert found.num_other_parameters == 36 + 4 + 2 + 4
    assert 0 < found.layers[0].flops_share < 1


def test_weights_that_were_included_and_other_inputs() -> None:
    model = nn.Sequential(OrderedDict({"embed": nn.Embedding(9, 8), "lstm": nn.LSTM(8, 4)}))
    options = {"include": ["lstm.weight_*", "embed"], "distribution": "uniform", "t_end": 9}
    sparsifier = sparse.rigl(model, sgd(model), sparsity=0.5, dense_layers=[], **options)
    tokens = torch.zeros(6, dtype=torch.long)
    found = sparse.summary(sparsifier, inputs=[tokens])
    shares = {layer.name: layer.flops_share for layer in found.layers}
    assert list(shares) == ["embed.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    assert shares["embed.weight"] == 0.0
    assert sum(shares.values()) == pytest.approx(1.0)
    plain = sparse.summary(model, include=["lstm.weight_*", "embed"])
    assert [layer.num_active for layer in plain.layers] == [*sparsifier.num_active.values()]
    with pytest.raises(ValueError, match="include has no effect with a sparsifier"):
        sparse.summary(sparsifier, include=["embed"])


def test_mistakes_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"must be \(channels, side, side\), got \(3, 8, 9\)"):
        sparse.summary(convnet(), (3, 8, 9))
    with pytest.raises(ValueError, match=r"side\), without inputs, got \(3, 8, 8\)"):
        sparse.summary(convnet(), (3, 8, 8), inputs=[torch.zeros(1)])
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        sparse.summary(nn.ReLU())
    model = nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(12, 2)))
    assert sparse.summary(model).sparsity == 0.0
    with pytest.raises(ValueError, match=r"the FLOPs of 1.weight are unknown"):
        sparse.summary(model, (3, 2, 2))
