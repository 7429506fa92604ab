"""The accuracy benchmark: its recipes, its augmentation, and runs cut short."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import cifar, convergence
from benchmarks.cifar_run import Recorded, Run, Training, attach, plain_step
from image_classification import checkpoint

ROOT = Path(__file__).resolve().parent.parent
DIRECTORY = os.environ.get("CIFAR10_DIR")
SHORT = ["--batch-size", "8", "--delta-t", "2"]
TIMES = ("seconds", "seconds_per_step")


@pytest.fixture(autouse=True)
def generator() -> Iterator[None]:
    """Leave torch's generator as it was: runs seed it."""
    with torch.random.fork_rng():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 20 images for training, which make two batches of 8, and 10 for validation."""
    folder = tmp_path_factory.mktemp("cifar")
    noise = torch.Generator().manual_seed(0)
    for split, count in (("train", 2), ("val", 1)):
        for label in range(10):
            for number in range(count):
                path = folder / split / str(label) / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = torch.randint(0, 256, (32, 32, 3), generator=noise, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(path)
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    """Read the results of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(result: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Leave out what two equal runs may differ in: times, and on a GPU the rounding."""
    rounded = ("top1", "best_top1", "train_loss") if device.type == "cuda" else ()
    return {name: value for name, value in result.items() if name not in (*TIMES, *rounded)}


def images_of(device: torch.device, count: int = 16) -> cifar.Split:
    """Make random bytes and labels."""
    noise = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=noise, dtype=torch.uint8)
    return images.to(device), torch.arange(count).remainder(10).to(device)


# Recipes.


def wrn(method: str = "rigl", epochs: int = 250, batch_size: int = 128, delta_t: int = 100) -> Run:
    return Run(method, 0.95, 0, epochs, arch="wrn22_2", batch_size=batch_size, delta_t=delta_t)


def test_the_published_schedule_has_its_published_numbers() -> None:
    # 50,000 images are 390 batches of 128: 97,500 steps in 250 epochs.
    split = torch.empty(0), torch.zeros(50_000)
    training = Training(wrn(), {"train": split}, torch.device("cpu"), graph=False)
    assert training.total_steps == 97_500
    recipe = cifar.RECIPES["wrn22_2"]
    rates = {0: 0.1, 29_999: 0.1, 30_000: 0.02, 60_000: 0.004, 90_000: 0.0008, 97_499: 0.0008}
    for step, rate in rates.items():
        assert 0.1 * recipe.lr_factor(step, 97_500) == pytest.approx(rate)
    model = recipe.build()
    found = {}
    for method in ("rigl", "gmp"):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        sparsifier = attach(wrn(method), model, optimizer, 97_500)
        assert sparsifier is not None
        window = sparsifier.method.window
        assert window is not None
        found[method] = window.t_start, window.t_end, window.delta_t, window.num_updates(97_500)
        sparsifier.remove()
    # Updates at 0, 100, ... 75,000, and prunings at 20,000, 21,000, ... 75,000.
    assert found == {"rigl": (0, 75_000, 100, 751), "gmp": (20_000, 75_000, 1000, 56)}


def test_a_shorter_run_has_the_schedule_in_proportion() -> None:
    recipe = cifar.RECIPES["wrn22_2"]
    steps = range(39_000)  # 100 epochs
    factors = [recipe.lr_factor(step, 39_000) for step in steps]
    changes = [step for step in steps[1:] if factors[step] != factors[step - 1]]
    assert changes == [12_000, 24_000, 36_000]
    assert recipe.t_end(39_000) == 30_000
    assert recipe.pruning(39_000, 100) == cifar.Pruning(8_000, 30_000, 400)


def test_weight_decay_leaves_normalization_and_biases_alone() -> None:
    split = torch.empty(0), torch.zeros(16)
    training = Training(
        wrn("dense", epochs=1, batch_size=8), {"train": split}, torch.device("cpu"), graph=False
    )
    state = training.state()["optimizer"]["param_groups"]
    decays = {index: group["weight_decay"] for group in state for index in group["params"]}
    kernels = [p.ndim > 1 for p in training.model.parameters()]
    assert sorted(decays.values()) == [0.0] * kernels.count(False) + [5e-4] * kernels.count(True)
    assert len(state[0]["params"]) == kernels.count(True) == 23  # 22 convolutions and fc


# Data.


def test_cuts_equal_those_made_by_hand(device: torch.device) -> None:
    image = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
    where = {"top": [4, 3, 0], "left": [4, 5, 4], "flip": [False, True, False]}
    top, left, flip = (torch.tensor(values, device=device) for values in where.values())
    found = cifar.crop(image.expand(3, -1, -1, -1).to(device), top, left, flip)
    assert found[:, 0].tolist() == [
        image[0, 0].tolist(),
        # Rows -1 to 2 and columns 1 to 4; the edge is mirrored; left and right are swapped.
        [[3, 3, 2, 1], [3, 3, 2, 1], [7, 7, 6, 5], [11, 11, 10, 9]],
        # Rows -4 to -1.
        [[12, 13, 14, 15], [8, 9, 10, 11], [4, 5, 6, 7], [0, 1, 2, 3]],
    ]


def test_images_are_standardized_one_by_one(device: torch.device) -> None:
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=device)
    images[0, :, :16], images[0, :, 16:] = 7, 3  # mean 5, deviation 2; the other one is constant
    found = cifar.standardize(images)
    assert torch.allclose(found[0, :, :16], torch.ones(3, 16, 32, device=device))
    assert torch.allclose(found[0, :, 16:], -torch.ones(3, 16, 32, device=device))
    assert not found[1].any()


def test_an_epoch_is_the_same_on_every_device_and_keeps_labels(device: torch.device) -> None:
    images = torch.zeros(22, 3, 32, 32, dtype=torch.uint8)
    images[::2, 0] = images[1::2, 1] = 200  # even numbers are red, odd ones are green
    images[:, 2] = torch.arange(22, dtype=torch.uint8).view(-1, 1, 1)
    labels = torch.arange(22)
    epochs = []
    for place, group in ((torch.device("cpu"), 50), (device, 1)):
        torch.manual_seed(3)
        split = images.to(place), labels.to(place)
        epochs.append(list(cifar.published_batches(split, 8, group=group)))
    assert [len(epoch) for epoch in epochs] == [2, 2]  # six images are left out
    seen = torch.cat([answers for _, answers in epochs[1]])
    assert len(seen.unique()) == 16
    for (batch, answers), (other, others) in zip(*epochs, strict=True):
        assert torch.equal(answers, others.cpu())
        assert torch.allclose(batch, other.cpu(), atol=1e-5)
        assert torch.equal(batch[:, 0, 0, 0] > 0, answers % 2 == 0)


# Steps.


def test_a_recorded_step_is_the_plain_step(device: torch.device) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(cifar.build_small().to(device))
    images, labels = images_of(device)
    prepared = cifar.normalize(images)
    recorded = Recorded(models[1], torch.zeros_like(prepared[:8]), torch.zeros_like(labels[:8]))
    for part in (slice(0, 8), slice(8, 16)):
        loss = plain_step(models[0], prepared[part], labels[part])
        assert close(recorded(prepared[part], labels[part]), loss, device)
        for plain, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert plain.grad is not None
            assert other.grad is not None
            assert close(other.grad, plain.grad, device)
    for (name, plain), other in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        assert close(other, plain, device), name


def close(found: Tensor, expected: Tensor, device: torch.device) -> bool:
    """Compare exactly on a CPU; a GPU may choose other algorithms."""
    if device.type == "cpu":
        return torch.equal(found, expected)
    return torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", ["rigl", "gmp"])
def test_updates_work_outside_of_the_recording(device: torch.device, method: str) -> None:
    data = {"train": images_of(device, 40), "val": images_of(device, 10)}
    trainings = []
    for graph in (False, True):
        training = Training(
            Run(method, 0.9, 0, 2, batch_size=8, delta_t=2), data, device, graph=graph
        )
        for _ in range(2):
            training.train_epoch()
        trainings.append(training)
    plain, recorded = (training.result() for training in trainings)
    assert recorded["updates"] == plain["updates"] > 2
    assert recorded["overall_sparsity"] == plain["overall_sparsity"] == pytest.approx(0.9, abs=1e-3)
    if device.type == "cpu":
        assert recorded["train_loss"] == plain["train_loss"]
        assert equal_weights(*(training.model for training in trainings))


def equal_weights(ours: nn.Module, theirs: nn.Module) -> bool:
    """Compare all weights and buffers bit for bit."""
    other = theirs.state_dict()
    return all(torch.equal(value, other[name]) for name, value in ours.state_dict().items())


# Runs.


def test_a_short_run_has_its_table_and_its_lines(
    device: torch.device, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs.jsonl"
    flags = ["--out", str(out), "--device", device.type, "--arch", "wrn22_2", *SHORT]
    flags += "--epochs 1 --seeds 0 1 --methods static rigl --json".split()
    assert convergence.main([str(data), *flags]) == 0
    results = lines(out)
    assert [(r["method"], r["seed"]) for r in results] == [
        ("static", 0), ("rigl", 0), ("static", 1), ("rigl", 1),
    ]  # fmt: skip
    for result in results:
        assert result["arch"] == "wrn22_2"
        assert (result["sparsity"], result["distribution"], result["epochs"]) == (0.95, "erk", 1)
        assert result["updates"] == (1 if result["method"] == "rigl" else 0)
        assert result["best_top1"] == result["top1"]
        assert result["graph"] == (device.type == "cuda")
        assert result["versions"]["torch"] == torch.__version__
        assert result["training_flops"] > 2 * 8 * result["inference_flops"] > 0
        assert 0 < 2 * result["seconds_per_step"] <= result["seconds"] + 0.1
    assert (results[0]["device"] == "cpu") == (device.type == "cpu")
    *_, head, rule, static, rigl, means = capsys.readouterr().out.splitlines()
    assert (head.count("|"), set(rule)) == (static.count("|"), {"|", "-"})
    for row, method, published in ((static, "static", "89.0"), (rigl, "rigl", "91.8")):
        scores = [r["top1"] for r in results if r["method"] == method]
        mean = sum(scores) / 2
        spread = abs(scores[0] - scores[1]) / 2**0.5
        cells = row.strip("| ").split(" | ")
        assert cells[:3] == ["0.95", method, f"{mean:.2f} ± {spread:.2f}"]
        assert cells[4] == "2"
        assert cells[-1] == published
        assert json.loads(means)[f"{method}_0.95"] == round(mean, 2)

    # Nothing is missing now, so that the images are not even read.
    assert convergence.main([str(tmp_path / "nowhere"), *flags]) == 0
    assert capsys.readouterr().out.splitlines() == [head, rule, static, rigl, means]
    assert lines(out) == results
    assert convergence.main([str(data), *flags, "--methods", "rigl", "set"]) == 0
    assert [(r["method"], r["seed"]) for r in lines(out)[4:]] == [("set", 0), ("set", 1)]


def test_every_method_makes_a_run(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs.jsonl"
    flags = ["--out", str(out), "--device", "cpu", *SHORT, "--delta-t", "1"]
    flags += "--epochs 3 --seeds 0 --sparsities 0.8 --methods all".split()
    assert convergence.main([str(data), *flags]) == 0
    results = {result["method"]: result for result in lines(out)}
    assert list(results) == list(convergence.METHODS)
    dense = results["dense"]["training_flops"]
    for method, result in results.items():
        assert (result["training_flops"] < dense) == (method != "dense")
        assert (result["updates"] > 0) == (method not in ("dense", "static"))


def test_results_of_earlier_versions_are_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs.jsonl"
    out.write_text(
        '{"method": "rigl", "sparsity": 0.9, "seed": 0, "epochs": 1, "batch_size": 128, "lr": 0.1, '
        '"weight_decay": 0.0005, "delta_t": 50, "drop_fraction": 0.3, "top1": 51.94, '
        '"overall_sparsity": 0.9, "inference_flops": 462920.0, "training_flops": 7.0e10, '
        '"seconds": 18.5, "device": "cpu"}\n'
    )
    flags = "--epochs 1 --seeds 0 --sparsities 0.9 --methods rigl".split()
    assert convergence.main([str(tmp_path), "--out", str(out), *flags]) == 0
    assert "| 0.9 | rigl | 51.94 | 51.94 | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["rigl", "gmp"])
def test_a_loaded_run_goes_on_bit_for_bit(
    device: torch.device, method: str, tmp_path: Path
) -> None:
    data = {"train": images_of(device, 24), "val": images_of(device, 10)}
    run = wrn(method, epochs=2, batch_size=8, delta_t=2)
    whole, before, after = (Training(run, data, device, graph=True) for _ in range(3))
    torch.manual_seed(0)
    whole.train_epoch()
    whole.train_epoch()
    torch.manual_seed(0)
    before.train_epoch()
    checkpoint.write(tmp_path / "run", before.state())
    torch.rand(5)
    after.load(tmp_path / "run")
    after.train_epoch()
    assert untimed(after.result(), device) == untimed(whole.result(), device)
    if device.type == "cpu":
        assert equal_weights(after.model, whole.model)


def test_a_killed_run_goes_on_to_the_same_result(
    device: torch.device, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(data), *SHORT, "--device", device.type, "--checkpoint-every", "1"]
    flags += "--epochs 50 --seeds 4 --sparsities 0.9 --methods rigl --out".split()
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert convergence.main([*flags, str(whole)]) == 0
    command = [sys.executable, str(ROOT / "benchmarks/convergence.py"), *flags, str(killed)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        command, env={**os.environ, **threads}, stdout=subprocess.DEVNULL
    ) as process:
        while not list(tmp_path.glob("killed.jsonl.*.checkpoint")):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert not killed.exists()
    capsys.readouterr()
    assert convergence.main([*flags, str(killed)]) == 0
    assert (
        "small-rigl-0.9-seed4-50epochs-batch8-delta2 goes on after epoch" in capsys.readouterr().out
    )
    (expected,), (found,) = lines(whole), lines(killed)
    assert untimed(found, device) == untimed(expected, device)
    # Half of a checkpoint may be left: the process was killed.
    assert {path.name for path in tmp_path.iterdir()} <= {
        "whole.jsonl", "killed.jsonl",
        ".killed.jsonl.small-rigl-0.9-seed4-50epochs-batch8-delta2.checkpoint.tmp",
    }  # fmt: skip


# Mistakes.


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--epochs 0", "--epochs must be at least 1, got 0"),
        ("--sparsities 1.5", "--sparsities must be in [0, 1), got 1.5"),
        ("--seeds -1", "--seeds must not be negative, got -1"),
        ("--methods rigl prune", "invalid choice: 'prune'"),
        ("--device cpu --graph", "--graph needs a GPU"),
        ("", "--batch-size 128: there are only 20 images"),
    ],
)
def test_a_mistake_is_one_line(
    flags: str, told: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs.jsonl"
    assert convergence.main([str(data), "--out", str(out), *flags.split()]) == 2
    check_told(told, capsys)
    assert not out.exists()


def check_told(told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Expect one line on standard error, and nothing else."""
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert printed.err.startswith("convergence.py: error: ")
    assert told in printed.err


def test_other_images_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--out", str(tmp_path / "runs.jsonl")]
    assert convergence.main([str(tmp_path / "nowhere"), *flags]) == 2
    check_told("nowhere/train holds no directories of images", capsys)
    for split in ("train", "val"):
        path = tmp_path / "one" / split / "cat" / "1.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(path)
    assert convergence.main([str(tmp_path / "one"), *flags]) == 2
    check_told("has 1 classes in train and 1 in val", capsys)
    Image.new("RGB", (40, 30)).save(path)
    assert convergence.main([str(tmp_path / "one"), *flags]) == 2
    check_told("1.png has 40 x 30 pixels", capsys)


def test_damaged_files_are_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs.jsonl"
    flags = [str(data), "--out", str(out), *SHORT, "--device", "cpu"]
    flags += "--epochs 2 --seeds 0 --sparsities 0.9 --methods set".split()
    path = tmp_path / "runs.jsonl.small-set-0.9-seed0-2epochs-batch8-delta2.checkpoint"
    other = Run("set", 0.9, 0, 2, batch_size=8, delta_t=3)
    split = torch.empty(0), torch.zeros(16)
    state = Training(other, {"train": split}, torch.device("cpu"), graph=False).state()
    checkpoint.write(path, state)
    assert convergence.main(flags) == 2
    check_told(f"{path} is of a run with other settings (delta_t is not 2)", capsys)
    path.write_bytes(path.read_bytes()[:-1000])
    assert convergence.main(flags) == 2
    check_told(f"{path} is truncated or damaged", capsys)
    out.write_text('{"method": "set", ')
    assert convergence.main(flags) == 2
    check_told(f"line 1 of {out} is no result", capsys)


@pytest.mark.slow
@pytest.mark.skipif(not DIRECTORY, reason="CIFAR10_DIR is not set")
def test_the_methods_learn_and_finished_runs_are_not_repeated(tmp_path: Path) -> None:
    out, picture = tmp_path / "runs.jsonl", tmp_path / "picture.png"
    flags = [str(DIRECTORY), "--out", str(out), "--plot", str(picture), "--json"]
    flags += "--epochs 1 --seeds 0 --sparsities 0.9".split()
    for methods in (["dense", "rigl"], ["dense", "set", "rigl"]):
        command = [sys.executable, str(ROOT / "benchmarks/convergence.py"), *flags]
        done = subprocess.run(
            [*command, "--methods", *methods], capture_output=True, text=True, check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        means = json.loads(done.stdout.splitlines()[-1])
        assert min(means.values()) > 25  # ten classes
    assert list(means) == ["dense_0", "set_0.9", "rigl_0.9"]
    methods = [json.loads(line)["method"] for line in out.read_text().splitlines()]
    assert methods == ["dense", "rigl", "set"]
    assert picture.stat().st_size > 10_000
