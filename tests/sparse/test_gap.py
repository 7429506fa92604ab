"""GaP: partitions in turn, counts, what begins anew, costs."""

import math
from typing import Any

import pytest
import torch

import sparse
from sparse.methods import Gap
from sparse.methods.gap import magnitude_sparsities, num_kept
from tests.sparse.nets import GAP, assert_inactive_zero, convnet, make, sgd, train


@pytest.mark.parametrize("method", ["gap", "gap_magnitude"])
def test_one_partition_is_dense_at_a_time(method: str) -> None:
    model = convnet()
    before = {name: weight.detach().clone() for name, weight in sparse.prunable(model).items()}
    optimizer = sgd(model)
    partitions = ["0,3", "7"]
    sparsifier = make(method, model, optimizer, partitions=partitions, distribution="uniform")
    sizes = {name: weight.numel() for name, weight in sparse.prunable(model).items()}
    parts = [{"0.weight", "3.weight"}, {"7.weight"}]
    first = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    if method == "gap_magnitude":
        assert first["7.weight"].sum() == num_kept(sizes["7.weight"], 0.8)
        kept = before["7.weight"].abs()
        assert kept[first["7.weight"]].min() > kept[~first["7.weight"]].max()
    else:
        assert first["7.weight"].sum() == int(sizes["7.weight"] * (1 - 0.8))
    for step in train(model, optimizer, range(20)):
        phase = (step + 1) // 4
        for name, size in sizes.items():
            count = sparsifier.num_active[name]
            if name == "9.weight" or (phase < 4 and name in parts[phase % 2]):
                assert count == size
            elif phase > 0 or name not in parts[1]:
                assert count == size - 1 - math.floor(0.8 * (size - 1))
            else:
                assert count == first[name].sum()
        assert_inactive_zero(sparsifier, model, optimizer)
    assert sparsifier.num_updates == 4
    assert sparsifier.num_active == sparsifier.method.final_counts


def test_a_phase_begins_with_a_new_optimizer_and_grown_weights_at_0() -> None:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make("gap", model, optimizer)
    list(train(model, optimizer, range(3)))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    dense = [name for name, mask in sparsifier.masks.items() if mask.all()]
    optimizer.param_groups[0]["lr"] = 0.0
    list(train(model, optimizer, range(3, 4)))
    optimizer.param_groups[0]["lr"] = 0.1
    for name, weight in sparse.prunable(model).items():
        if name in dense:  # pruned now
            expected = before[name] * sparsifier.masks[name]
            kept, left = before[name].abs(), sparsifier.masks[name]
            assert kept[left].min() > kept[~left].max()
        else:
            expected = before[name]
        assert torch.equal(weight, expected)
    assert not any(optimizer.state.values())


def test_masks_of_sparse_layers_stay_until_their_turn() -> None:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make("gap", model, optimizer, partitions=["0", "3", "7"], distribution="uniform")
    list(train(model, optimizer, range(2)))
    third = sparsifier.masks["7.weight"]
    list(train(model, optimizer, range(2, 5)))
    assert torch.equal(sparsifier.masks["7.weight"], third)
    first = sparsifier.masks["0.weight"]
    list(train(model, optimizer, range(5, 9)))
    assert torch.equal(sparsifier.masks["0.weight"], first)
    assert sparsifier.masks["7.weight"].all()


def test_layers_in_no_partition_are_dense_and_the_rest_meets_the_sparsity() -> None:
    model = convnet()
    sparsifier = make("gap", model, sgd(model), partitions=["3", "7"], distribution="erk")
    final = sparsifier.method.final_counts
    sizes = {name: weight.numel() for name, weight in sparse.prunable(model).items()}
    assert final["0.weight"] == sizes["0.weight"]
    assert final["9.weight"] == sizes["9.weight"]
    pruned = final["3.weight"] + final["7.weight"]
    assert pruned == pytest.approx(0.2 * (sizes["3.weight"] + sizes["7.weight"]), abs=3)


def test_the_stages_of_a_resnet_are_its_partitions() -> None:
    from torchvision.models import resnet18

    with torch.device("meta"):
        model = resnet18()
    method = Gap(sparsity=0.8, phase=1).fitted_to(model)
    assert [len(part) for part in method.members] == [4, 5, 5, 5]
    dense = [name for name, count in method.final_counts.items()
             if count == method.allocation.sizes[name]]  # fmt: skip
    assert {"conv1.weight", "fc.weight"} <= set(dense)


def test_a_map_from_the_magnitudes_of_all_layers() -> None:
    weights = {"a": torch.tensor([1.0, 2, 3, 4]), "b": torch.tensor([5.0, 6, 0, 0, 0, 0, 0])}
    # of 11 weights 11 - 1 - floor(0.5 * 10) = 5 are kept: 6, 5, 4, 3 and 2
    assert magnitude_sparsities(weights, 0.5) == {"a": 1 / 4, "b": pytest.approx(5 / 7)}


def test_costs_are_those_of_the_partitions() -> None:
    method = Gap(sparsity=0.8, partitions=["0", "3"], phase=10, num_phases=4)
    # in 40 of 100 steps half of what is sparse in the end is dense
    assert method.step_flops(1.0, 0.2, 100) == pytest.approx(3 * (0.2 + 0.4 * 0.8 / 2))
    with pytest.raises(ValueError, match="pass total_steps"):
        method.step_flops(1.0, 0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"partitions": ["0"]}, r"partitions must be two globs or more, got \['0'\]"),
        ({"partitions": "0"}, "partitions must be two globs or more, got '0'"),
        ({"partitions": None}, r"partitions: 'layer1\.\*' matches no prunable layer"),
        ({"partitions": ["0,3", "3,7"]}, r"partitions: 3\.weight is in more than one"),
        ({"phase": 0}, "phase must be at least 1, got 0"),
        ({"num_phases": 0}, "num_phases must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    model = convnet()
    with pytest.raises(ValueError, match=message):
        make("gap", model, sgd(model), **{**GAP, **arguments})
