"""The log: DLLogger's format line by line, who writes what where, resume, TensorBoard, console."""

import contextlib
import json
import re
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.metrics import FORMATS
from image_classification.log import GpuMonitor, Logger, Verbosity, default_metadata, run_metadata
from tests.terminal import Terminal

NUMBER = r"\d+\.\d+"
DATE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+"
ZONE = r"[+-]\d\d:\d\d"

# A run as DLLogger 1.1.0 writes it; the angle brackets stand for what differs between runs.
RAPORT = r"""
DLLL {"timestamp": "<s>", "datetime": "<date><zone>", "elapsedtime": "<s>", "type": "LOG", "step": "PARAMETER", "data": {"data": "/imagenet", "epochs": 90, "topk": [1, 5], "resume": null}}
DLLL {"timestamp": "<s>", "elapsedtime": "<s>", "datetime": "<date><zone>", "type": "METADATA", "metric": "train.loss", "metadata": {"unit": null, "format": ":.5f"}}
DLLL {"timestamp": "<s>", "elapsedtime": "<s>", "datetime": "<date><zone>", "type": "METADATA", "metric": "train.total_ips", "metadata": {"unit": "images/s", "format": ":.2f"}}
DLLL {"timestamp": "<s>", "datetime": "<date><zone>", "elapsedtime": "<s>", "type": "LOG", "step": [0, 10], "data": {"train.loss": 6.90775, "train.total_ips": 2500.5}}
DLLL {"timestamp": "<s>", "elapsedtime": "<s>", "datetime": "<date><zone>", "type": "METADATA", "metric": "train.data_time", "metadata": {"unit": "s", "format": ":.5f"}}
DLLL {"timestamp": "<s>", "datetime": "<date><zone>", "elapsedtime": "<s>", "type": "LOG", "step": [0, 10], "data": {"train.data_time": 0.001}}
DLLL {"timestamp": "<s>", "elapsedtime": "<s>", "datetime": "<date><zone>", "type": "METADATA", "metric": "val.top1", "metadata": {"unit": "%", "format": ":.2f"}}
DLLL {"timestamp": "<s>", "datetime": "<date><zone>", "elapsedtime": "<s>", "type": "LOG", "step": [0, 10, 5], "data": {"val.top1": 0.125}}
DLLL {"timestamp": "<s>", "elapsedtime": "<s>", "datetime": "<date><zone>", "type": "METADATA", "metric": "own", "metadata": {"unit": "km", "format": ":.1f"}}
DLLL {"timestamp": "<s>", "datetime": "<date><zone>", "elapsedtime": "<s>", "type": "LOG", "step": [0], "data": {"train.loss": 6.5, "own": 2, "unknown": "x", "absent": null}}
DLLL {"timestamp": "<s>", "datetime": "<date><zone>", "elapsedtime": "<s>", "type": "LOG", "step": [0], "data": {"train.data_time": 0.002}}
DLLL {"timestamp": "<s>", "datetime": "<date><zone>", "elapsedtime": "<s>", "type": "LOG", "step": [], "data": {"val.top1": 76.5}}
"""  # noqa: E501

CONSOLE = """
DLL <date> - PARAMETER data : /imagenet epochs : 90 topk : [1, 5] resume : None
DLL <date> - Epoch: 0 Iteration: 10 train.loss : 6.90775 train.total_ips : 2500.50 images/s
DLL <date> - Epoch: 0 Iteration: 10 Validation Iteration: 5 val.top1 : 0.12 %
DLL <date> - Epoch: 0 train.loss : 6.50000 own : 2.0 km unknown : x absent : None
DLL <date> - Epoch: 0 train.data_time : 0.00200 s
DLL <date> - Summary: val.top1 : 76.50 %
"""


def pattern(sample: str) -> re.Pattern[str]:
    text = re.escape(sample.lstrip())
    for mark, expression in {"<s>": NUMBER, "<date>": DATE, "<zone>": ZONE}.items():
        text = text.replace(re.escape(mark), expression)
    return re.compile(text)


def write_sample(logger: Logger) -> None:
    logger.parameters({"data": Path("/imagenet"), "epochs": 90, "topk": (1, 5), "resume": None})
    logger.log((0, 10), {"train.loss": 6.90775, "train.total_ips": 2500.5})
    logger.log((0, 10), {"train.data_time": 0.001}, Verbosity.VERBOSE)
    logger.log((0, 10), {"train.lr": 0.1}, Verbosity.OFF)
    logger.log((0, 10, 5), {"val.top1": 0.125})
    logger.metadata("own", unit="km", format=":.1f")
    logger.log((0,), {"train.loss": 6.5, "own": 2, "unknown": "x", "absent": None})
    logger.log((0,), {"train.data_time": 0.002}, Verbosity.VERBOSE)
    logger.log((0,), {}, Verbosity.VERBOSE)
    logger.log((), {"val.top1": 76.5})
    logger.close()


