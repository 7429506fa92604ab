"""`--log-to`: a tracker gets all that is logged, and a resumed run goes on with the same run."""

import contextlib
import io
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from image_classification import config, trackers
from image_classification.config import Config
from scripts import derive

Curves = dict[str, dict[int, float]]

NETWORK = "--arch small_cnn --num-classes 10 --image-size 32 --cpu".split()
DATA = "--data-backend synthetic --synthetic-batches 4 -b 4 -p 2".split()
RIGL = "--epochs 2 --seed 1 --sparse-method rigl --sparsity 0.5 --delta-t 2".split()


def run(*argv: str, flags: list[str] = RIGL) -> tuple[int, str, str]:
    state = torch.get_rng_state()
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        status = main.main([*NETWORK, *DATA, *flags, *argv])
    torch.set_rng_state(state)
    return status, out.getvalue(), err.getvalue()


def logged(workspace: Path) -> set[str]:
    """Return the names of the curves of a raport: those of its records and of its summary."""
    lines = (workspace / "experiment_raport.json").read_text().splitlines()
    records = [json.loads(line.removeprefix("DLLL ")) for line in lines]
    names = set()
    for record in records:
        if record["type"] == "LOG" and record["step"] != "PARAMETER" and len(record["step"]) < 3:
            whole = {0: "summary/", 1: "epoch/"}.get(len(record["step"]), "")
            for name in record["data"]:
                names.add(whole + name if whole else name.replace(".", "/", 1))
    return names


# trackers/notebook.py


class Notebook:
    """Writes a file of lines; `FAULTS` lets it fail."""

    FAULTS: set[str] = set()

    def __init__(self, project: str, folder: Path, run_id: str | None) -> None:
        if "open" in self.FAULTS:
            raise ConnectionError("nobody\nanswers")
        self.run_id = run_id or f"{project}-1"
        self.file = folder / f"{self.run_id}.txt"
        self.address = str(self.file)
        self.write("resume" if run_id else "begin")

    def write(self, *words: object) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(words) + "\n")

    def parameters(self, values: Mapping[str, Any]) -> None:
        self.write("parameters", dict(values))

    def log(self, values: Mapping[str, float], step: int) -> None:
        if "log" in self.FAULTS:
            raise ConnectionError("the network is down")
        self.write("log", dict(values), step)

    def close(self) -> None:
        self.write("end")


SPEC = trackers.TrackerSpec(open=Notebook, package="json", remedy="write by hand")


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> type[Notebook]:
    monkeypatch.setitem(trackers.TRACKERS, "notebook", SPEC)
    monkeypatch.setattr(Notebook, "FAULTS", set())
    return Notebook


