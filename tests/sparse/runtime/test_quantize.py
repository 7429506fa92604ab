"""Quantized networks: calibration, the file, and the exact integers of the reference."""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse import runtime
from sparse.runtime import integers, units
from sparse.runtime.graph import Node
from tests.sparse.runtime.fuzzed import Quantized, content, quantized_seed, rewrite
from tests.sparse.runtime.integer_networks import Residual, write

Change = Callable[[Any, dict[str, Tensor]], None]


def small_resnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.MaxPool2d(3, 2, 1), Residual(16, 16, 1, nn.ReLU()), Residual(16, 24, 2, nn.ReLU6())),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)),
    ).eval()


@pytest.mark.parametrize("method", runtime.METHODS)
def test_int8_computes_about_what_the_network_computes(tmp_path: Path, method: str) -> None:
    model = small_resnet()
    write(tmp_path / "net", model, size=32, method=method)
    images = torch.randn(16, 3, 32, 32)
    network = runtime.load(tmp_path / "net", backend="torch")
    with torch.no_grad():
        wanted = model(images)
    found = network(images)
    assert not torch.equal(found, wanted)  # it is int8 that runs
    assert float((found - wanted).norm() / wanted.norm()) < 0.1
    assert torch.equal(network(images[3]), found[3])


def test_a_network_that_was_saved_in_half_precision_is_quantized_as_its_float32(
    tmp_path: Path,
) -> None:
    half = small_resnet().bfloat16()
    write(tmp_path / "half", half, size=32, masks={})
    write(tmp_path / "float", half.float(), size=32, masks={})
    (header, tensors), (same, others) = content(tmp_path / "half"), content(tmp_path / "float")
    assert header == same
    assert all(torch.equal(value, others[name]) for name, value in tensors.items())


def test_the_same_images_give_the_same_integers(tmp_path: Path) -> None:
    masks = {
        name: value != 0 for name, value in small_resnet().state_dict().items() if value.dim() > 1
    }
    for name in ("a", "b"):
        write(tmp_path / name, small_resnet(), size=32, masks=masks)
    (header, tensors), (same, others) = content(tmp_path / "a"), content(tmp_path / "b")
    assert header == same
    assert all(torch.equal(value, others[name]) for name, value in tensors.items())


def test_masks_are_kept_and_active_weights_that_round_to_zero_stay_stored(tmp_path: Path) -> None:
    model = small_resnet()
    weight = model[4].first.weight
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    weight.data *= mask
    weight.data[tuple(mask.nonzero()[5])] = 1e-7
    compact = write(tmp_path / "net", model, size=32, masks={"4.first.weight": mask})
    assert torch.equal(compact.masks()["4.first.weight"], mask)
    stored = content(tmp_path / "net")[1]["4.first.weight.values"]
    assert stored.dtype == torch.int8
    assert int(stored[5]) == 0
    assert int(stored.abs().max()) == 127


def test_channels_whose_bias_is_all_they_have_keep_it(tmp_path: Path) -> None:
    conv, linear = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
    with torch.no_grad():
        conv.weight[0], conv.weight[1] = 0, 1e-13  # dead, and nearly so
        conv.bias.copy_(torch.tensor([0.7, 0.7, 0.7, -0.7]))
        linear.weight.copy_(torch.eye(4)[:2])
        linear.bias.zero_()
    model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear).eval()
    write(tmp_path / "net", model, size=8, masks={}, method="minmax")
    found = runtime.load(tmp_path / "net", backend="torch")(torch.randn(2, 3, 8, 8))
    assert torch.allclose(found, torch.full_like(found, 0.7), atol=0.02)


