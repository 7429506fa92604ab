"""Tables of finished runs, from raports that the harness's own logger wrote."""

import json
import re
from pathlib import Path

import pytest

import main
from cli import report
from image_classification.config import Config
from image_classification.log import Logger, run_metadata

FLAGS = {**vars(Config(epochs=2, arch="small_cnn")), "sparse_method": "rigl", "sparsity": 0.9}


def write(path: Path, top1: list[float], *, append: bool = False, **flags: object) -> Path:
    """Write the raport of a run with an accuracy per epoch."""
    logger = Logger(raport=path, append=append, tensorboard=None, enabled=True)
    lengths = {name: flags[name] for name in flags if name == "images_per_step"}
    logger.parameters({**run_metadata(), **lengths, **FLAGS, **flags})  # in main.py's order
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


def test_runs_of_one_experiment_are_one_row_whatever_has_no_part_in_it(tmp_path: Path) -> None:
    """How often a run saved, where it was followed, which version wrote its raport."""
    plain = {"seed": 1, "images_per_step": 256}
    paths = [
        write(tmp_path / "a.json", [1.0, 2.0], **plain),
        write(tmp_path / "b.json", [1.0, 2.0], **plain, checkpoint_every_steps=5, log_to="mlflow"),
        write(tmp_path / "c.json", [1.0, 2.0], **plain, dense_allocation=0.1, preempt_grace=9.0),
        write(tmp_path / "d.json", [1.0, 2.0], optimizer_batch_size=256, fsdp=True),
    ]
    older = tmp_path / "a.json"
    new = '"deterministic": false, '
    assert new in older.read_text()
    older.write_text(older.read_text().replace(new, "").replace('"lr_restarts": [], ', ""))
    assert [len(runs) for runs in report.group(map(report.read_raport, paths))] == [4]


def test_runs_with_other_numbers_of_images_per_step_are_other_experiments(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{images}.json", [1.0, 2.0], batch_size=size, images_per_step=images)
        for size, images in ((64, 256), (128, 256), (64, 512))
    ]
    groups = report.group(map(report.read_raport, paths))
    assert [len(runs) for runs in groups] == [2, 1]
    assert report.labels(groups) == ["images_per_step 256", "images_per_step 512"]


def test_an_evaluation_in_its_workspace_changes_no_run(tmp_path: Path) -> None:
    rigl = "--sparse-method rigl --sparsity 0.8 --delta-t 2".split()
    workspace = train(tmp_path, *rigl)
    (path,) = report.find_raports([workspace])
    before = report.read_raport(path)
    size = path.stat().st_size
    argv = TRAIN.replace("--epochs 2 ", "").split()
    assert main.main([*argv, "--workspace", str(workspace), "--evaluate", "--resume", "auto"]) == 0
    after = report.read_raport(path)
    assert path.stat().st_size > size
    assert after.experiment() == before.experiment()
    assert report.comparison([[after]]) == report.comparison([[before]])


def test_what_a_run_started_from_is_kept_when_it_is_resumed(tmp_path: Path) -> None:
    path = write(tmp_path / "raport.json", [10.0], pretrained_from_file="a.pth", new_head=True)
    write(path, [30.0], append=True)
    flags = report.read_raport(path).experiment()
    assert (flags["pretrained_from_file"], flags["new_head"]) == ("a.pth", True)


def test_the_best_loss_is_the_lowest_and_has_its_digits(tmp_path: Path) -> None:
    path = tmp_path / "raport.json"
    logger = Logger(raport=path, append=False)
    logger.parameters(FLAGS)
    for epoch, loss in enumerate((0.012345, 0.023456)):
        logger.log((epoch,), {"val.loss": loss, "val.top1": 50.0})
    logger.close()
    groups = [[report.read_raport(path)]]
    (row,) = cells(report.table(groups, "val.loss"))
    assert row[3:5] == ["0.02346", "0.01235"]
    (row,) = cells(report.comparison(groups, "val.loss"))
    assert row[4:6] == ["0.02346", "0.01235"]
    (row,) = cells(report.table(groups))
    assert row[3:5] == ["50.00", "50.00"]


def test_a_curve_stands_at_its_epochs_and_a_single_point_is_seen(tmp_path: Path) -> None:
    """A run whose first epochs are in another file, and one of an epoch alone."""
    late = write(tmp_path / "late.json", [10.0, 20.0], append=True)  # epochs 1 and 2, from 0
    first = write(tmp_path / "first.json", [50.0], sparsity=0.8)

    def drawn(*paths: Path) -> str:
        picture = tmp_path / "curves.svg"
        assert report.main([*map(str, paths), "--plot", str(picture)]) == 0
        return picture.read_text()

    from_0 = write(tmp_path / "from_0.json", [10.0, 20.0])
    ticks = [set(map(float, re.findall(r"<!-- ([\d.]+) -->", drawn(p)))) for p in (late, from_0)]
    assert [3.0 in found for found in ticks] == [True, False]
    of_one, of_two = (len(re.findall("<use [^>]*#1f77b4", drawn(p))) for p in (first, late))
    assert of_one == of_two + 2  # a point in the plot and one in the legend


