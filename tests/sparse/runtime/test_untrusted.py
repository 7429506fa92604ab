"""Compact files of strangers: whatever they hold, they load right or are refused in one line."""

import base64
import copy
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import export
from image_classification.models import create_model
from sparse import runtime
from sparse.runtime import bindings, memory
from sparse.runtime.format import PACKED
from sparse.runtime.header import MAX_JSON
from tests.sparse.runtime.fuzzed import (
    block_seeds,
    content,
    fuzz,
    quantized_seed,
    rewrite,
    seeds,
    sign,
    transformer_seeds,
)

Change = Callable[[Any, dict[str, Tensor]], None]


def test_changed_files_run_right_or_are_refused(kernels: bindings.Kernels, tmp_path: Path) -> None:
    outcomes = fuzz(kernels, 150, tmp_path)
    assert outcomes["right"] > 10
    assert outcomes["refused"] > 90


MASKED = ("stem.weight", "wide.weight", "fc.weight")


def node(op: str, field: str, value: object) -> Change:
    """Change a field of the first node of an operation."""

    def change(header: Any, tensors: dict[str, Tensor]) -> None:
        next(n for n in header["nodes"] if n["op"] == op)[field] = value

    return change


def named(name: str, field: str, value: object) -> Change:
    """Change a field of a node."""

    def change(header: Any, tensors: dict[str, Tensor]) -> None:
        next(n for n in header["nodes"] if n["name"] == name)[field] = value

    return change


def field(name: str, value: object) -> Change:
    return lambda header, tensors: header.update({name: value})


def tensor(name: str, value: Tensor) -> Change:
    return lambda header, tensors: tensors.update({name: value})


