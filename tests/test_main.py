"""main.py as its users run it: plans, training, resume, evaluation, several processes, mistakes."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from cli import networks
from sparse import runtime
from tests import forks
from tests.pictures import write

ROOT = Path(__file__).resolve().parent.parent
MAIN = str(ROOT / "main.py")
ORACLE = json.loads((ROOT / "tests/data/oracle.json").read_text())
SMALL = "--arch small_cnn --image-size 32 -b 8 --lr 0.05 -j 1 -p 2 --seed 3 --epochs 2".split()
RIGL = "--sparse-method rigl --sparsity 0.9 --distribution erk --delta-t 2".split()


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(*argv: str) -> Done:
    """Run main.py in this process: importing torch anew for every case takes too long."""
    out, err = io.StringIO(), io.StringIO()
    state = torch.get_rng_state()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main.main(argv)
    torch.set_rng_state(state)
    return Done(status, out.getvalue(), err.getvalue())


def launch(*program: str) -> Callable[..., Done]:
    """Return a `run` that starts `program` with the flags, in a process of its own."""

    def run(*argv: str) -> Done:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *program, MAIN, *argv],
            capture_output=True, text=True, timeout=300, env=environment, check=False,
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    return run


def plan(*argv: str) -> dict[str, Any]:
    done = run("--dry-run", *argv)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def train(
    data: Path, workspace: Path, *argv: str, run: Callable[..., Done] = run
) -> list[dict[str, Any]]:
    """Train and return the records of the raport."""
    done = run(str(data), *SMALL, "--workspace", str(workspace), *argv)
    assert done.returncode == 0, done.stderr[-4000:]
    return records(workspace)


def records(workspace: Path) -> list[dict[str, Any]]:
    lines = (workspace / "experiment_raport.json").read_text().splitlines()
    parsed = [json.loads(line.removeprefix("DLLL ")) for line in lines]
    return [r for r in parsed if r["type"] == "LOG"]


def last(log: list[dict[str, Any]], metric: str) -> Any:
    return [r["data"][metric] for r in log if metric in r["data"]][-1]


def weights(workspace: Path, name: str = "checkpoint.pth.tar") -> dict[str, Any]:
    return torch.load(workspace / name, weights_only=True)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """40 training and 14 validation JPEGs of two classes that differ in hue."""
    return write(tmp_path_factory.mktemp("pictures"), train=20, val=7)


def test_dry_run_is_the_plan_of_a_published_row() -> None:
    resolved = plan(
        *"--arch resnet50 --sparse-method rigl --sparsity 0.9 --distribution erk -b 256".split(),
        *"--epochs 100 --lr-schedule cosine --warmup 5 --label-smoothing 0.1".split(),
    )
    assert resolved["steps_per_epoch"] == 5004
    assert resolved["total_steps"] == 500_400
    assert resolved["optimizer_batch_size"] == 256
    assert resolved["precision"] == "float32"
    sparse = resolved["sparse"]
    assert (sparse["method"], sparse["delta_t"], sparse["drop_fraction"]) == ("rigl", 100, 0.3)
    assert sparse["t_end"] == 375_300
    assert sparse["num_updates"] == 3754  # steps 0, 100, ..., 375300
    active = [layer["num_active"] for layer in sparse["layers"]]
    assert active == ORACLE["models"]["resnet50"]["configs"]["erk/0.9/all_sparse"]["num_active"]
    assert sparse["overall_sparsity"] == pytest.approx(0.9, abs=1e-5)
    cost, oracle = resolved["cost"], ORACLE["models"]["resnet50"]["configs"]["erk/0.9/all_sparse"]
    for key in ("inference_flops", "inference_ratio", "size_mb", "overall_sparsity"):
        assert cost[key] == pytest.approx(oracle[key], rel=1e-6), key
    assert cost["training_ratio"] == pytest.approx(oracle["rigl"], rel=1e-6)


def test_the_plan_says_which_layers_have_blocks() -> None:
    argv = "--arch resnet18 --sparse-method rigl --sparsity 0.9 --block 1 4 -b 256 --epochs 2"
    layers = plan(*argv.split())["sparse"]["layers"]
    assert [layer["name"] for layer in layers if layer["block"] == [1, 1]] == ["conv1.weight"]
    assert all(layer["block"] == [1, 4] and layer["num_active"] % 4 == 0 for layer in layers[1:])


@pytest.mark.parametrize(("epochs", "events"), [(100, 15), (200, 35)])
def test_phases_of_acdc_are_given_in_epochs(epochs: int, events: int) -> None:
    argv = "--arch resnet50 --sparse-method acdc --sparsity 0.9 --distribution uniform -b 256"
    resolved = plan(*argv.split(), "--epochs", str(epochs), "--dense-layers", "conv1", "fc")
    assert resolved["sparse"]["num_updates"] == events
    active = {layer["name"]: layer["num_active"] for layer in resolved["sparse"]["layers"]}
    assert (active["layer1.0.conv1.weight"], active["fc.weight"]) == (409, 2_048_000)
    assert sum(active.values()) == 2_344_525 + 9_408 + 2_048_000
    cost = resolved["cost"]
    assert cost["training_ratio"] == pytest.approx((1 + cost["inference_ratio"]) / 2)
    assert cost["training_ratio"] == pytest.approx(0.565, abs=2e-3)


@pytest.mark.parametrize(
    ("argv", "updates"),
    [
        ("static", 0),
        ("set --delta-t 70", 1 + 375 // 70),
        ("snfs --redistribution none --t-end 400", 5),
        ("magnitude", 0),
        ("magnitude --scope global", 0),
        ("snip", 0),
        ("snip --scope global", 0),
        ("gmp --prune-start 10 --prune-end 60 --prune-every 20", 4),  # 10, 30, 50 and 60
        ("rigl_reset --t-start 100", 3),
        ("granet --delta-t 40", 12),  # after 40, 80, ..., 480 steps
        ("srigl --delta-t 40 --min-salient 0.5 --gradient-steps 4", 9),  # before 375 steps
        ("gap --phase-epochs 1 --num-phases 3 --partitions features.* fc", 3),
        ("acdc --dense-warmup-epochs 1 --last-sparse-epochs 1 --last-dense-epochs 1", 1),
    ],
)
def test_every_method_has_a_plan(argv: str, updates: int) -> None:
    shape = "--data-backend synthetic --synthetic-batches 100 -a small_cnn -b 4 --epochs 5"
    resolved = plan(*shape.split(), "--sparsity", "0.8", "--sparse-method", *argv.split())
    assert resolved["total_steps"] == 500
    assert resolved["sparse"]["num_updates"] == updates
    known = "global" not in argv and "granet" not in argv
    assert all((x["num_active"] is not None) == known for x in resolved["sparse"]["layers"])
    assert (resolved["cost"] is not None) == known


def test_sparsity_map(tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    path.write_text("'layer*': 0.5\nfc: 0.0\n")
    shape = "--arch resnet18 --sparse-method static --sparsity 0.8".split()
    layers = plan(*shape, "--sparsity-map", str(path))["sparse"]["layers"]
    density = {x["name"]: x["density"] for x in layers}
    assert density["layer1.0.conv1.weight"] == 0.5
    assert density["fc.weight"] == 1.0
    path.write_text("nothing*: 0.5\n")
    done = run("--dry-run", *shape, "--sparsity-map", str(path))
    assert (done.returncode, "nothing*" in done.stderr) == (2, True)


def test_the_attention_of_a_vision_transformer_is_sparse_where_include_names_it() -> None:
    flags = "--data-backend synthetic --arch vit_b_16 -b 4 --epochs 1".split()
    flags += "--sparse-method rigl --sparsity 0.9".split()
    without, named = plan(*flags), plan(*flags, "--include", "*.in_proj_weight")
    assert without["cost"]["overall_sparsity"] < 0.7
    assert named["cost"]["overall_sparsity"] == pytest.approx(0.9, abs=1e-5)
    assert named["sparse"]["overall_sparsity"] == named["cost"]["overall_sparsity"]
    assert len(named["sparse"]["layers"]) == len(without["sparse"]["layers"]) + 12
    projection = "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
    for part in ("sparse", "cost"):
        (layer,) = [layer for layer in named[part]["layers"] if layer["name"] == projection]
        assert (layer["shape"], layer["density"] < 0.2) == ([2304, 768], True)
    assert layer["flops"] < 0.2 * layer["dense_flops"]


def test_included_weights_are_trained_resumed_evaluated_and_exported(tmp_path: Path) -> None:
    flags = "--data-backend synthetic --synthetic-batches 2 --cpu --num-classes 4 -b 4 --seed 0"
    model = "--arch mobilenet_v1 --width 0.25 --image-size 32 --workspace".split()
    sparse = "--sparse-method rigl --sparsity 0.8 --distribution uniform --delta-t 2".split()
    flags = [*flags.split(), *model, str(tmp_path), *sparse, "--epochs", "2"]
    ema = ["--use-ema", "0.9"]
    assert run(*flags, *ema, "--include", "*.dw", "--run-epochs", "1").returncode == 0
    refused = the_mistake(*flags, *ema, "--resume", "auto")
    assert "cannot go on with --include ['*.dw'] -> None: sparse state: it has a mask" in refused
    done = run(*flags, *ema, "--include", "*.dw", "--resume", "auto")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "checkpoint.pth.tar"
    state = weights(tmp_path)
    masked = [name for name in state["sparse"]["masks"] if name.endswith(".dw.weight")]
    assert len(masked) == 13
    zeros = sum(int((state["state_dict"][name] == 0).sum()) for name in masked)
    assert zeros >= 0.79 * sum(state["state_dict"][name].numel() for name in masked)
    evaluation = [*flags[: -len(sparse) - 2], "--resume", str(path), "--evaluate"]
    assert run(*evaluation, "--workspace", str(tmp_path / "e")).returncode == 0
    log = records(tmp_path / "e")
    assert last(log, "sparse.sparsity.blocks.3.dw") == pytest.approx(0.8, abs=0.01)
    assert last(log, "sparse.sparsity") == pytest.approx(0.8, abs=0.01)
    trained = networks.read(path)
    networks.write_compact(trained, tmp_path / "net", dtype="float32", fold=False)
    stored = runtime.read(tmp_path / "net").masks()
    assert all(torch.equal(stored[name], trained.masks[name]) for name in masked)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = runtime.load(tmp_path / "net", backend="torch")(images)
        torch.testing.assert_close(found, trained.model()(images), rtol=1e-4, atol=1e-5)


def test_flags_of_the_earlier_port_are_understood() -> None:
    old = plan(
        *"--dense-allocation 0.1 --delta 50 --alpha 0.2 --T-end-percent 0.8".split(),
        *"--sp-distribution uniform -a resnet18 --mom 0.875 --wd 3e-5".split(),
    )
    new = plan(
        *"--sparse-method rigl --sparsity 0.9 --delta-t 50 --drop-fraction 0.2".split(),
        *"--t-end-fraction 0.8 --distribution uniform --arch resnet18".split(),
        *"--momentum 0.875 --weight-decay 3e-5".split(),
    )
    assert old == new
    fixed = plan("--dense-allocation", "0.2", "--static-topo", "1")
    assert (fixed["sparse"]["method"], fixed["sparse"]["sparsity"]) == ("static", 0.8)


def test_plan_counts_the_images_of_the_data(pictures: Path) -> None:
    resolved = plan(str(pictures), "-b", "8", "--optimizer-batch-size", "16", "-a", "resnet18")
    assert (resolved["steps_per_epoch"], resolved["optimizer_batch_size"]) == (2, 16)
    assert resolved["sparse"] | {"layers": []} == {
        "method": "dense", "sparsity": None, "distribution": None, "delta_t": None,
        "drop_fraction": None, "t_end": None, "num_updates": 0, "overall_sparsity": 0.0,
        "layers": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("DATA --sparsity 0.9", "--sparsity has no effect without another --sparse-method"),
        ("DATA --checkpoint-filename new/x.pth", "'new/x.pth' must be a plain file name"),
        (f"DATA --checkpoint-filename {'x' * 241}", "of at most 240 bytes"),
        ("DATA --checkpoint-filename model_best.pth.tar", "the name of the best checkpoint"),
        ("DATA --checkpoint-filename checkpoint_0001.pth.tar", "the name of the best checkpoint"),
        ("DATA --raport-file ./checkpoint.pth.tar", "'./checkpoint.pth.tar' is no name of its own"),
        ("DATA --raport-file checkpoint.previous.pth.tar", "--raport-file 'checkpoint.previous"),
        ("DATA --raport-file .", "--raport-file '.' is no name of its own"),
        ("DATA --sparse-method rigl", "needs --sparsity"),
        ("DATA --T-end-epochs 80", "--T-end-epochs is not a flag any more: use --t-end-fraction"),
        ("DATA --sparse-method rigl --sparsity 0.9 --prune-end 9", "--prune-end has no effect"),
        (
            "DATA --sparse-method rigl --sparsity 0.9 --t-end 9 --t-end-fraction 0.5",
            "--t-end and --t-end-fraction say the same",
        ),
        ("DATA --sparse-method lottery --sparsity 0.9", "known are dense, acdc, gap"),
        ("DATA --sparse-method rigl --sparsity 1.0", "sparsity"),
        ("DATA --sparse-method rigl --sparsity -0.1", "sparsity"),
        ("DATA --sparse-method rigl --sparsity 0.9 --delta-t 0", "delta"),
        ("DATA --sparse-method rigl --sparsity 0.9 --t-end-fraction 1.5", "--t-end-fraction"),
        (
            "DATA --sparse-method rigl --sparsity 0.9 --t-end 11",
            "--t-end 11 is beyond the run's 10",
        ),
        ("DATA --sparse-method gmp --sparsity 0.9 --prune-end 11", "--prune-end 11 is beyond"),
        ("DATA --sparse-method rigl --sparsity 0.9 --dense-layers nosuch*", "nosuch*"),
        ("DATA --sparse-method static --sparsity 0.9 --delta-t 7", "--delta-t has no effect"),
        ("DATA --grad-compress active", "--sparse-method dense, whose weights are all active"),
        (
            "DATA --sparse-method snfs --sparsity 0.9 --grad-compress active+bf16",
            "use none or bf16",
        ),
        ("DATA --sparse-method static --sparsity 0.9 --include fc lstm", "include: 'lstm' matches"),
        ("DATA --include '*'", "--include has no effect"),
        ("DATA --arch resnet51", "resnet51"),
        ("DATA --arch vit_b_16", "--image-size 32 does not suit vit_b_16, whose own is 224"),
        ("DATA --arch vit_b_16 --dry-run", "--image-size 32 does not suit vit_b_16"),
        ("DATA --num-classes 3", "--num-classes 3"),
        ("DATA --resume nowhere.pth.tar", "nowhere.pth.tar"),
        ("DATA -b 100", "40 training images"),
        ("DATA --optimizer-batch-size 12", "--optimizer-batch-size 12 is not a multiple"),
        ("DATA --pretrained-from-file nowhere.pth.tar", "nowhere.pth.tar does not exist"),
        ("DATA --checkpoint-every-steps -1", "--checkpoint-every-steps must be at least 0"),
        ("DATA --preempt-grace 0", "--preempt-grace must be above 0 seconds"),
        ("DATA --max-bad-steps 0", "--max-bad-steps must be at least 1"),
        ("DATA --no-checkpoints --checkpoint-every-steps 5", "has no effect without checkpoints"),
        ("/no/such/place", "/no/such/place"),
        ("DATA --sparse-methd rigl", "did you mean --sparse-method?"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    pictures: Path, tmp_path: Path, argv: str, message: str
) -> None:
    words = [str(pictures) if word == "DATA" else word for word in argv.split()]
    assert message in the_mistake(*SMALL, "--workspace", str(tmp_path), *words)


def the_mistake(*argv: str) -> str:
    """Return the one line of standard error that a user's mistake gives."""
    done = run(*argv)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    return line


