"""The costs command: its JSON against the original counter, its tables against the published."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import costs
from results import published
from scripts.rows import TABLES

ROOT = Path(__file__).parents[1]
ORACLE = json.loads((ROOT / "tests/data/oracle.json").read_text())
DENSE = {
    "all_sparse": [],
    "first_dense": ["conv1"],
    "first_last_dense": ["conv1", "fc"],
    "dw_first_dense": ["conv1"],
    "dw_first_last_dense": ["conv1", "fc"],
}


def configurations(arch: str) -> list[str]:
    """Return the oracle's configurations that are reachable by flags, depthwise layers dense."""
    chosen = {"resnet50": {*DENSE} - {"dw_first_dense", "dw_first_last_dense"}}
    chosen["mobilenet_v1"] = {"dw_first_dense", "dw_first_last_dense"}
    return [k for k in ORACLE["models"][arch]["configs"] if k.rpartition("/")[2] in chosen[arch]]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert costs.main(argv) == 0
    return capsys.readouterr().out


def report(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    return dict(json.loads(run(capsys, *argv, "--json")))


@pytest.mark.parametrize("arch", ["resnet50", "mobilenet_v1"])
def test_json_equals_the_original_counter_for_every_distribution(
    arch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [layer["name"] for layer in ORACLE["models"][arch]["layers"]]
    for key in configurations(arch):
        distribution, sparsity, dense = key.split("/")
        config = ORACLE["models"][arch]["configs"][key]
        flags = ["--arch", arch, "--distribution", distribution, "--sparsity", sparsity]
        ours = report(capsys, *flags, "--dense-layers", *DENSE[dense])
        layers = {layer["name"]: layer for layer in ours["layers"]}
        assert layers.keys() == set(names)
        assert [layers[n]["num_active"] for n in names] == config["num_active"], key
        assert [layers[n]["density"] for n in names] == pytest.approx(config["density"], rel=1e-12)
        for name, theirs in (("training_ratio", "rigl"), *((n, n) for n in TOTALS)):
            assert ours[name] == pytest.approx(config[theirs], rel=1e-12), (key, name)


def test_included_weights_are_counted_sparse(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--arch vit_b_32 --sparsity 0.9 --distribution uniform --include".split()
    attention = report(capsys, *flags, "*.in_proj_weight")
    embedding = report(capsys, *flags, "*.in_proj_weight", "*pos_embedding")
    first = next(layer for layer in attention["layers"] if layer["name"] == "conv_proj.weight")
    assert first["density"] == 1.0  # uniform keeps it dense
    total = sum(layer["num_weights"] for layer in attention["layers"])
    wanted = 0.9 * (1 - first["num_weights"] / total)
    assert attention["overall_sparsity"] == pytest.approx(wanted, abs=1e-5)
    (added,) = [x for x in embedding["layers"] if x["name"] == "encoder.pos_embedding"]
    assert (added["num_active"], added["flops"], added["dense_flops"]) == (3840, 0, 0)
    assert embedding["inference_flops"] == attention["inference_flops"]
    assert costs.main([*flags, "nothing"]) == 2
    assert "include: 'nothing' matches no parameter" in capsys.readouterr().err


def test_blocks_take_a_bit_each_and_are_counted_whole(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--arch resnet18 --sparsity 0.9".split()
    single, blocked = report(capsys, *flags), report(capsys, *flags, "--block", "1", "4")
    pairs = zip(single["layers"], blocked["layers"], strict=True)
    for one, other in pairs:
        weights = one["num_weights"]
        saved = 3 / 4 * weights / 8 if one["density"] < 1 else 0
        assert other["size_bytes"] == pytest.approx(one["size_bytes"] - saved, rel=1e-12)
        if saved:
            blocks = weights // 4
            assert other["num_active"] == 4 * (blocks - math.floor((1 - one["density"]) * blocks))
    for wrong, message in (
        (["--block", "4", "--sparsity", "0.9"], "block must be two numbers of at least 1"),
        (["--block", "1", "4"], "--block has no effect with --method dense"),
        (["--block", "1", "4", "--sparsity", "0.9", "--method", "gap"], "gap grows and prunes"),
    ):
        assert costs.main(wrong) == 2
        assert message in capsys.readouterr().err


TOTALS = ("inference_flops", "inference_ratio", "size_mb", "overall_sparsity")


def test_published_cells_match_or_carry_their_reason() -> None:
    table = published.table("rigl", costs.report_network)
    assert "resnet50: 60 of 69 cells" in table
    assert "mobilenet_v1: 3 of 18 cells" in table
    ceil = published.table("rigl", costs.report_network, rounding="ceil")
    assert "resnet50: 64 of 69 cells" in ceil
    assert "mobilenet_v1: 5 of 18 cells" in ceil
    rows = [line for line in table.splitlines() if line.startswith(("| rn50", "| mbv1"))]
    assert len(rows) == len(published.read_rows("rigl")) == 29
    for line in rows:
        for cell in line.split("|")[3:6]:
            assert cell.strip().endswith(("=", *published.REASONS)), line


@pytest.mark.parametrize("rounding", ["floor", "ceil"])
def test_cells_match_where_the_original_counter_matches(rounding: str) -> None:
    suffix = "" if rounding == "floor" else "_ceil2019"
    table = published.table("rigl", costs.report_network, rounding=rounding)
    lines = [line for line in table.splitlines() if line.startswith(("| rn50", "| mbv1"))]
    for line, theirs in zip(lines, ORACLE["published"], strict=True):
        for cell, name in zip(line.split("|")[3:6], ("train", "inference", "size"), strict=True):
            match = theirs["match"].get(name + suffix, theirs["match"][name])
            assert cell.strip().endswith("=") == match, line


def test_every_published_figure_of_the_table_is_the_one_in_the_record() -> None:
    for row, theirs in zip(published.read_rows("rigl"), ORACLE["published"], strict=True):
        assert row["published_top1"] == theirs["top1"]
        for name in ("train", "inference", "size"):
            assert row[f"published_{name}"] == theirs[name]


FIGURES = {  # of the authors' READMEs, and of SRigL's notebook
    "acdc": "76.45 75.03 73.14 68.48 75.04 73.28 76.09 74.29",
    "gap": "77.856 78.132 76.348 77.896",
    "granet": "",
    "srigl": "75.01 72.71 69.18 51.55 74.8 72.7 68.8 48.7",
}


@pytest.mark.parametrize("source", FIGURES)
def test_rows_of_other_methods_have_the_figures_of_their_authors(source: str) -> None:
    found = [row["published_top1"] for row in published.read_rows(source)]
    assert " ".join(found).strip() == FIGURES[source]


def test_costs_that_training_decides_are_not_made_up() -> None:
    table = published.table("acdc", costs.report_network)
    line = next(line for line in table.splitlines() if "rn50_global_0.98" in line)
    assert line == "| rn50_global_0.98 | 68.48 | - | - | - | 98.00 |"
    (row,) = (r for r in published.read_rows("acdc") if "uniform_0.9.sh" in r["script"])
    assert float(row["train"]) == pytest.approx(0.565, abs=6e-4)  # by the authors' accounting


def test_a_figure_that_is_not_printed_says_where_it_comes_from() -> None:
    table = published.table("srigl", costs.report_network)
    assert "| rn50_no_ablation_0.9 | 72.7 g |" in table
    assert f"\ng: {published.REASONS['g']}." in table
    assert "h: " not in table


def test_a_differing_cell_without_a_reason_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = published.read_rows("rigl")
    monkeypatch.setattr(published, "read_rows", lambda _: [{**rows[1], "differs": ""}])
    with pytest.raises(ValueError, match=r"rn50_erk_0\.8_5x\.sh: size 23\.683"):
        published.table("rigl", costs.report_network)


@pytest.mark.parametrize(
    ("printed", "ours", "cell"),
    [
        ("0.42", 0.4153, "0.42 ="),
        ("0.24", 0.2456, "0.24 / 0.2456 c"),
        ("5.8", 5.7903, "5.8 ="),
        ("3.2e18", 3.2253e18, "3.2e18 ="),
        ("1.14e9", 1.1562e9, "1.14e9 / 1.1562 c"),
    ],
)
def test_digits_are_compared_as_printed(printed: str, ours: float, cell: str) -> None:
    assert published.compare(printed, ours, "c")[0] == cell


def test_the_port_table_says_how_sparse_its_networks_really_are() -> None:
    table = published.table("port", costs.report_network)
    line = next(line for line in table.splitlines() if "rn50_rigl_uniform_0.9 " in line)
    assert line.split("|")[-2].strip() == "82.74"
    line = next(line for line in table.splitlines() if "rn50_rigl_uniform_0.8 " in line)
    assert line.split("|")[-2].strip() == "73.55"


def test_method_and_length_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--arch", "small_cnn", "--num-classes", "10", "--sparsity", "0.9"]
    f = report(capsys, *flags, "--method", "static")["inference_ratio"]
    for method, expected in (("set", f), ("snfs", (2 * f + 1) / 3), ("snip", f)):
        ours = report(capsys, *flags, "--method", method, "--multiplier", "5")
        assert ours["training_ratio"] == pytest.approx(5 * expected)
    rigl = report(capsys, *flags, "--delta-t", "10")["training_ratio"]
    assert rigl == pytest.approx((30 * f + 2 * f + 1) / 33)
    gmp = report(capsys, *flags, "--method", "gmp")["training_ratio"]
    longer = report(capsys, *flags, "--method", "gmp", "--multiplier", "10")["training_ratio"]
    assert f < gmp < 1
    assert longer / 10 == pytest.approx(gmp, rel=0.03)  # finer steps


def test_conventions(capsys: pytest.CaptureFixture[str]) -> None:
    by = {
        c: report(capsys, "--sparsity", "0.8", "--convention", c)
        for c in ("published", "true", "macs")
    }
    config = ORACLE["models"]["resnet50"]["configs"]["erk/0.8/all_sparse"]
    assert by["true"]["inference_ratio"] == pytest.approx(config["true_ratio"], rel=1e-12)
    assert by["macs"]["inference_ratio"] == pytest.approx(config["macs_ratio"], rel=1e-12)
    assert by["macs"]["inference_flops"] == by["true"]["macs"] == by["published"]["macs"]


def test_text_names_every_layer_and_the_totals(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "--arch", "small_cnn", "--num-classes", "10", "--sparsity", "0.9")
    for words in ("features.3.weight", "fc.weight", "of dense", "MB", "sparsity", "published"):
        assert words in text


def test_the_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tradeoff.svg"
    assert run(capsys, "--plot", str(path)) == ""
    drawn = path.read_text()
    assert drawn.count("<use") > 2 * len(published.read_rows("rigl"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--sparsity 1.5", "sparsity must be in [0, 1), got 1.5"),
        ("--method rigl", "--method rigl does not go with --sparsity 0.0"),
        ("--method dense --sparsity 0.5", "--method dense does not go with --sparsity 0.5"),
        ("--sparsity 0.5 --dense-layers conv9", "conv9"),
        ("--sparsity 0.5 --delta-t 0", "delta_t must be at least 1"),
        ("--sparsity 0.5 --method gmp --prune-end 5", "prune_end 5"),
        ("--arch resnet51", "resnet51"),
    ],
)
def test_mistakes_are_told_in_one_line(
    flags: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert costs.main(flags.split()) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_the_command_runs_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "costs.py", "--sparsity", "0.9", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(done.stdout)["size_mb"] == pytest.approx(13.498864)


@pytest.mark.parametrize("source", TABLES)
def test_the_tables_of_the_document_are_those_of_the_command(source: str) -> None:
    text = (ROOT / "results/README.md").read_text()
    assert published.table(source, costs.report_network) in text
