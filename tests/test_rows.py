"""Every row of results/table.csv: its script, the plan that it makes and the costs of that plan."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import costs
import main
from results import published
from scripts import rows
from sparse import METHODS

ROOT = Path(__file__).parents[1]
ROWS = {row["script"]: row for row in published.read_rows()}
WARMUP = {"resnet50": 5, "mobilenet_v1": 8}
MILESTONES = {"resnet50": (30, 70, 90), "mobilenet_v1": (40, 75, 95)}


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """Return a program that prints its arguments in place of Python."""
    path = tmp_path / "python"
    path.write_text(
        "#!/bin/sh\nprintf 'WORLD_SIZE=%s\\0' \"${WORLD_SIZE:-}\"\nprintf '%s\\0' \"$@\"\n"
    )
    path.chmod(0o755)
    return path


def call(
    script: str, *flags: str, python: Path, cwd: Path, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a script from another directory; GPUs and schedulers of this machine are hidden."""
    return subprocess.run(
        ["bash", str(ROOT / script), *flags],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "PYTHON": str(python), "NPROC": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def command(script: str, *flags: str, python: Path, cwd: Path, **env: str) -> list[str]:
    """Return the command that a script starts, WORLD_SIZE first."""
    done = call(script, *flags, python=python, cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def value(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def test_every_script_is_a_row_and_every_row_has_its_script() -> None:
    scripts = [*(ROOT / "scripts").glob("rn50_*.sh")]
    for folder in ("rigl", "acdc", "gap", "granet", "srigl", "compare"):
        scripts += (ROOT / "scripts" / folder).glob("*.sh")
    assert {str(s.relative_to(ROOT)) for s in scripts} == ROWS.keys()
    counts = Counter(row["source"] for row in ROWS.values())
    assert (counts["port"], counts["rigl"], counts["ours"]) == (12, 29, 11)
    assert (counts["acdc"], counts["gap"], counts["granet"], counts["srigl"]) == (8, 4, 6, 8)
    assert len(ROWS) == 12 + 29 + 11 + 26 + counts["compare"]


def test_every_method_is_compared_at_the_same_sparsities() -> None:
    rows = [row for row in ROWS.values() if row["source"] == "compare"]
    # Left out: a control, and what begins with a trained network.
    methods = {*METHODS} - {"rigl_reset", "magnitude"}
    named = {f"scripts/compare/{m}_{s}.sh" for m in methods for s in ("0.8", "0.9", "0.95")}
    assert {row["script"] for row in rows} == named | {"scripts/compare/dense.sh"}
    alike = "recipe arch epochs optimizer_batch_size label_smoothing dense_layers".split()
    assert len({tuple(row[column] for column in alike) for row in rows}) == 1


@pytest.mark.parametrize("script", ROWS)
def test_the_plan_of_a_row(
    script: str, recorder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = ROWS[script]
    world, program, *argv = command(script, "--dry-run", python=recorder, cwd=tmp_path)
    assert (world, program) == ("WORLD_SIZE=1", str(ROOT / "main.py"))
    assert main.main(argv) == 0
    plan = json.loads(capsys.readouterr().out)

    assert plan["arch"] == row["arch"]
    assert plan["epochs"] == int(row["epochs"])
    assert plan["optimizer_batch_size"] == int(row["optimizer_batch_size"])
    assert plan["label_smoothing"] == float(row["label_smoothing"])
    gentle = row["source"] in ("acdc", "gap")
    assert (plan["momentum"], plan["weight_decay"]) == (
        (0.875, 3.0517578125e-5) if gentle else (0.9, 1e-4)
    )
    assert plan["sparse"]["method"] == row["method"]
    assert (plan["sparse"]["distribution"] or "") == row["distribution"]
    assert (plan["sparse"]["sparsity"] or 0) == float(row["sparsity"])
    if plan["cost"] is None:  # training shares out the weights among the layers
        zeros = pytest.approx(float(row["overall_sparsity"]), abs=1e-6)
        assert plan["sparse"]["overall_sparsity"] == zeros
        assert (row["train"], row["inference"], row["size"]) == ("", "", "")
    else:
        assert plan["sparse"]["overall_sparsity"] == plan_sparsity(row)
        check_costs(plan["cost"], row)
    CHECKS.get(row["source"], check_port)(plan, row)
    assert (plan["cost"] is None) == (row["method"] != "dense" and not row["distribution"])
    if row["method"] == "rigl":
        assert (plan["sparse"]["delta_t"], plan["sparse"]["drop_fraction"]) == (100, 0.3)
        assert plan["sparse"]["num_updates"] == plan["sparse"]["t_end"] // 100 + 1


def plan_sparsity(row: Mapping[str, str]) -> Any:
    """Return the zeros among the prunable weights: the table has those among all kernels."""
    report = published.row_report(costs.report_network, row)
    layers = [layer for layer in report["layers"] if ".dw." not in layer["name"]]
    active = sum(layer["num_active"] for layer in layers)
    return pytest.approx(1 - active / sum(layer["num_weights"] for layer in layers))


def check_costs(cost: Mapping[str, Any], row: Mapping[str, str]) -> None:
    """Hold the plan's costs to the columns of the table, which have six digits."""
    if row["source"] == "rigl" and row["method"] == "dense":
        assert cost["inference_flops"] == pytest.approx(float(row["inference"]), rel=1e-5)
    else:
        assert cost["inference_ratio"] == pytest.approx(float(row["inference"]), rel=1e-5)
        training = cost["training_ratio"] * float(row["length"])
        assert training == pytest.approx(float(row["train"]), rel=1e-5)
    assert cost["size_mb"] == pytest.approx(float(row["size"]), rel=1e-5)
    assert cost["overall_sparsity"] == pytest.approx(float(row["overall_sparsity"]), abs=1e-6)
    dense = {f"{name}.weight" for name in row["dense_layers"].split()}
    assert dense <= {layer["name"] for layer in cost["layers"] if layer["density"] == 1}


def check_rigl(plan: Mapping[str, Any], row: Mapping[str, str]) -> None:
    """The multiplier stretches epochs, milestones, warm-up and t_end, nothing else."""
    length = int(row["length"])
    assert abs(plan["total_steps"] - 32_000 * length) <= 156  # whole epochs of 312 steps
    assert (plan["lr"], plan["nesterov"], plan["mixup"]) == (1.6, True, 0)
    assert (plan["lr_schedule"], plan["lr_per_step"]) == ("step", True)
    assert plan["lr_milestones"] == [epoch * length for epoch in MILESTONES[row["arch"]]]
    assert plan["warmup_epochs"] == WARMUP[row["arch"]] * length
    if row["method"] == "rigl":
        assert plan["sparse"]["t_end"] == 25_000 * length


def check_port(plan: Mapping[str, Any], row: Mapping[str, str]) -> None:
    assert plan["total_steps"] == 625 * plan["epochs"]
    assert (plan["lr"], plan["nesterov"], plan["mixup"]) == (1.2, False, 0.2)
    assert (plan["lr_schedule"], plan["lr_per_step"]) == ("cosine", False)
    assert plan["warmup_epochs"] == 10
    if row["method"] in ("set", "snfs", "rigl", "gmp", "srigl"):
        assert plan["sparse"]["t_end"] == plan["total_steps"] * 4 // 5


def check_acdc(plan: Mapping[str, Any], row: Mapping[str, str]) -> None:
    """100 epochs have 8 compressions and 7 decompressions, and 20 epochs more have 4 more."""
    assert plan["total_steps"] == 5004 * plan["epochs"]
    assert (plan["lr"], plan["nesterov"], plan["mixup"]) == (0.256, False, 0)
    assert (plan["lr_schedule"], plan["lr_per_step"]) == ("cosine", False)
    assert plan["warmup_epochs"] == 5
    assert plan["sparse"]["num_updates"] == 15 + (plan["epochs"] - 100) // 5


def check_gap(plan: Mapping[str, Any], row: Mapping[str, str]) -> None:
    """The learning rate begins anew with every phase, and with the fine-tuning after the last."""
    assert plan["total_steps"] == 625 * plan["epochs"]
    assert (plan["lr"], plan["nesterov"], plan["mixup"]) == (2.048, False, 0.2)
    assert (plan["lr_schedule"], plan["lr_per_step"]) == ("cosine", False)
    assert plan["warmup_epochs"] == 8
    given = published.schedule(row)
    phases = [given["phase_epochs"] * number for number in range(1, given["num_phases"] + 1)]
    assert plan["lr_restarts"] == phases
    assert plan["sparse"]["num_updates"] == given["num_phases"]


def check_granet(plan: Mapping[str, Any], row: Mapping[str, str]) -> None:
    assert plan["total_steps"] == 10_009 * plan["epochs"]
    assert (plan["lr"], plan["nesterov"], plan["mixup"]) == (0.1, False, 0)
    assert (plan["lr_schedule"], plan["lr_milestones"]) == ("step", [30, 60, 90])
    assert plan["warmup_epochs"] == 5
    assert (plan["sparse"]["delta_t"], plan["sparse"]["drop_fraction"]) == (4000, 0.5)
    assert plan["sparse"]["num_updates"] == 250


def check_srigl(plan: Mapping[str, Any], row: Mapping[str, str]) -> None:
    assert abs(plan["total_steps"] - 256_000) < 2502
    assert (plan["lr"], plan["nesterov"], plan["mixup"]) == (0.2, True, 0)
    assert (plan["lr_schedule"], plan["lr_milestones"]) == ("step", [30, 70, 90])
    assert plan["warmup_epochs"] == 5
    assert (plan["sparse"]["delta_t"], plan["sparse"]["drop_fraction"]) == (800, 0.3)
    assert (plan["sparse"]["t_end"], plan["sparse"]["num_updates"]) == (192_000, 239)


CHECKS = {
    "rigl": check_rigl,
    "acdc": check_acdc,
    "gap": check_gap,
    "granet": check_granet,
    "srigl": check_srigl,
}


def test_what_follows_from_the_table_is_current() -> None:
    """The scripts and the costs; tests/test_costs_cli.py holds the tables of results/README.md."""
    for script, row in ROWS.items():
        assert {**row, **rows.computed(row)} == row, f"{script}: run python scripts/rows.py"
        assert (ROOT / script).read_text() == rows.script(row), "run python scripts/rows.py"


def test_a_row_is_added_by_one_line_and_one_command(
    recorder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copytree(ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("runs"))
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.setattr(published, "ROWS", tmp_path / "results/table.csv")
    text = published.ROWS.read_text()
    given = (
        "script=scripts/rigl/rn50_er_0.7_2x.sh source=rigl recipe=rigl arch=resnet50 method=rigl "
        "distribution=er sparsity=0.7 dense_layers=conv1 epochs=205 optimizer_batch_size=4096 "
        "label_smoothing=0.1 length=2 published_top1=76.50"
    )
    line = dict(entry.split("=") for entry in given.split())
    columns = next(csv.reader(text.splitlines()))
    published.ROWS.write_text(text + ",".join(line.get(c, "") for c in columns) + "\n")

    rows.main()

    *before, row = published.read_rows()
    assert before == list(ROWS.values())
    assert "| rn50_er_0.7_2x | 76.50 |" in (tmp_path / "results/README.md").read_text()
    text = (tmp_path / row["script"]).read_text()
    assert "# RigL, ER, 70% sparse, 2x training. Top-1 published by RigL: 76.50.\n" in text
    _, _, *argv = command(str(tmp_path / row["script"]), "--dry-run", python=recorder, cwd=tmp_path)
    assert main.main(argv) == 0
    plan = json.loads(capsys.readouterr().out)
    check_costs(plan["cost"], row)
    check_rigl(plan, row)


def test_the_published_accuracy_stands_in_the_script_and_nothing_else_does() -> None:
    for script, row in ROWS.items():
        text = (ROOT / script).read_text()
        claimed = [line for line in text.splitlines() if "Top-1" in line]
        assert len(claimed) == bool(row["published_top1"])
        for line in claimed:
            assert line.endswith(
                f" published by {SOURCES[row['source']]}: {row['published_top1']}."
            )


SOURCES = {
    "rigl": "RigL",
    "port": "the earlier port",
    "acdc": "AC/DC",
    "gap": "GaP",
    "srigl": "SRigL",
}


@pytest.mark.parametrize(
    ("script", "gpus", "micro", "accumulated"),
    [
        ("scripts/rn50_rigl_erk_0.9.sh", 1, 256, 8),
        ("scripts/rn50_rigl_erk_0.9.sh", 4, 256, 2),
        ("scripts/rn50_rigl_erk_0.9.sh", 8, 256, 1),
        ("scripts/rn50_rigl_erk_0.9.sh", 16, 128, 1),
        ("scripts/rigl/rn50_erk_0.9_5x.sh", 1, 256, 16),
        ("scripts/rigl/rn50_erk_0.9_5x.sh", 4, 256, 4),
        ("scripts/rigl/rn50_erk_0.9_5x.sh", 8, 256, 2),
        ("scripts/rigl/rn50_erk_0.9_5x.sh", 16, 256, 1),
    ],
)
def test_the_global_batch_does_not_depend_on_the_number_of_gpus(
    script: str, gpus: int, micro: int, accumulated: int, recorder: Path, tmp_path: Path
) -> None:
    batch = ROWS[script]["optimizer_batch_size"]
    done = call(script, "--dry-run", python=recorder, cwd=tmp_path, NPROC=str(gpus))
    argv = done.stdout.split("\0")
    assert argv[0] == f"WORLD_SIZE={gpus}"
    assert (value(argv, "--optimizer-batch-size"), value(argv, "-b")) == (batch, str(micro))
    assert f"{batch} = {gpus} processes x {micro} images x {accumulated} accumulated" in done.stderr


def test_a_smaller_gpu_takes_smaller_micro_batches(recorder: Path, tmp_path: Path) -> None:
    argv = command(
        "scripts/rn50_dense.sh", "--dry-run", python=recorder, cwd=tmp_path, BATCH_SIZE="100"
    )
    assert value(argv, "-b") == "64"


def test_gpus_that_do_not_divide_the_batch_are_refused(recorder: Path, tmp_path: Path) -> None:
    done = call("scripts/rn50_dense.sh", python=recorder, cwd=tmp_path, NPROC="3")
    assert done.returncode == 2
    assert done.stderr == "rn50_dense: 3 processes do not divide its global batch of 2048\n"


def test_launchers(recorder: Path, tmp_path: Path) -> None:
    env = {"python": recorder, "cwd": tmp_path, "RESULTS": str(tmp_path / "out")}
    script = "scripts/rn50_rigl_erk_0.8.sh"
    plain = command(script, **env)
    assert plain[:2] == ["WORLD_SIZE=", str(ROOT / "main.py")]
    one_node = command(script, **env, NPROC="8")
    assert one_node[1:6] == [
        "-m",
        "image_classification.launch",
        "--standalone",
        "--nproc-per-node",
        "8",
    ]
    assert value(one_node, "--max-restarts") == "0"
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "NPROC": "8"}
    two_nodes = command(script, **env, **nodes)
    assert value(two_nodes, "--nnodes") == "2"
    assert value(two_nodes, "--rdzv-backend") == "c10d"
    assert value(two_nodes, "--rdzv-endpoint") == "first:29500"
    assert value(two_nodes, "--rdzv-conf") == "is_host=0"
    assert "--local-addr" not in two_nodes
    assert value(two_nodes, "-b") == "128"
    nodes |= {"NNODES": "1:4", "NODE_RANK": "0", "NODE_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    elastic = command(script, **env, **nodes, MAX_RESTARTS="3")
    assert value(elastic, "--nnodes") == "1:4"
    assert value(elastic, "--rdzv-endpoint") == "first:4000"
    assert value(elastic, "--rdzv-conf") == "is_host=1"
    assert value(elastic, "--local-addr") == "10.0.0.1"
    assert value(elastic, "--max-restarts") == "3"
    assert value(elastic, "-b") == "64"
    task = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "3"}
    in_a_step = command(script, **env, **task)
    assert in_a_step[:2] == ["WORLD_SIZE=", str(ROOT / "main.py")]
    assert value(in_a_step, "-b") == "128"


def test_a_batch_job_starts_its_tasks_with_srun(recorder: Path, tmp_path: Path) -> None:
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho srun was called >&2\nexec "$@"\n')
    srun.chmod(0o755)
    done = call(
        "scripts/rn50_dense.sh",
        python=recorder,
        cwd=tmp_path,
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        RESULTS=str(tmp_path / "out"),
        SLURM_JOB_ID="7",
        SLURM_NTASKS="8",
    )
    assert "srun was called" in done.stderr
    assert value(done.stdout.split("\0"), "-b") == "256"


def test_several_nodes_need_an_address(recorder: Path, tmp_path: Path) -> None:
    done = call("scripts/rn50_dense.sh", python=recorder, cwd=tmp_path, NNODES="2")
    assert done.returncode != 0
    assert "NODE_RANK: is needed with NNODES" in done.stderr


def test_data_and_results_can_be_elsewhere_and_a_dry_run_writes_nothing(
    recorder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    env = {"DATA": "/images", "RESULTS": str(out)}
    argv = command("scripts/rn50_dense.sh", "--dry-run", python=recorder, cwd=tmp_path, **env)
    assert argv[2] == "/images"
    assert value(argv, "--workspace") == str(out)
    assert not out.exists()
    command("scripts/rn50_dense.sh", python=recorder, cwd=tmp_path, **env)
    assert out.is_dir()


def test_a_row_without_an_environment_names_the_command_that_makes_one(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    for python in (tmp_path / "bare/bin/python", tmp_path / "no/such/python"):
        done = call("scripts/rn50_rigl_erk_0.9.sh", "--dry-run", python=python, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert f"{python} lacks torch" in line
        (named,) = [word for word in line.split() if word.endswith("venv.sh,")]
        assert Path(named.rstrip(",")).is_file()


def test_flags_of_the_caller_come_last(recorder: Path, tmp_path: Path) -> None:
    argv = command(
        "scripts/rigl/mbv1_dense.sh", "--dry-run", "--amp", python=recorder, cwd=tmp_path
    )
    assert argv[-2:] == ["--dry-run", "--amp"]


def test_a_row_plans_itself_for_real(tmp_path: Path) -> None:
    """One row as a user starts it: nothing but the plan on standard output."""
    done = call(
        "scripts/rn50_rigl_erk_0.8_500ep.sh",
        "--dry-run",
        python=Path(sys.executable),
        cwd=tmp_path,
        NPROC="8",
    )
    plan = json.loads(done.stdout)
    assert (plan["epochs"], plan["world_size"], plan["accumulation"]) == (500, 8, 1)
    assert plan["sparse"]["num_updates"] == 2501


@pytest.mark.slow
@pytest.mark.parametrize("script", ROWS)
def test_every_row_plans_itself_for_real(script: str, tmp_path: Path) -> None:
    done = call(script, "--dry-run", python=Path(sys.executable), cwd=tmp_path)
    assert json.loads(done.stdout)["epochs"] == int(ROWS[script]["epochs"])