def entries(path: Path) -> list[list[Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("notebook")
def test_a_tracker_is_one_file_and_one_line(tmp_path: Path) -> None:
    argv = ["--workspace", str(tmp_path), "--log-to", "notebook", "--log-project", "digits"]
    status, out, err = run(*argv, "--run-epochs", "1")
    assert (status, err) == (0, "")
    assert f"tracked as {tmp_path}/digits-1.txt\n" in out
    assert run(*argv, "--resume", "auto")[0] == 0
    written = entries(tmp_path / "digits-1.txt")
    kinds = [entry[0] for entry in written if entry[0] not in ("parameters", "log")]
    assert kinds == ["begin", "end", "resume", "end"]
    parameters = {
        k: v for entry in written if entry[0] == "parameters" for k, v in entry[1].items()
    }
    assert {"lr", "seed", "sparsity", "torch", "log_to"} <= parameters.keys()
    records = [entry[1:] for entry in written if entry[0] == "log"]
    assert {name for values, _ in records for name in values} == logged(tmp_path)
    assert {"train/loss", "sparse/sparsity", "epoch/val.top1", "summary/val.top1"} <= logged(
        tmp_path
    )
    assert [step for values, step in records if "train/loss" in values] == [2, 4, 6, 8]
    assert "notebook" in derive.options()


@pytest.mark.usefixtures("notebook")
def test_without_resume_a_new_run_begins(tmp_path: Path) -> None:
    argv = ["--workspace", str(tmp_path), "--log-to", "notebook", "--prof", "1"]
    for _ in range(2):
        assert run(*argv)[0] == 0
    written = [entry[0] for entry in entries(tmp_path / "image-classification-1.txt")]
    assert written.count("begin") == 2


@pytest.mark.usefixtures("notebook")
def test_an_evaluation_sends_its_summary(tmp_path: Path) -> None:
    argv = ["--workspace", str(tmp_path)]
    assert run(*argv, "--prof", "1")[0] == 0
    notebook = ["--log-to", "notebook"]
    assert run(*argv, "--evaluate", "--resume", "auto", *notebook, flags=[])[0] == 0
    records = [e[1:] for e in entries(tmp_path / "image-classification-1.txt") if e[0] == "log"]
    assert {"summary/val.top1", "summary/sparse.sparsity"} <= {n for v, _ in records for n in v}


def test_a_tracker_that_fails_does_not_end_training(
    tmp_path: Path, notebook: type[Notebook]
) -> None:
    notebook.FAULTS |= {"log"}
    status, out, err = run("--workspace", str(tmp_path), "--log-to", "notebook")
    assert (status, "Experiment ended" in out) == (0, True)
    assert (
        err
        == "WARNING: --log-to: the tracker fails and gets no more records: the network is down\n"
    )


def test_mistakes_are_one_line(
    tmp_path: Path, notebook: type[Notebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook.FAULTS |= {"open"}
    (tmp_path / "missing_package").mkdir()  # a folder in the directory of work is no package
    monkeypatch.syspath_prepend(tmp_path)
    spec = trackers.TrackerSpec(open=Notebook, package="missing_package", remedy="")
    monkeypatch.setitem(trackers.TRACKERS, "gone", spec)
    for argv, message in (
        ("--log-to notebook", "--log-to notebook: nobody answers; write by hand"),
        ("--log-to gone", "--log-to gone needs a package: pip install missing_package"),
        ("--log-to paper", "--log-to"),
        ("--log-project x", "--log-project has no effect without --log-to"),
    ):
        status, _, err = run("--workspace", str(tmp_path), *argv.split())
        assert status == 2
        assert err.startswith("main.py: error: ")
        assert message in err
        assert err.count("\n") == 1
    assert run("--log-to", "gone", "--dry-run")[0] == 0


# The packages themselves, where they are installed


def wandb_curves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Curves]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "600")  # 30 s for its own process to begin at first

    def read() -> Curves:
        from wandb.proto.wandb_internal_pb2 import Record

        found: Curves = {}
        for _ in range(600):  # the package writes in a process of its own, which may not be done
            paths = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
            records = [Record.FromString(data) for path in paths for data in wandb_records(path)]
            if sum(record.HasField("exit") for record in records) == 2:
                break
            time.sleep(0.1)
        assert len({path.name for path in paths}) == 1  # one run, in a file for each process
        for items in (record.history.item for record in records):
            row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
            for name in row.keys() - {"step"}:
                if not name.startswith("_"):
                    found.setdefault(name, {})[row["step"]] = row[name]
        return found

    return read


def wandb_records(path: Path) -> Iterator[bytes]:
    """Read a file in the format of LevelDB's logs: pieces of records in blocks of 32 KiB."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (at % 0x8000) > 0x8000 - 7:  # too small a rest for a piece
            at += -at % 0x8000
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + length > len(data):  # the rest is not written yet
            return
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of it, or its last piece
            yield record
            record = b""


def mlflow_curves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Curves]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (folder / "runs").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    def read() -> Curves:
        import mlflow

        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name("image-classification")
        (done,) = client.search_runs([experiment.experiment_id])
        assert done.info.status == "FINISHED"
        assert done.data.params["sparsity"] == "0.5"
        assert done.data.params["run_epochs"] == "1"
        assert done.data.tags["resumed.run_epochs"] == "-1"
        return {
            name: {m.step: m.value for m in client.get_metric_history(done.info.run_id, name)}
            for name in done.data.metrics
        }

    return read


def trackio_curves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Curves]:
    trackio = __import__("trackio")
    monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", folder / "runs")

    def read() -> Curves:
        (name,) = {run.name for run in trackio.Api().runs("image-classification")}
        found: Curves = {}
        for row in trackio.SQLiteStorage.get_logs("image-classification", name):
            for key in row.keys() - {"step", "timestamp"}:
                found.setdefault(key, {})[row["step"]] = row[key]
        return found

    return read


READERS = {"wandb": wandb_curves, "mlflow": mlflow_curves, "trackio": trackio_curves}


@pytest.mark.parametrize("name", READERS)
def test_the_packages_get_all_curves(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name)
    read = READERS[name](tmp_path, monkeypatch)
    argv = ["--workspace", str(tmp_path), "--log-to", name]
    for more in (["--run-epochs", "1"], ["--resume", "auto"]):
        time.sleep(1.1)  # packages name the files of a part of a run by the second
        status, out, err = run(*argv, *more)
        assert (status, err) == (0, "")
        assert len(re.findall("^tracked as .+$", out, re.MULTILINE)) == 1
    curves = read()
    assert curves.keys() == logged(tmp_path)
    assert list(curves["train/loss"]) == [2, 4, 6, 8]
    assert curves["epoch/sparse.sparsity"] == pytest.approx({4: 0.5, 8: 0.5}, abs=0.01)


def test_the_choices_are_those_of_the_dict() -> None:
    assert list(READERS) == list(trackers.TRACKERS)
    (defaults,) = config.parse([], Config, description="")
    assert defaults.log_to is None