INDEX = "far.relative_position_index"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # wider than what it reads: reads beyond its input
        (
            tensor("last.weight", torch.ones(7, 4000)),
            r"'last.weight' is \(7, 4000\), the graph needs",
        ),
        (tensor("fc.bias", torch.ones(1)), r"'fc.bias' is \(1,\), the graph needs \(20,\)"),
        (tensor("fc.bias", torch.ones(20, dtype=torch.int64)), "'fc.bias' is torch.int64"),
        (tensor("lone.weight", torch.ones(11)), "'lone.weight' is .11,., the graph needs .12,."),
        (tensor("stem.weight.values", torch.ones(3)), "the mask has [0-9]+ active weights"),
        (tensor("stem.weight.mask", torch.ones(3, dtype=torch.uint8)), "'stem.weight.mask' is"),
        (tensor("more", torch.ones(3)), "holds 'more' twice, or without need"),
        (node("conv", "groups", 5), "5 groups do not divide"),
        (node("conv", "groups", 0), "groups 0 or eps"),
        (node("conv", "stride", [0, 1]), "stride must be at least 1"),
        (node("conv", "dilation", [1, -1]), "dilation must be at least 1"),
        (node("conv", "padding", [-1, 0]), "padding .-1, 0., groups"),
        (node("conv", "padding", [10**6, 0]), "spans more than 1024 pixels"),
        (node("conv", "kernel", [3, 5]), "the graph needs .12, 3, 3, 5."),
        (node("conv", "kernel", [3.0, 3]), "whose kernel is .3.0, 3."),
        (node("max_pool", "padding", [2, 0]), "more than half of the kernel"),
        (node("max_pool", "dilation", [2, 2]), "max_pool. has no dilation"),
        (node("relu", "kernel", [3, 3]), "relu. has no kernel"),
        (node("mul", "inputs", ["input", "sigmoid"]), "mul. reads|no operation reads the value"),
        (node("sigmoid", "op", "max_pool"), "no max_pool of vectors"),
        (node("add", "inputs", ["input", "input"]), "no operation reads the value"),
        (node("add", "inputs", ["add", "add"]), "which was not computed before"),
        (node("mean_pool", "op", "conv"), "multiplies maps by vectors only .operation 'mul'"),
        (node("linear", "op", "relu"), "relu. has no parameters"),
        (node("concat", "inputs", ["avg_pool2d"]), "concat. reads .*not computed before"),
        (node("concat", "inputs", ["mean", "gate_0"]), "no concat of vectors"),
        (node("concat", "inputs", ["mean"] * 6000 + ["more"]), "more than 65536 or not"),
        (node("chunk", "index", 3), "there is no part 3 of 3"),
        (node("chunk", "index", -1), "there is no part -1 of 3"),
        (node("chunk", "groups", 4), "not 4 equal groups"),
        (node("chunk", "index", "0"), "whose index is '0'"),
        (node("shuffle", "groups", 5), "not 5 equal groups"),
        (node("shuffle", "index", 1), "shuffle. has no index"),
        (node("adaptive_avg_pool", "output", [0, 1]), "output must be at least 1"),
        (node("adaptive_avg_pool", "output", [10**6, 1]), "spans more than 1024 pixels"),
        (node("max_pool", "output", [2, 2]), "max_pool. has no output"),
        (tensor("flat.2.weight", torch.ones(12, 13)), "'flat.2.weight' is .12, 13., the graph"),
        (node("conv", "name", "a\nb"), "whose name is 'a.nb'"),
        (field("in_channels", 4), "mean that is not of in_channels numbers"),
        (field("in_channels", 0), "in_channels that is not 1 to"),
        (field("image_size", 10**9), "image_size that is not 1 to"),
        (field("mean", [0.5, 0.5, "0"]), "mean that is not numbers"),
        (field("std", [1, 1, 0]), "std that is not numbers above 0"),
        (field("std", [1, 1, float("nan")]), "std that is not numbers above 0"),
        (field("model", {"num_classes": [7]}), "model that is not a mapping"),
        (field("arch", "\ud800"), "arch that is not a string"),
        (field("dtype", "float8"), "dtype that is not one of"),
        (field("folded", 1), "folded that is not true or false"),
        (field("folded", True), "'norm.weight' should have been folded"),
        (field("names", []), "there is no 'fc.weight' for its shape"),
        (field("shapes", {n: [2**40] * 2 for n in MASKED}), "weight.mask' is torch.uint8"),
        (field("nodes", {}), "no list of nodes"),
        (field("nodes", []), "it has 0"),
        (field("later", 1), "lacks or adds 'later'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: Change, message: str) -> None:
    path = seeds(tmp_path)[3]  # not folded, float32
    header, tensors = content(path)
    change(header, tensors)
    rewrite(path, header, tensors)
    with pytest.raises(ValueError, match=message) as error:
        runtime.load(path, backend="torch")
    assert str(error.value).startswith(f"{path} is no valid compact sparse network: ")
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (node("attention", "heads", 5), "'mix' of 5 heads reads 36 channels"),
        (node("attention", "heads", 0), "heads 0 or score_scale 0.4 out of range"),
        (node("attention", "score_scale", float("nan")), "score_scale nan out of range"),
        (node("attention", "score_scale", -1), "score_scale -1 out of range"),
        (node("prepend", "tokens", 0), "index 0 or tokens 0 out of range"),
        (node("prepend", "tokens", 2), r"'c' is \(1, 1, 12\), 'tokens' needs 24 numbers"),
        (node("prepend", "size", [0, 3]), "size .0, 3. out of range"),
        (node("embedding", "size", [2, 10]), r"'p' is \(1, 10, 12\), 'placed' needs 240 numbers"),
        (node("scale", "parameters", "p"), "'p' is .*'scaled' needs 12 numbers: 1 for each of 12"),
        (node("scale", "parameters", "z"), "'z' is missing, 'scaled' needs 12 numbers"),
        (node("token", "index", -1), "index -1 or tokens 0 out of range"),
        (node("add", "size", [1, 10]), "has no size"),
        (node("layer_norm", "heads", 2), "has no heads"),
        (node("layer_norm", "eps", -1), "or eps -1 out of range"),
        (tensor("norm.weight", torch.ones(11)), "'norm.weight' is .11,., the graph needs .12,."),
        (tensor("s", torch.ones(12, dtype=torch.int64)), "'s' is torch.int64"),
        (named("near", "window", [2, 0]), "window .2, 0. out of range"),
        (named("near", "window", [2**40, 5]), "window .* out of range"),
        (named("near", "shift", [2, 1]), "shift .2, 1. of windows .2, 5. out of range"),
        (named("near", "shift", [-1, 1]), "shift .-1, 1. of windows .2, 5. out of range"),
        (named("far", "shift", [1, 1]), "shift .1, 1. of windows .2, 5. out of range"),
        (named("mix", "shift", [1, 1]), "'mix' .attention. has no shift"),
        (named("mix", "position_bias", "table"), "a position bias needs a window"),
        (named("mix", "position_bias", "other"), "whose position_bias is 'other'"),
        (named("near", "score_scale", 1.0), "'near' .attention. has no score_scale"),
        (named("mix", "cosine", True), "has no score_scale"),
        (named("wide", "key_bias", 3), "whose key_bias is 3"),
        (named("norm", "key_bias", False), "has no key_bias"),
        (named("padded", "start", [-1, 0]), "start .-1, 0. out of range"),
        (named("padded", "start", [0, 2**40]), "start .* out of range"),
        (named("padded", "output", [0, 10]), "output must be at least 1"),
        (named("padded", "output", [2, 2000]), "spans more than 1024 pixels"),
        (tensor(INDEX, torch.zeros(10, 10)), "index' is not int64, as indices are"),
        (tensor(INDEX, torch.full((10, 10), 27)), "numbers that are no row of the 27 of its table"),
        (tensor(INDEX, torch.full((10, 10), -1)), "numbers that are no row of the 27 of its table"),
        (tensor(INDEX, torch.zeros(9, 10).long()), "index' is .9, 10., 'far' needs 100 numbers"),
        (tensor("far.relative_position_bias_table", torch.ones(27, 2)), "the graph needs .27, 3."),
        (tensor("near.relative_coords_table", torch.ones(9, 3)), "the graph needs .9, 2."),
        (tensor("near.cpb_mlp.0.weight", torch.ones(5, 3)), "the graph needs .5, 2."),
        (tensor("near.cpb_mlp.0.bias", torch.ones(6)), "the graph needs .5,."),
        (tensor("near.cpb_mlp.2.weight", torch.ones(3, 5)), "the graph needs .2, 5."),
        (tensor("near.logit_scale", torch.ones(3)), "logit_scale' is .3,., 'near' needs 2 numbers"),
    ],
)
def test_what_does_not_fit_a_transformer_is_named(
    tmp_path: Path, change: Change, message: str
) -> None:
    path = transformer_seeds(tmp_path)[0]
    header, tensors = content(path)
    change(header, tensors)
    rewrite(path, header, tensors)
    with pytest.raises(ValueError, match=message) as error:
        runtime.load(path, backend="torch")
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (field("blocks", None), "blocks that is not a mapping of two numbers each"),
        (field("blocks", [[1, 4]]), "blocks that is not a mapping"),
        (field("blocks", {"fc.weight": [1, 4, 1]}), "blocks that is not a mapping"),
        (field("blocks", {"fc.weight": [1, 0]}), "blocks that is not a mapping"),
        (field("blocks", {"fc.weight": [True, 4]}), "blocks that is not a mapping"),
        (field("blocks", {"fc.weight": [1, 4.0]}), "blocks that is not a mapping"),
        (
            field("blocks", {"fc.weight": [1, 5]}),
            r"blocks of \(1, 5\) do not divide .* 'fc.weight'",
        ),
        (field("blocks", {"stem.weight": [1, 4]}), "blocks of .* do not divide .* 'stem.weight'"),
        (field("blocks", {"fc.bias": [1, 1]}), "blocks of .* do not divide the shape of 'fc.bias'"),
        (field("blocks", {"a\nb": [1, 4]}), "blocks of .* do not divide the shape of 'a.{1,2}nb'"),
        (field("blocks", {}), r"'wide.weight.mask' is torch.uint8 of \(14,\), not .* of \(54,\)"),
        (field("blocks", {"wide.weight": [1, 4]}), r"'fc.weight.mask' is .*\(8,\), not .*\(30,\)"),
        (tensor("fc.weight.values", torch.ones(3)), "the mask has [0-9]+ active weights"),
        (tensor("fc.weight.mask", torch.full((8,), 255, dtype=torch.uint8)), "has 240 active"),
        (tensor("fc.weight.mask", torch.ones(7, dtype=torch.uint8)), "fc.weight.mask' is torch"),
        (field("shapes", {n: [2**40] * 2 for n in MASKED}), "weight.mask' is torch.uint8"),
    ],
)
def test_what_does_not_fit_of_blocks_is_named(tmp_path: Path, change: Change, message: str) -> None:
    path = block_seeds(tmp_path)[0]  # of 1 x 4
    assert set(runtime.read(path).header.blocks) == {"wide.weight", "fc.weight"}
    header, tensors = content(path)
    change(header, tensors)
    rewrite(path, header, tensors)
    with pytest.raises(ValueError, match=message) as error:
        runtime.load(path, backend="torch")
    assert str(error.value).startswith(f"{path} is no valid compact sparse network: ")
    assert str(error.value).isprintable()


