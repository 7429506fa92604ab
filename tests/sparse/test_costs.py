"""Costs against the figures of the original counter and against torch's own FLOP counter.

tests/data/oracle.json holds what the code behind the published tables returned for 197
configurations: per-layer costs, densities, totals.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from image_classification.models.factory import create_model
from sparse import costs
from sparse.methods import Gmp, Rigl, Set, Snfs, Static

ORACLE = json.loads((Path(__file__).parents[1] / "data/oracle.json").read_text())
STATIC = Static(sparsity=0.5)
SNFS = Snfs(sparsity=0.5, t_end=1)
RIGL = Rigl(sparsity=0.5, t_end=1)
MODELS = ("resnet50", "mobilenet_v1", "mobilenet_v1_conv_fc")


def model_for(name: str) -> nn.Module:
    """Return the network of an oracle entry; conv_fc has its classifier as a 1x1 convolution."""
    arch = name.removesuffix("_conv_fc")
    with torch.device("meta"):
        model = create_model(arch)
        if name != arch:
            model.fc = nn.Sequential(
                nn.Unflatten(1, (-1, 1, 1)), nn.Conv2d(1024, 1000, 1), nn.Flatten()
            )
    return model


def gmp(start: int, end: int, every: int) -> Gmp:
    return Gmp(sparsity=0.5, prune_start=start, prune_end=end, prune_every=every)


@pytest.fixture(scope="module")
def traced() -> dict[str, list[costs.LayerCost]]:
    return {name: costs.trace_layers(model_for(name)) for name in MODELS}


def densities(layers: list[costs.LayerCost], config: dict[str, Any]) -> dict[str, float]:
    return {layer.name: d for layer, d in zip(layers, config["density"], strict=True)}


def in_oracle_order(name: str, layers: list[costs.LayerCost]) -> list[costs.LayerCost]:
    by_name = {layer.name.replace("fc.1.", "fc."): layer for layer in layers}
    return [by_name[entry["name"]] for entry in ORACLE["models"][name]["layers"]]


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_costs_what_the_original_counter_says(
    name: str, traced: dict[str, list[costs.LayerCost]]
) -> None:
    layers = in_oracle_order(name, traced[name])
    entries = ORACLE["models"][name]["layers"]
    assert len(layers) == len(traced[name]) == len(entries)
    for layer, entry in zip(layers, entries, strict=True):
        assert list(layer.shape) == entry["shape"]
        assert layer.flops() == entry["published_flops"]
        assert layer.flops(convention="true") == entry["true_flops"]
        assert layer.flops(convention="macs") == layer.macs == entry["macs"]


@pytest.mark.parametrize("name", MODELS)
def test_totals_of_every_configuration_match_the_original_counter(
    name: str, traced: dict[str, list[costs.LayerCost]]
) -> None:
    layers = in_oracle_order(name, traced[name])
    for key, config in ORACLE["models"][name]["configs"].items():
        counts = {layer.name: n for layer, n in zip(layers, config["num_active"], strict=True)}
        for method in (STATIC, SNFS, RIGL):
            report = costs.report(
                layers, densities(layers, config), method=method, num_active=counts
            )
            ours = [report["inference_flops"], report["inference_ratio"], report["size_mb"]]
            ours += [report["overall_sparsity"], report["training_ratio"]]
            theirs = [config["inference_flops"], config["inference_ratio"], config["size_mb"]]
            theirs += [config["overall_sparsity"], config[method.name]]
            assert ours == pytest.approx(theirs, rel=1e-12), key
        for convention in ("true", "macs"):
            report = costs.report(layers, densities(layers, config), convention=convention)
            assert report["inference_ratio"] == pytest.approx(
                config[f"{convention}_ratio"], rel=1e-12
            ), key


def test_dense_totals_are_the_published_ones(traced: dict[str, list[costs.LayerCost]]) -> None:
    for name in MODELS:
        dense = ORACLE["models"][name]["dense"]
        report = costs.report(traced[name])
        assert report["inference_flops"] == dense["flops_notebook"]
        assert report["macs"] == dense["macs_true"]
        assert report["size_mb"] == pytest.approx(dense["mbytes"], rel=1e-12)
        assert (report["inference_ratio"], report["training_ratio"]) == (1, 1)
        assert report["overall_sparsity"] == 0


def test_a_convolution_by_hand() -> None:
    # 2 -> 3 channels, 3x3, stride 2, padding 1, 5x5 image: 3x3 outputs, 54 weights
    (layer,) = costs.trace_layers(nn.Conv2d(2, 3, 3, 2, 1), 5, in_channels=2)
    assert (layer.name, layer.num_weights) == ("weight", 54)
    assert (layer.macs, layer.out_elements) == (54 * 9, 27)
    assert layer.flops(0.5, "true") == 54 * 9 + 27
    # the first layer is strided, so the published geometry is ceil((5 + 2 - 2 + 2) / 2) = 4
    assert layer.flops(0.5) == 54 * 16 + 3 * 16
    assert layer.size_bits(1.0) == 32 * (54 + 3)
    assert layer.size_bits(0.5) == 32 * (27 + 3) + 54
    assert layer.size_bits(0.5, "true") == 32 * (27 + 3) + 54


def test_masks_of_blocks_have_a_bit_per_block() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 6, 3, groups=6))
    layers = costs.trace_layers(model, 9)
    densities = {layer.name: 0.5 for layer in layers}
    single = [costs.size_bytes([layer], {layer.name: 0.5}) for layer in layers]
    for block, divided in (((1, 4), [1]), ((2, 1), [0, 1, 2]), ((3, 2), [1]), ((1, 1), [])):
        numel = block[0] * block[1]
        saved = [n * (1 - 1 / numel) / 8 for n in (216, 432, 54)]
        wanted = sum(single) - sum(saved[index] for index in divided)
        assert costs.size_bytes(layers, densities, block=block) == wanted
        method = Rigl(sparsity=0.5, t_end=9, block=block)
        for said in ({"block": block}, {"method": method}):
            report = costs.report(layers, densities, **said)
            assert report["size_mb"] == wanted / 1e6
            assert sum(row["size_bytes"] for row in report["layers"]) == wanted
    with pytest.raises(ValueError, match="block must be two numbers"):
        costs.size_bytes(layers, densities, block=(4,))


def test_biases_that_do_not_exist_are_stored_in_the_published_convention_only() -> None:
    (layer,) = costs.trace_layers(nn.Conv2d(2, 3, 1, bias=False), 5, in_channels=2)
    assert layer.size_bits() == 32 * (6 + 3)
    assert layer.size_bits(convention="true") == 32 * 6


def test_a_transposed_convolution_uses_each_weight_once_per_input_position() -> None:
    (layer,) = costs.trace_layers(nn.ConvTranspose2d(2, 3, 2, 2), 4, in_channels=2)
    assert layer.macs == 2 * 3 * 4 * 16
    assert layer.out_elements == 3 * 64
    assert layer.num_biases == 3


def test_a_layer_used_twice_costs_twice_and_is_stored_once() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    (layer,) = costs.trace_layers(nn.Sequential(conv, nn.ReLU(), conv), 8)
    assert layer.macs == 2 * 81 * 64
    assert layer.size_bits() == 32 * (81 + 3)


@pytest.mark.parametrize(
    "arch",
    ["resnet50", "mobilenet_v1", "mobilenet_v2", "resnext50_32x4d", "densenet121", "wrn22_2",
     "efficientnet_b0", "convnext_tiny", "googlenet", "regnet_y_400mf"],
)  # fmt: skip
def test_macs_agree_with_the_flop_counter_of_torch(arch: str) -> None:
    with torch.device("meta"):
        model = create_model(arch)
    layers = costs.trace_layers(model, 96)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, 96, 96, device="meta"))
    assert 2 * costs.inference_flops(layers, convention="macs") == counter.get_total_flops()


def test_projections_of_attention_are_found_and_its_products_are_not_counted() -> None:
    with torch.device("meta"):
        model = torchvision.models.vit_b_16(weights=None)
    layers = {layer.name: layer for layer in costs.trace_layers(model)}
    projection = layers["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"]
    assert projection.shape == (3 * 768, 768)
    assert projection.macs == 197 * 3 * 768 * 768
    assert projection.num_biases == 3 * 768
    assert len(layers) == 50


def test_weights_without_a_part_in_inference_cost_only_bytes() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(12, 7)
            self.fc = nn.Linear(12, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.flatten(1))

    fc, spare = costs.trace_layers(TwoHeads(), 2)
    assert (fc.name, fc.macs) == ("fc.weight", 60)
    assert (spare.name, spare.macs, spare.flops()) == ("spare.weight", 0, 0)
    assert spare.size_bits(0.5) == 32 * (42 + 7) + 84


def test_tracing_leaves_the_model_alone() -> None:
    model = create_model("small_cnn").train()
    model.get_submodule("").register_buffer("untouched", torch.ones(1))
    before = copy.deepcopy(model.state_dict())
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    random = torch.get_rng_state()
    costs.trace_layers(model, 32)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.equal(random, torch.get_rng_state())


def test_mean_of_a_ramp_by_hand() -> None:
    # p = 0 and 1/2 give shares 0 and 7/8; then 1
    mean = gmp(10, 20, 5).mean_ramp(40)
    assert mean == pytest.approx((10 * 0 + 5 * 0 + 5 * 7 / 8 + 20) / 40)


def test_a_run_that_ends_inside_its_ramp() -> None:
    assert gmp(10, 20, 5).mean_ramp(12) == 0
    mean = gmp(10, 20, 5).mean_ramp(17)
    assert mean == pytest.approx(2 * 7 / 8 / 17)


@given(st.integers(0, 40), st.integers(1, 60), st.integers(1, 20), st.integers(1, 120))
def test_mean_of_a_ramp_is_the_average_over_the_steps(
    start: int, length: int, every: int, total: int
) -> None:
    end = start + length

    def share(step: int) -> float:
        if step < start:
            return 0
        if step >= end:
            return 1
        last = start + (step - start) // every * every
        return 1 - (1 - (last - start) / length) ** 3

    mean = gmp(start, end, every).mean_ramp(total)
    assert mean == pytest.approx(sum(map(share, range(total))) / total)


@pytest.mark.parametrize("sparsity", ["0.8", "0.9", "0.95", "0.965"])
def test_gmp_matches_the_published_average(
    sparsity: str, traced: dict[str, list[costs.LayerCost]]
) -> None:
    """The source averaged at steps 0, 1000, ..., 32000 with conv1 dense and fc always sparse.

    Ours is its mean to three digits; the fourth differs by 2.
    """
    layers = traced["resnet50"]
    sparse = dict.fromkeys((layer.name for layer in layers), 1 - float(sparsity))
    sparse["conv1.weight"] = 1.0
    at_start = dict.fromkeys(sparse, 1.0) | {"fc.weight": sparse["fc.weight"]}
    # a mean over 33 samples is one over a run of 33000 steps
    method = gmp(10_000, 25_000, 1_000)
    first, last = (costs.report(layers, d)["inference_ratio"] for d in (at_start, sparse))
    ours = first * costs.training_ratio(method, last / first, total_steps=33_000)
    assert ours == pytest.approx(ORACLE["gmp_mean_ratio"][sparsity], abs=5e-4)


def test_training_ratio_scales_with_the_length_of_training() -> None:
    assert costs.training_ratio(None, 1.0, multiplier=5) == 5
    assert costs.training_ratio(Set(sparsity=0.8, t_end=1), 0.2, multiplier=5) == pytest.approx(1.0)
    # (3 * 0.4 * 1 + 2 * 0.4 + 1) / (3 * 2) = 0.5
    assert costs.training_ratio(Rigl(sparsity=0.6, t_end=1, delta_t=1), 0.4) == pytest.approx(0.5)


@given(st.floats(0, 1), st.integers(1, 10_000))
def test_rigl_costs_between_a_static_and_a_dense_gradient_run(ratio: float, delta_t: int) -> None:
    static = costs.training_ratio(STATIC, ratio)
    snfs = costs.training_ratio(SNFS, ratio)
    rigl = costs.training_ratio(Rigl(sparsity=0.5, t_end=1, delta_t=delta_t), ratio)
    assert static <= rigl + 1e-12 <= snfs + 2e-12


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda ls: costs.inference_flops(ls, {"weight": 1.5}), r"\[0, 1\], got 1.5"),
        (lambda ls: costs.size_bytes(ls, {"conv9.weight": 0.5}), "conv9.weight"),
        (lambda ls: costs.report(ls, convention="exact"), "published, true, macs"),
        (lambda ls: costs.report(ls, method=gmp(0, 9, 1)), "pass total_steps"),
        (lambda _: gmp(9, 9, 1), "prune_start 9"),
        (lambda _: gmp(0, 9, 1).mean_ramp(0), "total_steps must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Any, words: str) -> None:
    layers = costs.trace_layers(nn.Conv2d(3, 3, 3), 8)
    with pytest.raises(ValueError, match=words):
        call(layers)