def test_mistakes_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good.json", [10.0, 20.0])
    broken = tmp_path / "broken.json"
    lines = good.read_text().splitlines()
    broken.write_text("\n".join([lines[0], "no record", *lines[1:]]).replace("PARAMETER", "X"))
    foreign, lists = tmp_path / "image.json", tmp_path / "lists.json"
    foreign.write_bytes(b"\xff\xd8\n\xff\n")
    lists.write_text('DLLL []\nDLLL {"step": [0], "data": 5}\nDLLL 5\n')
    for argv, words in (
        (["absent.json"], "absent.json cannot be read: No such file"),
        ([str(foreign)], "image.json: line 1 is no record"),
        ([str(lists)], "lists.json: line 1 is no record"),
        ([str(broken)], "broken.json: line 2 is no record"),
        ([str(good), "--metric", "val.top7"], "good.json has no epoch with val.top7"),
    ):
        capsys.readouterr()
        assert report.main(argv) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1


TRAIN = "--data-backend synthetic --synthetic-batches 4 --arch small_cnn --image-size 32 -b 8 --cpu"
TRAIN += " --num-classes 10 --epochs 2 --console summary --topk 2"


def train(workspace: Path, *flags: str, seed: int = 0) -> Path:
    """Train for 8 steps of 8 images."""
    argv = [*TRAIN.split(), "--workspace", str(workspace), "--seed", str(seed), *flags]
    assert main.main(argv) == 0
    return workspace


def test_methods_are_compared_by_accuracy_and_training_flops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rigl = "--sparse-method rigl --delta-t 2 --distribution uniform --sparsity".split()
    train(tmp_path / "runs/dense")
    for seed in (1, 2):
        train(tmp_path / f"runs/rigl_0.8/{seed}", *rigl, "0.8", seed=seed)
    train(tmp_path / "runs/rigl_0.5", *rigl, "0.5")
    acdc = "--dense-warmup-epochs 0.5 --last-dense-epochs 0.5 --last-sparse-epochs 1".split()
    train(tmp_path / "runs/acdc", "--sparse-method", "acdc", "--sparsity", "0.8", *acdc)
    capsys.readouterr()
    picture = tmp_path / "compare.png"
    argv = [str(tmp_path / "runs"), "--compare", "--plot", str(picture)]
    assert report.main(argv) == 0
    rows = cells(capsys.readouterr().out)
    assert [(row[0], row[2], row[3]) for row in rows] == [
        ("acdc", "1", "2"),
        ("dense", "1", "2"),
        ("rigl", "1", "2"),
        ("rigl", "2", "2"),
    ]
    sparsities = [float(row[1]) for row in rows]
    assert sparsities == pytest.approx([0.8, 0.0, 0.5, 0.8], abs=1e-2)  # conv1 of rigl is dense
    assert "±" in rows[3][4]
    of_dense = {row[0]: (float(row[7]), float(row[8])) for row in rows}
    assert of_dense["dense"] == (1.0, 1.0)
    train_ratio, inference_ratio = of_dense["rigl"]  # one pass of nine is dense
    assert train_ratio == pytest.approx((8 * inference_ratio + 1) / 9, abs=2e-3)
    train_ratio, inference_ratio = of_dense["acdc"]  # half of the run is sparse
    assert train_ratio == pytest.approx((1 + inference_ratio) / 2, abs=2e-3)
    for row in rows:
        assert float(row[6]) / float(rows[1][6]) == pytest.approx(float(row[7]), abs=1e-3)
    assert picture.stat().st_size > 1000
    # What the operations are is told by costs.py: 3 passes for each of 64 images.
    status = main.main([*TRAIN.split(), "--dry-run"])
    plan = json.loads(capsys.readouterr().out)
    assert status == 0
    assert float(rows[1][6]) == pytest.approx(64 * 3 * plan["cost"]["dense_flops"], rel=1e-3)


def test_groups_of_one_method_and_sparsity_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [
        write(tmp_path / "a/raport.json", [70.0, 71.0], delta_t=100),
        write(tmp_path / "b/raport.json", [74.0, 73.0], delta_t=200),
    ]
    capsys.readouterr()
    assert report.main([*map(str, paths), "--compare"]) == 0
    rows = cells(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["rigl, delta_t 100", "rigl, delta_t 200"]
    assert [row[6:] for row in rows] == [["", "", ""]] * 2  # raports without operations
    for argv, words in (
        ([str(tmp_path / "a"), "--compare", "--plot", "x.png"], "no run is complete and has its"),
        ([str(tmp_path / "a/none")], "none cannot be read"),
    ):
        assert report.main(argv) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert report.main([str(tmp_path / "empty")]) == 2
    assert "empty has no file *raport.json" in capsys.readouterr().err


def test_operations_of_runs_that_are_not_complete_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "runs", "--run-epochs", "1")
    capsys.readouterr()
    assert report.main([str(tmp_path / "runs"), "--compare"]) == 0
    (row,) = cells(capsys.readouterr().out)
    assert row[3] == "1 of 2"
    assert row[6:8] == ["", ""]