def test_the_integers_of_a_small_network_by_hand(tmp_path: Path) -> None:
    """Scales are powers of two, so that every step can be done in the head."""
    nodes = [
        Node(name="conv", op="conv", inputs=("input",), parameters="conv."),
        Node(name="relu", op="relu", inputs=("conv",)),
        Node(name="mean", op="mean_pool", inputs=("relu",)),
        Node(name="fc", op="linear", inputs=("mean",), parameters="fc."),
    ]
    state = {
        "conv.weight": torch.tensor([127.0, -64.0]).reshape(2, 1, 1, 1) / 64,
        "conv.bias": torch.tensor([0.5, 1.0]),
        "fc.weight": torch.tensor([[127.0, 1.0]]) / 32,
        "fc.bias": torch.tensor([-1.0]),
    }
    state["conv.weight"][1] = -127 / 128  # scales of the channels: 1/64 and 1/128
    activations = {"input": (0.125, 100), "relu": (0.25, 0), "mean": (0.25, 0)}
    path = tmp_path / "net"
    runtime.save(
        path,
        state,
        {},
        nodes=nodes,
        arch="hand",
        model={},
        image_size=2,
        mean=(0.0,),
        std=(1.0,),
        in_channels=1,
        dtype="int8",
        fold=True,
        activations=activations,
    )
    images = torch.tensor([[0.0, 1.0], [-1.0, 100.0]]).reshape(1, 1, 2, 2)
    values: dict[str, Tensor] = {}
    logits = integers.run(runtime.read(path).integers(), images, values=values)
    # x / 0.125 + 100, saturated at 255
    assert values["input"].flatten().tolist() == [100, 108, 92, 255]
    # channel 0: bias 0.5 / (1/512) = 256; sums 256 + 127 * (0, 8, -8, 155); times (1/512) / 0.25
    # channel 1: bias 1 / (1/1024) = 1024; sums 1024 - 127 * (...); times (1/1024) / 0.25
    sums = [256 + 127 * d for d in (0, 8, -8, 155)], [1024 - 127 * d for d in (0, 8, -8, 155)]
    wanted = [[max(0, round(s / 128)) for s in sums[0]], [max(0, round(s / 256)) for s in sums[1]]]
    assert values["relu"].flatten(2).tolist() == [wanted]
    assert wanted == [[2, 10, 0, 156], [4, 0, 8, 0]]
    # 168 / 4 = 42 and 12 / 4 = 3, in the same scale
    assert values["mean"].tolist() == [[42, 3]]
    # weights 127 and 1 of scale 1/32, bias -1 / (1/128) = -128
    assert logits.tolist() == [[(127 * 42 + 3 - 128) / 128]]


@given(
    st.integers(0, 255),
    st.floats(2.0**-20, 2.0**10, width=32),
    st.floats(-1000.0, 1000.0, width=32),
)
def test_the_multiply_add_rounds_once(x: int, factor: float, added: float) -> None:
    exact = Fraction(x) * Fraction(factor) + Fraction(added)
    found = integers.fused_multiply_add(
        torch.tensor([x], dtype=torch.uint8), torch.tensor(factor), torch.tensor(added)
    ).item()
    below, above = (float(np.nextafter(np.float32(found), np.float32(s))) for s in (-9e9, 9e9))
    error = abs(Fraction(found) - exact)
    assert error <= min(abs(Fraction(near) - exact) for near in (below, above))


def test_the_multiply_add_rounds_once_where_float64_does_not_hold_the_sum() -> None:
    # 1 + 2^-24 lies in the middle of two floats; 2^-70 decides, which float64 has lost
    added = torch.tensor(1.0)
    for sign, wanted in ((1, 1.0 + 2.0**-23), (-1, 1.0)):
        factor = torch.tensor(2.0**-24 * (1 + sign * 2.0**-23))
        for x in (1, 2, 3):
            found = integers.fused_multiply_add(torch.tensor(x, dtype=torch.uint8), factor, added)
            exact = 1 + x * Fraction(factor.item())
            assert Fraction(found.item()) in (
                Fraction(1),
                1 + Fraction(2) ** -23,
                1 + Fraction(2) ** -22,
            )
            assert abs(Fraction(found.item()) - exact) <= Fraction(2) ** -24
            if x == 1:
                assert found.item() == wanted


def test_pools_that_change_nothing_vanish_and_others_run_in_float32(tmp_path: Path) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(8)),
        *(nn.Flatten(), nn.Dropout(), nn.Linear(256, 5)),
    ).eval()
    compact = write(tmp_path / "net", model, size=8)
    assert [node.op for node in compact.header.nodes] == ["conv", "relu", "linear"]
    model[2], model[5] = nn.AdaptiveAvgPool2d(4), nn.Linear(64, 5)
    compact = write(tmp_path / "net", model, size=8)
    kinds = {unit.node.op: unit.is_int8 for unit in compact.integers().units}
    assert kinds == {"conv": True, "adaptive_avg_pool": False, "linear": True}