def test_a_mask_of_a_few_large_blocks_takes_no_memory(tmp_path: Path) -> None:
    path = block_seeds(tmp_path)[0]
    header, tensors = content(path)
    size = 2**40
    header["shapes"]["fc.weight"] = header["blocks"]["fc.weight"] = [size, size]
    tensors["fc.weight.mask"] = torch.zeros(1, dtype=torch.uint8)
    tensors["fc.weight.values"] = torch.zeros(0)
    rewrite(path, header, tensors)
    with pytest.raises(ValueError, match=r"its weights would take .* GiB"):
        runtime.read(path)


@pytest.mark.parametrize(
    ("op", "field", "value", "message"),
    [
        ("token", "index", 10, "'class' takes token 10"),
        ("embedding", "size", [10, 1], "'p' is made for a map of 10x1, .* give 10 tokens"),
        ("prepend", "size", [9, 1], "'c' is made for a map of 9x1, .* give a map of 3x3"),
        ("slice", "output", [3, 10], "'near' has windows of 2x5, which do not divide 3x10"),
    ],
)
def test_images_that_do_not_fit_the_tokens_are_refused(
    tmp_path: Path, op: str, field: str, value: object, message: str
) -> None:
    path = transformer_seeds(tmp_path)[0]
    header, tensors = content(path)
    node(op, field, value)(header, tensors)
    rewrite(path, header, tensors)
    network = runtime.load(path, backend="torch")
    with pytest.raises(ValueError, match=f"images of 9x9 do not fit this network.*{message}"):
        network(torch.zeros(3, 9, 9))