def test_mistakes_are_found_before_processes_meet(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is at the address: a process group that was started would wait there."""
    train(pictures, tmp_path, *RIGL, "--data-backend", "pytorch", "--epochs", "1")
    checkpoint = str(tmp_path / "checkpoint.pth.tar")
    for name, value in {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3",
        "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "9",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    for flags, message in {
        "--optimizer-batch-size 16": "--optimizer-batch-size 16 is not a multiple of 3 processes",
        "--sparse-method rigl --sparsity 1.0": "sparsity",
        "--resume nowhere.pth.tar": "nowhere.pth.tar does not exist",
        f"--resume {checkpoint} {' '.join(RIGL)}": "3 processes do not divide the 8 images",
        f"--resume {checkpoint} --optimizer-batch-size 24 --sparse-method set --sparsity 0.9":
            f"{checkpoint} was trained with --sparse-method rigl, not set",
        f"--resume {checkpoint} --arch wrn22_2": f"{checkpoint} holds small_cnn",
        f"--resume {checkpoint} --num-classes 2 --evaluate --arch wrn22_2": "does not fit",
    }.items():  # fmt: skip
        argv = (str(pictures), *SMALL, "--workspace", str(tmp_path), *flags.split())
        assert message in the_mistake(*argv)


@pytest.mark.parametrize("backend", ["dali-cpu", "pytorch"])
def test_rigl_trains_resumes_and_evaluates(pictures: Path, tmp_path: Path, backend: str) -> None:
    flags = ["--data-backend", backend, *RIGL]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    log = train(pictures, whole, *flags)
    assert last(log, "sparse.sparsity") == pytest.approx(0.9, abs=0.001)
    assert {r["data"]["sparse.grown"] for r in log if "sparse.grown" in r["data"]} != {0}

    train(pictures, parts, *flags, "--run-epochs", "1")
    halfway = (parts / "experiment_raport.json").read_text()
    log = train(pictures, parts, *flags, "--resume", "auto")
    assert (parts / "experiment_raport.json").read_text().startswith(halfway)
    a, b = weights(whole), weights(parts)
    assert a["epoch"] == b["epoch"] == 2
    assert all(torch.equal(v, b["state_dict"][k]) for k, v in a["state_dict"].items())
    assert (weights(whole, "model_best.pth.tar")["state_dict"]).keys() == a["state_dict"].keys()

    checkpoint = str(whole / "checkpoint.pth.tar")
    again = train(
        pictures, tmp_path / "eval", "--data-backend", backend, "--evaluate", "--resume", checkpoint
    )
    assert again[-1]["step"] == []
    assert last(again, "val.top1") == last(records(whole), "val.top1")
    resolved = plan(str(pictures), *SMALL, *RIGL)
    assert last(again, "sparse.sparsity") == resolved["sparse"]["overall_sparsity"]
    assert last(again, "sparse.size_mb") == pytest.approx(resolved["cost"]["size_mb"], rel=1e-3)
    for layer in resolved["sparse"]["layers"]:
        name = layer["name"].removesuffix(".weight")
        assert last(again, f"sparse.sparsity.{name}") == pytest.approx(1 - layer["density"])
    assert not list((tmp_path / "eval").glob("*.tar"))


def test_blocks_are_planned_trained_evaluated_and_exported(tmp_path: Path) -> None:
    data = "--data-backend synthetic --synthetic-batches 2 --cpu --num-classes 4 -b 4 --seed 0"
    argv = [*data.split(), "--arch", "small_cnn", "--image-size", "32"]
    trained = [*argv, "--workspace", str(tmp_path), "--epochs", "1", *RIGL]
    single, resolved = (plan(*trained, *more) for more in ((), ("--block", "1", "4")))
    pairs = [r["cost"]["layers"] for r in (single, resolved)]
    divided = [n["num_weights"] for n in pairs[0] if n["density"] < 1 and n["shape"][1] % 4 == 0]
    assert len(divided) > 1
    saved = 3 / 4 * sum(divided) / 8 / 1e6
    difference = single["cost"]["size_mb"] - resolved["cost"]["size_mb"]
    assert difference == pytest.approx(saved, rel=1e-6)

    assert run(*trained, "--block", "1", "4").returncode == 0
    checkpoint = tmp_path / "checkpoint.pth.tar"
    evaluation = ["--evaluate", "--resume", str(checkpoint), "--workspace", str(tmp_path / "e")]
    assert run(*argv, *evaluation).returncode == 0
    size = last(records(tmp_path / "e"), "sparse.size_mb")
    assert size == pytest.approx(resolved["cost"]["size_mb"], rel=1e-3)
    assert size < single["cost"]["size_mb"] - saved / 2
    networks.write_compact(networks.read(checkpoint), tmp_path / "n", dtype="float32", fold=True)
    assert len(runtime.read(tmp_path / "n").header.blocks) == len(divided)


def test_a_finished_run_resumes_to_nothing(pictures: Path, tmp_path: Path) -> None:
    """In a process of its own: it has to end by itself, workers and all."""
    flags = ["--data-backend", "pytorch", "--training-only", "--epochs", "1"]
    train(pictures, tmp_path, *flags)
    before = (tmp_path / "checkpoint.pth.tar").read_bytes()
    train(pictures, tmp_path, *flags, "--resume", "auto", run=launch())
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == before


def test_a_resumed_run_keeps_the_seed_of_its_checkpoint(pictures: Path, tmp_path: Path) -> None:
    flags = "--arch small_cnn --image-size 32 -b 8 --epochs 2 -j 0 --data-backend pytorch"
    flags = [str(pictures), *flags.split(), "--training-only", "--workspace", str(tmp_path)]
    assert run(*flags, "--seed", "0", "--run-epochs", "1").returncode == 0
    assert run(*flags, "--resume", "auto").returncode == 0
    assert last(records(tmp_path), "seed") == 0
    assert weights(tmp_path)["seed"] == 0


def test_a_dense_checkpoint_does_not_continue_as_a_sparse_run(
    pictures: Path, tmp_path: Path
) -> None:
    train(pictures, tmp_path, "--data-backend", "pytorch", "--epochs", "1", "--training-only")
    path = str(tmp_path / "checkpoint.pth.tar")
    done = run(str(pictures), *SMALL, *RIGL, "--workspace", str(tmp_path), "--resume", path)
    assert done.returncode == 2
    assert path in done.stderr
    assert "sparse" in done.stderr


def test_everything_at_once(pictures: Path, tmp_path: Path) -> None:
    """float16, accumulation, MixUp, EMA, label smoothing, channels_last, TensorBoard together."""
    log = train(
        pictures, tmp_path, *RIGL, "--data-backend", "dali-cpu", "--epochs", "1", "--amp",
        "--static-loss-scale", "128", "--optimizer-batch-size", "16", "-b", "4", "--mixup", "0.2",
        "--use-ema", "0.9", "--label-smoothing", "0.1", "--memory-format", "nhwc", "--nesterov",
        "--tensorboard", str(tmp_path / "tb"), "--gather-checkpoints", "1", "--image-size", "16",
    )  # fmt: skip
    assert 0 <= last(log, "val_ema.top1") <= 100
    assert last(log, "train.grad_scale") > 0
    assert list((tmp_path / "tb").glob("events.out.tfevents.*"))
    ema = {k.removeprefix("module."): v for k, v in weights(tmp_path)["ema"].items()}
    for layer in plan(str(pictures), *SMALL, *RIGL)["sparse"]["layers"]:
        zeros = int((ema[layer["name"]] == 0).sum())
        assert zeros >= ema[layer["name"]].numel() - layer["num_active"]


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def together(*argv: str) -> Done:
    """Run main.py on two processes that begin in a moment, with the variables of torchrun."""
    with tempfile.NamedTemporaryFile() as output:
        statuses = forks.finish_together(argv, Path(output.name))
        return Done(max(statuses), "", Path(output.name).read_text())


@pytest.mark.distributed
def test_two_processes_by_multiproc_train_as_torchruns_do(pictures: Path, tmp_path: Path) -> None:
    flags = [*RIGL, "--data-backend", "pytorch", "--epochs", "1", "-b", "4"]
    train(pictures, tmp_path / "a", *flags, run=together)
    multiproc = [str(ROOT / "multiproc.py"), "--nproc_per_node", "2", "--master_port"]
    log = train(pictures, tmp_path / "b", *flags, run=launch(*multiproc, free_port()))
    assert last(log, "val.top1") == last(records(tmp_path / "a"), "val.top1")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(v, b["state_dict"][k]) for k, v in a["state_dict"].items())


def losses(log: list[dict[str, Any]]) -> list[float]:
    return [r["data"]["train.loss"] for r in log if "train.loss" in r["data"]]


@pytest.mark.distributed
def test_two_processes_that_send_less_train_alike(tmp_path: Path) -> None:
    modes = ("none", "active", "bf16", "active+bf16")
    synthetic = "--data-backend synthetic --synthetic-batches 6 --arch small_cnn --cpu -b 4"
    flags = [*synthetic.split(), *"--image-size 32 --lr 0.05 -p 1 --seed 3 --epochs 2".split()]
    flags += ["--memory-format", "nhwc", "--training-only", *RIGL]
    for mode in modes:
        done = together(*flags, "--workspace", str(tmp_path / mode), "--grad-compress", mode)
        assert done.returncode == 0, done.stderr[-4000:]
    logs = {mode: records(tmp_path / mode) for mode in modes}
    exact = losses(logs["none"])
    assert len(exact) == 2 * (6 + 1) + 1  # per step, per epoch, in the end
    assert losses(logs["active"]) == exact
    a, b = (weights(tmp_path / mode)["state_dict"] for mode in ("none", "active"))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    for mode in ("bf16", "active+bf16"):
        assert losses(logs[mode]) == pytest.approx(exact, rel=0.02)
        assert losses(logs[mode]) != exact
    # Updates at steps 0, 2, 4, 6 and 8 of 12 send everything.
    ratio = last(logs["active"], "sparse.sent_ratio")
    assert 5 / 12 < ratio < 0.6
    assert last(logs["active+bf16"], "sparse.sent_ratio") == ratio / 2


def test_one_process_says_that_it_has_nothing_to_send(pictures: Path, tmp_path: Path) -> None:
    train(pictures, tmp_path, *RIGL, "--training-only", "--epochs", "1", "--data-backend",
          "pytorch", "--grad-compress", "active")  # fmt: skip
    assert "sparse.sent_ratio" not in records(tmp_path)[-1]["data"]


def test_training_that_cannot_be_sparse_ends_in_one_line(pictures: Path, tmp_path: Path) -> None:
    """SNIP sees no gradient behind residual branches that start at 0."""
    done = run(
        str(pictures), *SMALL, *"--arch resnet18 --last-bn-0-init --no-checkpoints".split(),
        *"--sparse-method snip --sparsity 0.9".split(), "--workspace", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("main.py: error: method 'snip' ranks layer1.0.conv1.weight by")
    assert "dense_layers" in line


def test_an_evaluation_takes_the_image_size_of_the_checkpoint(
    pictures: Path, tmp_path: Path
) -> None:
    log = train(pictures, tmp_path, "--image-size", "24")
    path = str(tmp_path / "checkpoint.pth.tar")
    arguments = ["--evaluate", "--resume", path, "--workspace", str(tmp_path / "evaluation")]
    for named in ([], ["--arch", "small_cnn"]):
        assert run(str(pictures), *named, *arguments).returncode == 0
        found = records(tmp_path / "evaluation")
        assert last(found, "val.loss") == pytest.approx(last(log[:-1], "val.loss"))