class Mixed(nn.Module):
    """A block of ResNet between operations that int8 lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.norm, self.last, self.fc = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.second(F.relu(self.first(x))))
        x = F.gelu(self.last(F.relu6(x)))
        return self.fc(F.relu(self.norm(x)).mean((2, 3)))


def test_what_int8_lacks_runs_in_float32_between_units_of_int8(tmp_path: Path) -> None:
    compact = write(tmp_path / "net", Mixed().eval(), size=8)
    found = [(u.node.op, u.is_int8, u.gives_bytes) for u in compact.integers().units]
    assert found == [
        *[("conv", True, True)] * 3,
        *[("add", True, True), ("relu6", True, True), ("conv", True, False)],
        *[(op, False, False) for op in ("gelu", "batch_norm", "relu", "mean_pool")],
        ("linear", True, False),
    ]
    read = {unit.node.inputs for unit in compact.integers().units if unit.is_int8}
    assert compact.header.activations.keys() == {name for names in read for name in names}


def test_a_sum_with_a_value_of_float32_is_float32_and_so_are_the_others_of_it() -> None:
    nodes = [
        Node(name="a", op="conv", inputs=("input",), parameters="a."),
        Node(name="b", op="conv", inputs=("a",), parameters="b."),
        Node(name="c", op="silu", inputs=("b",)),
        Node(name="sum", op="add", inputs=("a", "c")),
        Node(name="relu", op="relu", inputs=("sum",)),
        Node(name="pool", op="max_pool", inputs=("relu",)),
        Node(name="d", op="conv", inputs=("pool",), parameters="d."),
    ]
    found = {unit.name: (unit.is_int8, unit.gives_bytes) for unit in units.units(nodes)}
    assert found.pop("a") == found.pop("b") == found.pop("d") == (True, False)
    assert found == dict.fromkeys(("c", "sum", "relu", "pool"), (False, False))
    assert units.quantized_values(units.units(nodes)) == ["input", "a", "pool"]


def test_a_pool_has_the_scale_of_what_it_reads_where_int8_reads_both() -> None:
    nodes = [
        Node(name="a", op="silu", inputs=("input",)),
        Node(name="pool", op="max_pool", inputs=("a",), kernel=(3, 3), padding=(1, 1)),
        Node(name="b", op="conv", inputs=("a",), parameters="b."),
        Node(name="c", op="conv", inputs=("pool",), parameters="c."),
        Node(name="sum", op="add", inputs=("b", "c")),
    ]
    images = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
    state = {f"{name}.weight": torch.ones(2, 3, 1, 1) for name in "bc"}
    chosen = runtime.calibrate(nodes, state, images)[1]
    assert chosen["pool"] == chosen["a"]
    alone = [replace(node, inputs=("pool",)) if node.name == "b" else node for node in nodes]
    assert runtime.calibrate(alone, state, images)[1].keys() == {"pool"}


@pytest.mark.parametrize("last", [nn.ReLU(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())])
def test_a_network_may_end_with_any_operation(tmp_path: Path, last: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), last).eval()
    write(tmp_path / "net", model, size=8)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        wanted = model(images)
    found = runtime.load(tmp_path / "net", backend="torch")(images)
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


def test_a_network_without_weights_is_refused() -> None:
    model = nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(3)).eval()
    message = "int8 needs a convolution or a linear layer, this network has none: export float32"
    with pytest.raises(ValueError, match=message):
        runtime.calibrate(runtime.trace(model), model.state_dict(), [torch.randn(2, 3, 8, 8)])


def test_calibration_refuses_what_it_cannot_use() -> None:
    model = small_resnet()
    nodes, state = runtime.trace(model), model.state_dict()
    with pytest.raises(ValueError, match="there are no images"):
        runtime.calibrate(nodes, state, [])
    with pytest.raises(ValueError, match="must be one of mse, percentile, minmax, got 'max'"):
        runtime.calibrate(nodes, state, [torch.zeros(1, 3, 8, 8)], method="max")
    with pytest.raises(ValueError, match="the value of 'input' is not finite"):
        runtime.calibrate(nodes, state, [torch.full((1, 3, 8, 8), math.inf)])
    state["0.weight"] *= math.nan
    with pytest.raises(ValueError, match=r"the value of '.*' is not finite"):
        runtime.calibrate(nodes, state, [torch.zeros(1, 3, 8, 8)])


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"fold": False}])
def test_quantized_files_are_folded_and_int8(tmp_path: Path, options: dict[str, Any]) -> None:
    model = Quantized().eval()
    nodes, activations = runtime.calibrate(
        runtime.trace(model), model.state_dict(), [torch.randn(2, 3, 9, 9)]
    )
    given: dict[str, Any] = {"dtype": "int8", "fold": True} | options
    with pytest.raises(ValueError, match="activations, and no weights in int8 or no folding"):
        runtime.save(
            tmp_path / "net",
            model.state_dict(),
            {},
            nodes=nodes,
            arch="some",
            model={},
            image_size=9,
            mean=(0.0,) * 3,
            std=(1.0,) * 3,
            activations=activations,
            **given,
        )
    assert not (tmp_path / "net").exists()


def test_files_without_activations_are_those_of_before(
    tmp_path: Path, save: Callable[..., Path]
) -> None:
    path = save(small_resnet(), dtype="int8", fold=True)
    header, tensors = content(path)
    assert "activations" not in header
    images = torch.randn(2, 3, 32, 32)
    wanted = runtime.load(path, backend="torch")(images)
    rewrite(path, header | {"activations": {}}, tensors)
    assert torch.equal(runtime.load(path, backend="torch")(images), wanted)
    with pytest.raises(ValueError, match="not quantized"):
        runtime.read(path).integers()


def entry(name: str, scale: object, zero_point: object = 0) -> Change:
    return lambda header, tensors: header["activations"].update({name: [scale, zero_point]})


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda header, tensors: tensors.update({name: change(tensors[name])})


def smallest(value: Tensor) -> Tensor:
    return torch.full_like(value, -128)


def with_mask(name: str) -> Change:
    def change(header: Any, tensors: dict[str, Tensor]) -> None:
        value = tensors.pop(name)
        header["shapes"][name] = list(value.shape)
        tensors[name + ".values"] = value
        tensors[name + ".mask"] = torch.full(((len(value) + 7) // 8,), 255, dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, tensors: header["activations"].pop("mean"), "'mean' has no scale"),
        (lambda header, tensors: header["activations"].pop("input"), "'input' has no scale"),
        (lambda header, tensors: header.update(activations=[]), "activations that is not a mapp"),
        (lambda header, tensors: header.update(dtype="float32"), "no weights in int8"),
        (entry("last", 0.1), "'last' has a scale and is no value between units"),
        (entry("stem", 0.1), "'stem' has a scale and is no value between units"),
        (entry("nobody", 0.1), "'nobody' has a scale and is no value between units"),
        (entry("mean", 0.0), "the scale of 'mean' is 0.0"),
        (entry("mean", -1), "the scale of 'mean' is -1.0"),
        (entry("mean", 1e20), r"the scale of 'mean' is 1e\+20"),
        (entry("mean", 0.1), "the scale of 'mean' is 0.1: it must be a float32"),
        (entry("mean", "0.1"), "activations that is not a mapping of pairs"),
        (entry("mean", True), "activations that is not a mapping of pairs"),
        (entry("mean", 0.5, 256), "the zero point of 'mean' is 256"),
        (entry("mean", 0.5, -1), "the zero point of 'mean' is -1"),
        (entry("mean", 0.5, 2.0), "activations that is not a mapping of pairs"),
        (entry("relu", 0.5, 3), "the zero point of 'relu' is 3: after a ReLU it is 0"),
        (entry("pool", 0.5), "max_pool 'pool' has another scale or zero point than what it reads"),
        (tensor("stem.weight.scale", torch.zeros_like), "'stem.weight.scale' has a scale that is"),
        (tensor("fc.weight.scale", lambda t: t * math.nan), "'fc.weight.scale' has a scale that"),
        (tensor("fc.weight", smallest), "'fc.weight' has the value -128"),
        (tensor("wide.weight.values", smallest), "'wide.weight.values' has the value -128"),
        (tensor("fc.bias", lambda t: t * math.inf), "the bias of 'fc.weight' is not finite"),
        (tensor("wide.weight.values", lambda t: t.float()), "'wide.weight.scale' twice, or with"),
        (with_mask("fc.bias"), "'fc.bias' has a mask"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: Change, message: str) -> None:
    path = quantized_seed(tmp_path)
    header, tensors = content(path)
    change(header, tensors)
    rewrite(path, header, tensors)
    with pytest.raises(ValueError, match=message) as error:
        runtime.read(path)
    assert str(error.value).isprintable()


def test_sums_that_32_bits_do_not_hold_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 170 * 170, 1)).eval()
    nn.init.constant_(model[1].weight, 1.0)
    with pytest.raises(ValueError, match=r"sums of '1\.weight' may be larger than"):
        write(tmp_path / "net", model, size=170, masks={})