@pytest.mark.parametrize("text", ["", "3", "null", "[" * 100_000, "{", '{"a": 1}', "9" * 10_000])
def test_headers_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    path = seeds(tmp_path)[0]
    tensors = content(path)[1]
    for packs in (False, True):
        rewrite(path, text, tensors, packs=packs)
        with pytest.raises(
            ValueError, match="no valid compact sparse network: its header"
        ) as error:
            runtime.read(path)
        assert len(str(error.value)) < 600


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


WIDE = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**28}]
PACKED_HEADERS = {
    "JSON": ("{}", "no base64 of xz: "),
    "no ASCII": ("\u00e9", "no base64 of xz: "),
    "no xz": (base64_of(b"{}" * 50), "no base64 of xz: "),
    "no UTF-8": (base64_of(lzma.compress(b"{}\xff")), "no base64 of xz: "),
    "cut": (base64_of(lzma.compress(b"{}")[:-4]), "not one whole xz stream of at most"),
    "twice": (base64_of(2 * lzma.compress(b"{}")), "not one whole xz stream of at most"),
    "large": (
        base64_of(lzma.compress(bytes(MAX_JSON + 1))),
        f"not one whole xz stream of at most {MAX_JSON} bytes",
    ),
    "large dictionary": (
        base64_of(lzma.compress(b"{}", filters=WIDE)),
        "no base64 of xz: Memory usage limit",
    ),
}


@pytest.mark.parametrize(("text", "message"), PACKED_HEADERS.values(), ids=list(PACKED_HEADERS))
def test_packed_headers_that_are_none_or_large_are_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    path = seeds(tmp_path)[0]
    sign(path, text, content(path)[1], PACKED)
    with pytest.raises(ValueError, match=f"no valid .* network: its header is {message}") as error:
        runtime.read(path)
    assert str(error.value).isprintable()


