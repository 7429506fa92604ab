"""Tables of finished runs, from raports that the harness's own logger wrote."""

from pathlib import Path

import pytest

from cli import report
from image_classification.config import Config
from image_classification.log import Logger, run_metadata

FLAGS = {**vars(Config(epochs=2, arch="small_cnn")), "sparse_method": "rigl", "sparsity": 0.9}


def write(path: Path, top1: list[float], *, append: bool = False, **flags: object) -> Path:
    """Write the raport of a run with an accuracy per epoch."""
    logger = Logger(raport=path, append=append, tensorboard=None, enabled=True)
    logger.parameters({**run_metadata(), **FLAGS, **flags})
    start = 1 if append else 0
    for epoch, accuracy in enumerate(top1, start=start):
        logger.log((epoch, 10), {"train.loss": 1.0})
        logger.log(
            (epoch,), {"val.top1": accuracy, "sparse.sparsity": 0.9, "train.total_ips": 99.6}
        )
    logger.log((), {"val.top1": max(top1)})
    logger.close()
    return path


def cells(markdown: str) -> list[list[str]]:
    return [[c.strip() for c in line.split("|")[1:-1]] for line in markdown.splitlines()[2:]]


def test_seeds_become_one_row_with_mean_and_sample_deviation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [
        write(tmp_path / "a/raport.json", [70.0, 71.0], seed=1, workspace="a"),
        write(tmp_path / "b/raport.json", [74.0, 73.0], seed=2, workspace="b", batch_size=64),
        write(tmp_path / "c/raport.json", [50.0, 60.0], seed=1, sparsity=0.8),
    ]
    capsys.readouterr()
    assert report.main([*map(str, paths), "--plot", str(tmp_path / "curves.png")]) == 0
    first, second = cells(capsys.readouterr().out)
    # 71 and 73: mean 72, deviation sqrt(2); best 71 and 74: 72.5, 3 / sqrt(2)
    assert first[:6] == [
        "sparsity 0.9",
        "2",
        "2",
        "72.00 ± 1.41",
        "72.50 ± 2.12",
        "0.9000 ± 0.0000",
    ]
    assert second[:7] == ["sparsity 0.8", "1", "2", "60.00", "60.00", "0.9000", "100"]
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_resumed_run_counts_its_repeated_epoch_once(tmp_path: Path) -> None:
    path = write(tmp_path / "raport.json", [10.0, 90.0])
    text = path.read_text()
    path.write_text(text[: text.rindex("DLLL") + 30])  # the crash cut the last line
    write(path, [30.0], append=True)
    run = report.read_raport(path)
    assert run.values("val.top1") == [10.0, 30.0]
    (row,) = cells(report.table([[run]]))
    assert row[:5] == [str(path), "1", "2", "30.00", "30.00"]


def test_unfinished_runs_say_so(tmp_path: Path) -> None:
    run = report.read_raport(write(tmp_path / "raport.json", [10.0]))
    (row,) = cells(report.table([[run]]))
    assert row[2] == "1 of 2"


def test_mistakes_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good.json", [10.0, 20.0])
    broken = tmp_path / "broken.json"
    lines = good.read_text().splitlines()
    broken.write_text("\n".join([lines[0], "no record", *lines[1:]]).replace("PARAMETER", "X"))
    for argv, words in (
        (["absent.json"], "absent.json cannot be read: No such file"),
        ([str(broken)], "broken.json: line 2 is no record"),
        ([str(good), "--metric", "val.top7"], "good.json has no epoch with val.top7"),
    ):
        capsys.readouterr()
        assert report.main(argv) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
