"""Sparsities of layers from a trained network, and the runs of main.py that have them."""

from pathlib import Path

import pytest
import torch
import yaml

from cli import convert
from sparse.methods.gap import num_kept
from sparse.training.checkpoints import read_masks
from tests.test_resume_flags import first_epoch, load, refusal, train

GAP = "--sparse-method gap --sparsity 0.8 --phase-epochs 1 --num-phases 1 --partitions".split()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a dense small_cnn."""
    return first_epoch(tmp_path_factory.mktemp("dense"))


def test_gap_prunes_layers_as_a_trained_network_says(dense: Path, tmp_path: Path) -> None:
    file = tmp_path / "new/map.yaml"
    argv = [str(dense), str(file), "--to", "sparsity-map", "--sparsity", "0.8"]
    assert convert.main([*argv, "--dense-layers", "fc"]) == 0
    layers = yaml.safe_load(file.read_text())
    weights = load(dense.parent)["state_dict"]
    assert list(layers) == [f"features.{n}.weight" for n in (0, 3, 6, 9)]
    # The largest 20% of the weights of these layers together.
    every = torch.cat([weights[name].abs().flatten() for name in layers]).sort().values
    smallest = every[-num_kept(len(every), 0.8)]
    for name, sparsity in layers.items():
        size = weights[name].numel()
        assert sparsity == 1 - int((weights[name].abs() >= smallest).sum()) / size
    assert len(set(layers.values())) == 4
    flags = [*GAP, "features.[0-3]", "features.[5-9]", "--sparsity-map", str(file)]
    train(tmp_path / "run", *flags, "--pretrained-from-file", str(dense))
    masks = read_masks(load(tmp_path / "run")["sparse"])
    kept = {name: int(masks[name].sum()) for name in layers}
    assert kept == {n: num_kept(weights[n].numel(), zeros) for n, zeros in layers.items()}
    # A layer that is dense by choice or in no partition is not for the map.
    line = refusal(tmp_path / "other", *flags, "--dense-layers", "features.0")
    assert "is in dense_layers and in sparsity_map" in line


def test_mistakes_are_told_in_one_line(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = [str(dense), str(tmp_path / "map.yaml"), "--to", "sparsity-map"]
    for argv, words in (
        (to, "--to sparsity-map needs --sparsity"),
        ([*to, "--sparsity", "1"], r"sparsity must be in [0, 1), got 1.0"),
        ([*to, "--sparsity", "0.99999"], "leaves no weight of features."),
        ([*to, "--sparsity", "0.5", "--dense-layers", "*"], "leaves no layer that could be"),
        ([*to, "--sparsity", "0.5", "--dense-layers", "x"], "--dense-layers: 'x' matches no"),
        ([str(dense), str(dense), *to[2:], "--sparsity", "0.5"], "exists: name a new file"),
        ([*to[:2], "--sparsity", "0.5"], "--sparsity has no effect without --to sparsity-map"),
    ):
        assert convert.main(argv) == 2
        said = capsys.readouterr().err
        assert words in said, said
        assert said.count("\n") == 1
    assert not (tmp_path / "map.yaml").exists()