def records(raport: Path) -> list[dict[str, Any]]:
    lines = raport.read_text().splitlines()
    assert all(line.startswith("DLLL ") for line in lines)
    return [json.loads(line.removeprefix("DLLL ")) for line in lines]


def logged(raport: Path) -> list[dict[str, Any]]:
    return [record["data"] for record in records(raport) if record["type"] == "LOG"]


@pytest.fixture(params=["own", "dllogger"])
def writer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write through our own classes, then through those of DLLogger where it is installed."""
    if request.param == "dllogger":
        pytest.importorskip("dllogger")
    else:
        monkeypatch.setitem(sys.modules, "dllogger", None)


@pytest.fixture
def raport(tmp_path: Path) -> Path:
    return tmp_path / "results" / "raport.json"


@pytest.mark.usefixtures("writer")
def test_a_run_matches_the_sample_line_by_line(
    raport: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = datetime.now().timestamp()
    write_sample(Logger(raport=raport, append=False))
    written = raport.read_text().splitlines()
    expected = RAPORT.strip().splitlines()
    assert len(written) == len(expected)
    for line, sample in zip(written, expected, strict=True):
        assert pattern(sample).fullmatch(line), line
    printed = capsys.readouterr()
    assert pattern(CONSOLE).fullmatch(printed.out), printed.out
    assert printed.err == ""
    for record in records(raport):
        assert before <= float(record["timestamp"]) <= datetime.now().timestamp()
        written_at = datetime.fromisoformat(record["datetime"]).timestamp()
        assert written_at == pytest.approx(float(record["timestamp"]))
    elapsed = [float(record["elapsedtime"]) for record in records(raport)]
    assert elapsed == sorted(elapsed)


@pytest.mark.usefixtures("writer")
def test_records_are_in_the_file_at_once(raport: Path) -> None:
    logger = Logger(raport=raport, append=False, console=None)
    logger.log((0, 1), {"x": 1})
    assert logged(raport) == [{"x": 1}]
    logger.close()
    logger.close()


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = Logger(
        raport=tmp_path / "r.json", append=False, tensorboard=tmp_path / "tb", enabled=False
    )
    write_sample(logger)
    logger.message("hello")
    logger.warning("careful")
    logger.progress(3, "epoch 0").update(1)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_without_a_console_only_the_file_is_written(
    raport: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = Logger(raport=raport, append=False, console=None)
    write_sample(logger)
    logger.message("hello")
    assert len(records(raport)) == 12
    assert capsys.readouterr().out == ""


def test_message_and_warning(capsys: pytest.CaptureFixture[str]) -> None:
    logger = Logger(raport=None, append=False)
    logger.message("RUNNING EPOCHS FROM 0 TO 90")
    logger.warning("first line\n  second line")
    assert capsys.readouterr() == (
        "RUNNING EPOCHS FROM 0 TO 90\n",
        "WARNING: first line second line\n",
    )


def test_numbers_gone_bad_stay_readable(raport: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = Logger(raport=raport, append=False)
    logger.log((3, 7), {"train.loss": float("nan"), "train.grad_scale": float("inf")})
    logger.close()
    assert str(logged(raport)) == "[{'train.loss': nan, 'train.grad_scale': inf}]"
    assert "train.loss : nan train.grad_scale : inf" in capsys.readouterr().out


# The raport of a resumed run


@pytest.mark.usefixtures("writer")
def test_a_resumed_run_continues_the_raport(raport: Path) -> None:
    for run, append in enumerate((False, True, True)):
        logger = Logger(raport=raport, append=append, console=None)
        logger.log((run,), {"run": run})
        logger.close()
    assert logged(raport) == [{"run": 0}, {"run": 1}, {"run": 2}]
    Logger(raport=raport, append=False, console=None).close()
    assert raport.read_text() == ""


@pytest.mark.usefixtures("writer")
def test_a_line_cut_by_a_crash_does_not_swallow_the_next(raport: Path) -> None:
    logger = Logger(raport=raport, append=False, console=None)
    logger.log((0,), {"x": 0})
    logger.log((1,), {"x": 1})
    logger.close()
    whole = raport.read_bytes()
    raport.write_bytes(whole[:-20])
    logger = Logger(raport=raport, append=True, console=None)
    logger.log((1,), {"x": 2})
    logger.close()
    lines = raport.read_bytes().splitlines()
    assert b"\n".join(lines[:2]) == whole[:-20]
    assert json.loads(lines[2].removeprefix(b"DLLL "))["data"] == {"x": 2}
    assert len(lines) == 3


@pytest.mark.usefixtures("writer")
def test_a_raport_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "raport.json", tmp_path):
        with pytest.raises(ValueError, match=rf"cannot write the raport {path}: ") as caught:
            Logger(raport=path, append=True)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.usefixtures("writer")
def test_a_full_disk_is_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    logger = Logger(raport=Path("/dev/full"), append=False)
    logger.log((0, 1), {"x": 1})
    logger.log((0, 2), {"x": 2})
    logger.close()
    printed = capsys.readouterr()
    reason = "the raport cannot be written, records are lost: No space left on device"
    assert printed.err == f"WARNING: {reason}\n"
    assert len(printed.out.splitlines()) == 2


# Metadata


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("train.loss", (None, ":.5f")),
        ("val.top5", ("%", ":.2f")),
        ("val_ema.top1", ("%", ":.2f")),
        ("val_ema.compute_latency_at95", ("s", ":.5f")),
        ("sparse.sparsity", (None, ":.4f")),
        ("sparse.sparsity.layer1.0.conv1.weight", (None, ":.4f")),
        ("gpu.power", ("W", ":.0f")),
        ("train.loss2", None),
        ("top1", None),
    ],
)
def test_metrics_of_the_harness_are_known(metric: str, expected: object) -> None:
    assert default_metadata(metric, FORMATS) == expected


# TensorBoard

Curves = dict[str, list[tuple[int, float]]]


def curves(directory: Path) -> Curves:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(directory))
    accumulator.Reload()
    assert "parameters/text_summary" in accumulator.Tags()["tensors"]
    scalars = {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}
    return {tag: [(e.step, e.value) for e in events] for tag, events in scalars.items()}


def test_tensorboard_shows_curves_by_step(tmp_path: Path) -> None:
    def train(steps: range, *, resumed: bool) -> None:
        logger = Logger(raport=None, append=resumed, tensorboard=tmp_path / "tb", console=None)
        logger.parameters({"lr": 0.1})
        for step in steps:
            logger.log(
                (0, step),
                {"train.loss": 10.0 - step, "sparse.sparsity.fc.weight": 0.5, "note": "text"},
                global_step=step,
            )
            logger.log((0, step), {"train.lr": 0.25})
        logger.log((0,), {"val.top1": 75.0}, global_step=steps[-1])
        logger.log((), {"val.top1": 75.0}, global_step=steps[-1])
        logger.close()

    train(range(1, 4), resumed=False)
    assert curves(tmp_path / "tb") == {
        "train/loss": [(1, 9.0), (2, 8.0), (3, 7.0)],
        "sparse/sparsity.fc.weight": [(1, 0.5), (2, 0.5), (3, 0.5)],
        "epoch/val.top1": [(3, 75.0)],
    }
    # Resumed from a checkpoint of step 1: what the first run recorded beyond it is replaced.
    train(range(2, 5), resumed=True)
    assert curves(tmp_path / "tb")["train/loss"] == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0)]


def test_a_tensorboard_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write to --tensorboard .*: Not a directory"):
        Logger(raport=None, append=False, tensorboard=tmp_path / "file" / "tb")


# Progress


def test_progress_on_a_terminal_leaves_records_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    with terminal.opened() as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        show_progress()
    assert "epoch 10:" in terminal.text
    assert "loss=0.0142, total_ips=1.25e+3, sparsity=0.9\r" in terminal.text  # none is cut off
    lines = terminal.lines()
    assert re.search(r"^DLL .* - Epoch: 0 Iteration: 1 train\.loss : 2\.50000$", lines[0])
    assert lines[1:] == ["a message", ""]


def show_progress() -> None:
    logger = Logger(raport=None, append=False, console="dllogger")
    progress = logger.progress(5004, "epoch 10")
    progress.update(
        5003, **{"train.loss": 0.014216, "train.total_ips": 1250.2512, "sparse.sparsity": 0.9}
    )
    logger.log((0, 1), {"train.loss": 2.5})
    logger.message("a message")
    progress.update(3)
    progress.close()


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Logger(raport=None, append=False).progress(4, "epoch 0")
    progress.update(1, loss=1.0)
    progress.close()
    assert capsys.readouterr() == ("", "")


# The console in short


def write_epochs(logger: Logger) -> None:
    """Write a run of one epoch, of which 90% of something is shown."""
    logger.headline(("train.loss", "val.top1", "val_ema.top1", "own.share", "own.share"))
    logger.parameters({"epochs": 1})
    logger.message("RUNNING EPOCHS FROM 0 TO 1")
    with contextlib.closing(logger.progress(2, "epoch 0")) as progress:
        logger.log((0, 2), {"train.loss": 2.5, "own.share": 0.9})
        logger.warning("careful")
        progress.update(2)
    logger.log((0,), {"own.share": 0.9, "train.loss": 1.25, "val.top1": 50.0, "val.loss": 3.0,
                      "val_ema.top1": 50.125})  # fmt: skip
    logger.log((0,), {"train.data_time": 0.001}, Verbosity.VERBOSE)
    logger.saved(Path("checkpoint.pth.tar"))
    logger.log((0, 2), {"own.share": 0.9}, Verbosity.VERBOSE)
    logger.log((), {"train.loss": 1.25, "val.top1": 50.0, "own.size_mb": 2})
    logger.close()


SUMMARY = """\
full log: {raport}
RUNNING EPOCHS FROM 0 TO 1
epoch 0  loss 1.25000  top-1 50.00%  ema top-1 50.12%  share 0.9
summary  loss 1.25000  top-1 50.00%
checkpoint: checkpoint.pth.tar
"""


def test_a_terminal_shows_one_line_per_epoch_and_the_raport_has_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    terminal = Terminal()
    with terminal.opened() as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        write_epochs(Logger(raport=Path("short.json"), append=False))
    assert terminal.lines() == SUMMARY.format(raport="short.json").split("\n")
    assert capsys.readouterr().err == "WARNING: careful\n"
    write_epochs(Logger(raport=Path("long.json"), append=False))
    assert capsys.readouterr().out.count("DLL ") == 5
    assert logged(Path("short.json")) == logged(Path("long.json"))


def test_the_console_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    write_epochs(Logger(raport=None, append=False, console="summary"))
    printed = capsys.readouterr().out
    assert printed == SUMMARY.partition("\n")[2]
    write_epochs(Logger(raport=None, append=False, console="dllogger"))
    assert "SAVING checkpoint.pth.tar\nDLL " in capsys.readouterr().out


def test_a_line_too_long_for_the_terminal_is_broken_between_metrics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [f"own.metric_number_{n}" for n in range(6)]
    terminal = Terminal()
    with terminal.opened() as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        logger = Logger(raport=None, append=False)
        logger.headline(names)
        logger.log((), dict.fromkeys(names, 1 / 3))
    fields = [f"metric number {n} 0.3333" for n in range(6)]
    assert [line.split("  ") for line in terminal.lines()] == [
        ["summary", *fields[:3]],
        ["", "", "", "", " " + fields[3], *fields[4:]],
        [""],
    ]


# The machine


def test_run_metadata_names_versions_commit_and_command() -> None:
    facts = run_metadata()
    assert facts["torch"] == torch.__version__
    assert facts["python"].split(".")[:2] == [str(n) for n in sys.version_info[:2]]
    assert shlex.split(facts["command"]) == sys.orig_argv
    assert all(isinstance(fact, str) and fact and "\n" not in fact for fact in facts.values())
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        head = subprocess.check_output(["git", "-C", str(root), "rev-parse", "HEAD"], text=True)
        assert facts["git_commit"].removesuffix("+dirty") == head.strip()
    else:
        assert "git_commit" not in facts


def test_run_metadata_of_an_installed_project_names_the_commit_of_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    origins = {
        "repository": {"url": "https://x.org/y", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
        "folder": {"url": "file:///y", "dir_info": {}},
        "index": None,
    }
    for name, origin in origins.items():
        information = tmp_path / f"{name}-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
        if origin:
            (information / "direct_url.json").write_text(json.dumps(origin))
    found = {name: run_metadata(project="1.0", distribution=name) for name in [*origins, "copied"]}
    assert all(next(iter(facts.items())) == ("project", "1.0") for facts in found.values())
    commits = {name: facts["git_commit"] for name, facts in found.items() if "git_commit" in facts}
    assert commits == {"repository": "abc"}


def test_gpu_monitor_reports_a_gpu_and_nothing_of_the_cpu(device: torch.device) -> None:
    held = torch.zeros(1 << 26, device=device)  # 256 MiB
    sample = GpuMonitor(device).sample()
    assert sample.keys() <= {"gpu.memory", "gpu.utilization", "gpu.power"}
    assert ("gpu.memory" in sample) == (device.type == "cuda")
    assert sample.get("gpu.memory", 1.0) >= held.nbytes / 2**30
    assert 0 <= sample.get("gpu.utilization", 0.0) <= 100
    assert sample.get("gpu.power", 1.0) > 0


def test_gpu_monitor_finds_the_gpu_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    pynvml = pytest.importorskip("pynvml")

    class Fields:
        def __init__(self, **values: object) -> None:
            self.__dict__.update(values)

    def handle(uuid: str) -> str:
        if uuid != "GPU-12-34":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def refuse(gpu: str) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Fields(uuid="12-34"))
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", refuse)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda gpu: Fields(used=3 * 2**29))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", lambda gpu: 312_500)
    assert GpuMonitor().sample() == {"gpu.memory": 1.5, "gpu.power": 312.5}