def test_a_header_too_large_to_be_read_is_not_written(tmp_path: Path) -> None:
    seed = runtime.read(block_seeds(tmp_path)[0])
    options: dict[str, Any] = {"image_size": 9, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    options |= {"arch": "seed", "model": {"text": "x" * MAX_JSON}, "block": (1, 4)}
    path = tmp_path / "large"
    with pytest.raises(ValueError, match="its header is not one whole xz stream of at most"):
        runtime.save(path, seed.state_dict(), seed.masks(), nodes=seed.header.nodes, **options)
    assert not path.exists()


def test_quantized_files_and_blocks_of_the_first_version_are_read(tmp_path: Path) -> None:
    for path in (*block_seeds(tmp_path), quantized_seed(tmp_path)):
        wanted = runtime.read(path)
        rewrite(tmp_path / "first", *content(path))
        found = runtime.read(tmp_path / "first")
        assert found.header == wanted.header
        state = wanted.state_dict()
        assert all(torch.equal(value, state[n]) for n, value in found.state_dict().items())


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_images_that_would_take_too_much_memory_are_refused(
    tmp_path: Path, kernel_cache: Path, backend: str
) -> None:
    path = seeds(tmp_path)[0]
    arguments = {"backend": backend, "tune": False, "cache": kernel_cache}
    network = runtime.load(path, **arguments)
    with (
        mock.patch.object(memory, "limit", return_value=2**16),
        pytest.raises(ValueError, match=r"images of 99x99 are too large .* GiB"),
    ):
        network(torch.zeros(1, 3, 99, 99))
    with (
        mock.patch.object(memory, "limit", return_value=2**8),
        pytest.raises(ValueError, match="its weights would take"),
    ):
        runtime.load(path, **arguments)


@pytest.mark.parametrize("to", ["compact", "onnx"])
@pytest.mark.parametrize(
    "changes",
    [{"model": {"num_classes": 10**12}}, {"model": {"unknown": 1}}, {"arch": "resnet50"}],
)
def test_an_architecture_that_does_not_fit_is_one_line_of_the_program(
    tmp_path: Path,
    save: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    to: str,
) -> None:
    path = save(create_model("small_cnn", num_classes=7))
    header, tensors = content(path)
    rewrite(path, header | {"arch": "small_cnn"} | changes, tensors)
    assert export.main([str(path), str(tmp_path / "out"), "--to", to]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "does not have these weights" in captured.err
    assert not (tmp_path / "out").exists()


def test_a_pool_of_a_large_image_takes_no_memory(tmp_path: Path) -> None:
    path = seeds(tmp_path)[3]
    header, tensors = content(path)
    first = {"name": "first", "op": "adaptive_avg_pool", "inputs": ["input"], "output": [1, 8]}
    header["nodes"].insert(0, first)
    header["nodes"][1]["inputs"] = ["first"]
    rewrite(path, header, tensors)
    network = runtime.load(path, backend="torch")
    with pytest.raises(ValueError, match="adaptive pools would take 18874368 weights"):
        network(torch.zeros(()).expand(1, 3, 4096, 12288))


def test_a_file_of_padding_takes_no_memory(tmp_path: Path) -> None:
    path = seeds(tmp_path)[3]
    header, tensors = content(path)
    pool = next(n for n in header["nodes"] if n["op"] == "max_pool")
    # Each of them doubles the image, and none has weights.
    for i in range(40):
        grown = copy.deepcopy(pool)
        grown |= {"name": f"grown{i}", "kernel": [1024, 1024], "stride": [1, 1]}
        grown |= {"padding": [512, 512], "inputs": [f"grown{i - 1}" if i else "input"]}
        header["nodes"].insert(i, grown)
    header["nodes"][40]["inputs"] = ["grown39"]
    rewrite(path, header, tensors)
    network = runtime.load(path, backend="torch")
    with mock.patch.object(memory, "limit", return_value=2**20):
        with pytest.raises(ValueError, match="too large"):
            network(torch.zeros(1, 3, 512, 512))
        assert network(torch.zeros(1, 3, 9, 9)).shape == (1, 7)
