"""Checkpoint files: names, atomicity, digest, refusal of damage, restoring."""

import contextlib
import errno
import hashlib
import io
import itertools
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from image_classification import checkpoint

STATE: dict[str, Any] = {
    "epoch": 3,
    "best_prec1": 71.5,
    "arch": "resnet50",
    "state_dict": {"weight": torch.arange(6.0).reshape(2, 3)},
    "data": {"shards": [b"\x00\xff", b"1"], "position": (1, None)},
}


def save(directory: Path, number: int = 3, **options: Any) -> Path:
    state = {**STATE, "epoch": number}
    return checkpoint.save(directory, state, epoch=number, **{"is_best": False, **options})


def epoch_of(path: Path) -> int:
    return int(checkpoint.load(path)["epoch"])


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def damage(path: Path) -> None:
    """Flip one bit in the middle of a file, for every name of its data."""
    with path.open("rb+") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


# Writing and reading


def test_state_comes_back_and_any_tool_reads_it(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "new" / "run", STATE, epoch=3, is_best=False)
    assert path == tmp_path / "new" / "run" / "checkpoint.pth.tar"
    for state in (checkpoint.load(path), torch.load(path, weights_only=True)):
        assert torch.equal(state.pop("state_dict")["weight"], STATE["state_dict"]["weight"])
        expected = {key: value for key, value in STATE.items() if key != "state_dict"}
        assert state == {**expected, "format": checkpoint.FORMAT}


def test_one_write_serves_all_names(tmp_path: Path) -> None:
    path = save(tmp_path, 7, is_best=True, keep=2)
    assert names(tmp_path) == ["checkpoint.pth.tar", "checkpoint_0007.pth.tar", checkpoint.BEST]
    assert {entry.stat().st_ino for entry in tmp_path.iterdir()} == {path.stat().st_ino}


def test_names_are_copies_where_links_do_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path, 1)
    save(tmp_path, 2, is_best=True, keep=1)
    assert epoch_of(tmp_path / "checkpoint.previous.pth.tar") == 1
    assert epoch_of(tmp_path / "checkpoint_0002.pth.tar") == 2
    assert epoch_of(tmp_path / checkpoint.BEST) == 2


def test_best_stays_while_newest_moves_on(tmp_path: Path) -> None:
    save(tmp_path, 1, is_best=True)
    save(tmp_path, 2)
    save(tmp_path, 3)
    found = {name: epoch_of(tmp_path / name) for name in names(tmp_path)}
    assert found == {
        "checkpoint.previous.pth.tar": 2,
        "checkpoint.pth.tar": 3,
        checkpoint.BEST: 1,
    }


@pytest.mark.parametrize(
    ("keep", "kept"), [(0, []), (1, [5]), (3, [3, 4, 5]), (-1, [0, 1, 2, 3, 4, 5])]
)
def test_keep_is_the_number_of_epoch_files(tmp_path: Path, keep: int, kept: list[int]) -> None:
    for number in range(6):
        save(tmp_path, number, keep=keep)
    epoch_files = sorted(tmp_path.glob("checkpoint_*.pth.tar"))
    assert [path.name for path in epoch_files] == [f"checkpoint_{n:04}.pth.tar" for n in kept]
    assert [epoch_of(path) for path in epoch_files] == kept


def test_epoch_files_of_a_longer_earlier_run_go_first(tmp_path: Path) -> None:
    for number in (8, 9):
        path = save(tmp_path, number, keep=-1)
        os.utime(path, (1_000_000 + number, 1_000_000 + number))
    save(tmp_path, 4, keep=2)
    assert [path.name for path in sorted(tmp_path.glob("checkpoint_*"))] == [
        "checkpoint_0004.pth.tar",
        "checkpoint_0009.pth.tar",
    ]


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"lr": np.float64(0.1)}, r"extra\.lr is a numpy\.float64"),
        ([1, Path("x")], r"extra\[1\] is a pathlib"),
        ({1.5: "x"}, "extra has a key of type float"),
        ([b""], r"extra\[0\] is an empty bytes object"),
        (nn.Linear(1, 1), r"extra is a torch\.nn"),
    ],
)
def test_what_needs_code_to_load_is_not_saved(tmp_path: Path, entry: Any, named: str) -> None:
    with pytest.raises(TypeError, match=named):
        checkpoint.save(tmp_path, {**STATE, "extra": entry}, epoch=0, is_best=False)
    assert names(tmp_path) == []


# Failures of the disk


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let files grow to `size` bytes only, as a quota or a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 64, 5_000, 100_000])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, limit: int) -> None:
    save(tmp_path, 1)
    state = {**STATE, "state_dict": {"weight": torch.zeros(100, 1000)}}
    with file_size_limit(limit), pytest.raises(OSError, match=r"cannot write") as caught:
        checkpoint.save(tmp_path, state, epoch=2, is_best=True, keep=-1)
    message = str(caught.value)
    assert "\n" not in message
    assert os.strerror(errno.EFBIG) in message
    assert f"{tmp_path / 'checkpoint.pth.tar'} is intact" in message
    assert names(tmp_path) == ["checkpoint.pth.tar"]
    assert epoch_of(tmp_path / "checkpoint.pth.tar") == 1


@pytest.fixture
def read_only_directory() -> Iterator[Path]:
    """A directory with a checkpoint that this process may read but not write to."""
    directory = Path(tempfile.mkdtemp())
    save(directory, 1)
    directory.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield directory
    finally:
        os.seteuid(user)
        shutil.rmtree(directory)


def test_a_read_only_directory_is_one_line(read_only_directory: Path) -> None:
    with pytest.raises(OSError, match=r"Permission denied; .* is intact$") as caught:
        save(read_only_directory, 2, is_best=True)
    assert "\n" not in str(caught.value)
    assert epoch_of(read_only_directory / "checkpoint.pth.tar") == 1


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from image_classification import checkpoint

directory = Path(sys.argv[1])
weights = torch.randn(300, 1000)
start = 0
for attempt in range(20):
    child = os.fork()
    if child == 0:
        for epoch in range(start + 1, start + 1000):
            state = {"epoch": epoch, "state_dict": {"w": weights + epoch}}
            checkpoint.save(directory, state, epoch=epoch, is_best=epoch % 3 == 0, keep=2)
    time.sleep(random.Random(attempt).uniform(0.0, 0.02 * (attempt + 1)))  # also if slow
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = checkpoint.find(directory)
    assert not found.warnings, found
    if found.path is not None:
        state = checkpoint.load(found.path)
        assert state["epoch"] >= start
        assert torch.equal(state["state_dict"]["w"], weights + state["epoch"])
        start = state["epoch"]
assert start > 0
for path in directory.glob("*.pth.tar"):
    checkpoint.verify(path)
assert len(list(directory.glob("checkpoint_*.pth.tar"))) <= 3
assert len(list(directory.glob(".*"))) <= 2
"""


def test_a_kill_at_any_moment_leaves_an_intact_newest_checkpoint(tmp_path: Path) -> None:
    root = Path(checkpoint.__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


# Damage and foreign files


def test_a_flipped_bit_and_a_cut_are_noticed_wherever_they_are(tmp_path: Path) -> None:
    path = save(tmp_path)
    content = path.read_bytes()
    rng = random.Random(0)
    copy = tmp_path / "copy.pth.tar"
    for position in {*range(0, len(content), 7), *range(len(content) - 100, len(content))}:
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.randrange(8)
        copy.write_bytes(flipped)
        with pytest.raises(ValueError, match="copy"):
            checkpoint.verify(copy)
        copy.write_bytes(content[:position])
        with pytest.raises(ValueError, match=r"copy.* is truncated or damaged"):
            checkpoint.verify(copy)
    copy.write_bytes(content)
    checkpoint.verify(copy)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "does not exist"),
        (b"", "truncated or damaged"),
        (b"not a checkpoint\n" * 100, "was not written by this trainer"),
    ],
)
def test_other_files_are_refused_in_one_line(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "some.pth.tar"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"some\.pth\.tar .*{reason}") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        checkpoint.load(tmp_path)


def test_a_checkpoint_of_another_program_is_sent_to_the_converter(tmp_path: Path) -> None:
    path = tmp_path / "resnet50.pth"
    torch.save({"state_dict": {}, "epoch": 90}, path)
    with pytest.raises(ValueError, match=r"no digest\): bring it in with python -m .*convert"):
        checkpoint.load(path)


def with_digest(path: Path, content: Any) -> None:
    """Write a file in the documented format by hand: an archive whose comment is its SHA-256."""
    torch.save(content, path)
    archive = path.read_bytes()
    comment = b"sha256:" + hashlib.sha256(archive).hexdigest().encode()
    assert archive.endswith(b"\0\0")
    path.write_bytes(archive[:-2] + struct.pack("<H", len(comment)) + comment)


class Intruder:
    """An object whose unpickling makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_refused_and_never_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pth.tar", tmp_path / "trace"
    with_digest(path, {**STATE, "format": 1, "config": Intruder(trace)})
    with pytest.raises(ValueError, match=r"evil\.pth\.tar holds pickled objects") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({**STATE, "format": 99}, "has checkpoint format 99, this version reads 1"),
        (STATE, "has no 'format'"),
        ({"format": 1, "epoch": 1}, "has no 'state_dict'"),
        ([1], "has no 'format'"),
    ],
)
def test_content_of_another_kind_is_refused(tmp_path: Path, content: Any, reason: str) -> None:
    path = tmp_path / "c.pth.tar"
    with_digest(path, content)
    with pytest.raises(ValueError, match=reason):
        checkpoint.load(path)


# Finding the newest


def test_find_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "raport.json").write_text("")
    assert checkpoint.find(tmp_path).path is None
    assert checkpoint.find(tmp_path / "missing").path is None


def test_find_takes_the_newest(tmp_path: Path) -> None:
    for number in (9, 10):
        save(tmp_path, number, keep=-1, is_best=number == 9, filename="last.pth.tar")
    found = checkpoint.find(tmp_path, "last.pth.tar")
    assert found == checkpoint.Found(tmp_path / "last.pth.tar")


def test_find_falls_back_step_by_step_and_names_both(tmp_path: Path) -> None:
    for number in (9, 10, 11, 12):
        save(tmp_path, number, keep=-1, is_best=number == 9)
    last = tmp_path / "checkpoint.pth.tar"
    damage(last)  # and with it epoch 12, another name of the same data
    found = checkpoint.find(tmp_path)
    assert found.path == tmp_path / "checkpoint.previous.pth.tar"
    assert len(found.warnings) == 1
    assert str(last) in found.warnings[0]
    assert str(found.path) in found.warnings[0]

    damage(found.path)
    assert checkpoint.find(tmp_path).path == tmp_path / "checkpoint_0010.pth.tar"
    damage(tmp_path / "checkpoint_0010.pth.tar")
    (tmp_path / "checkpoint_0009.pth.tar").unlink()
    found = checkpoint.find(tmp_path)
    assert found.path == tmp_path / checkpoint.BEST
    assert len(found.warnings) == 3


def test_find_never_passes_over_damage_to_a_fresh_start(tmp_path: Path) -> None:
    save(tmp_path)
    damage(tmp_path / "checkpoint.pth.tar")
    with pytest.raises(ValueError, match=r"no intact checkpoint in .*checkpoint\.pth\.tar"):
        checkpoint.find(tmp_path)


# Restoring


def network(width: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))


def trained() -> tuple[nn.Module, torch.optim.SGD]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_restore_round_trip(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    path = checkpoint.save(tmp_path, {**state, "epoch": 1}, epoch=1, is_best=False)
    other = network()
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.8)
    targets: dict[str, Any] = {"state_dict": other, "optimizer": other_optimizer}
    checkpoint.restore(targets, checkpoint.load(path), path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    group = other_optimizer.param_groups[0]
    assert (group["lr"], group["momentum"]) == (
        0.1,
        0.8,
    )  # a schedule sets the one, a flag the other
    for own, theirs in zip(model.parameters(), other.parameters(), strict=True):
        buffer = optimizer.state[own]["momentum_buffer"]
        assert torch.equal(buffer, other_optimizer.state[theirs]["momentum_buffer"])


@pytest.mark.parametrize(
    ("saved", "reason"),
    [
        (
            network(4).state_dict(),
            r"'0\.weight' is \(4, 3, 3, 3\), this model has \(3, 3, 3, 3\)",
        ),
        ({k: v for k, v in network().state_dict().items() if k != "1.bias"}, "'1.bias' is missing"),
        ({**network().state_dict(), "2.weight": torch.ones(1)}, r"this model has no '2\.weight'"),
        ({**network().state_dict(), "1.bias": 3}, r"'1\.bias' is a int, this model has \(3,\)"),
        ([1, 2], "a list is not a state dict"),
    ],
)
def test_restore_names_the_first_parameter_that_does_not_fit(saved: Any, reason: str) -> None:
    model, optimizer = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {"state_dict": saved, "optimizer": optimizer.state_dict()}
    targets: dict[str, Any] = {"optimizer": optimizer, "state_dict": model}
    with pytest.raises(ValueError, match=rf"c\.pt: entry 'state_dict' does not fit: {reason}"):
        checkpoint.restore(targets, state, Path("c.pt"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("state", [{}, {"ema": None}])
def test_restore_names_a_missing_entry(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"c\.pt has no entry 'ema'"):
        checkpoint.restore({"ema": network()}, state, Path("c.pt"))
    with pytest.raises(ValueError, match=r"c\.pt has no entry 'ema'"):
        checkpoint.entry(state, "ema", Path("c.pt"))


def test_restore_compares_the_optimizer() -> None:
    _, optimizer = trained()
    state = {"optimizer": optimizer.state_dict()}
    one = torch.optim.SGD(network()[:1].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"groups of \[4\] tensors, this optimizer has \[2\]"):
        checkpoint.restore({"optimizer": one}, state, Path("c.pt"))
    wide = torch.optim.SGD(network(4).parameters(), lr=0.1)
    reason = r"'momentum_buffer' of parameter 0 is \(3, 3, 3, 3\), the parameter is \(4, 3, 3, 3\)"
    with pytest.raises(ValueError, match=reason):
        checkpoint.restore({"optimizer": wide}, state, Path("c.pt"))
    with pytest.raises(ValueError, match="not the state of an optimizer"):
        checkpoint.restore({"optimizer": optimizer}, {"optimizer": {}}, Path("c.pt"))


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(8, 16, 2, 4), (32, 32, 1, 1), (32, 1, 4, 4)])
def test_state_of_another_memory_layout_is_laid_out_like_its_parameter(
    name: str, shape: tuple[int, ...]
) -> None:
    formats = (torch.contiguous_format, torch.channels_last)
    gradients = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(6)]

    def start(layout: torch.memory_format) -> tuple[nn.Conv2d, Any]:
        layer = nn.Conv2d(1, 1, 1, bias=False)
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(9))
        # `to` leaves the strides of sizes of 1 as they are; a copy has those of the format
        layer.weight = nn.Parameter(torch.empty(shape, memory_format=layout).copy_(weight))
        return layer, OPTIMIZERS[name](layer.parameters())

    def advance(layer: nn.Conv2d, optimizer: Any, steps: range) -> None:
        for step in steps:
            layer.weight.grad = torch.empty_like(layer.weight).copy_(gradients[step])
            optimizer.step()

    ends = []
    for before, after in itertools.product(formats, repeat=2):
        layer, optimizer = start(before)
        advance(layer, optimizer, range(3))
        buffer = io.BytesIO()
        torch.save({"state_dict": layer.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
        buffer.seek(0)
        layer, optimizer = start(after)
        targets: dict[str, Any] = {"state_dict": layer, "optimizer": optimizer}
        checkpoint.restore(targets, torch.load(buffer, weights_only=True), Path("c.pt"))
        for value in optimizer.state[layer.weight].values():
            assert value.dim() == 0 or value.stride() == layer.weight.stride()
        advance(layer, optimizer, range(3, 6))
        ends.append(layer.weight.detach().contiguous())
    layer, optimizer = start(formats[0])
    advance(layer, optimizer, range(6))
    assert all(torch.equal(end, layer.weight) for end in ends)


def test_restore_keeps_momentum_that_was_made_before_the_first_step() -> None:
    """Fused SGD needs it: a first step that a GradScaler skips would leave it unfilled."""
    without = torch.optim.SGD(network().parameters(), lr=0.1)
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1, momentum=0.9)
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    checkpoint.restore({"optimizer": optimizer}, {"optimizer": without.state_dict()}, Path("c.pt"))
    assert len(optimizer.state) == 4
    assert not any(state["momentum_buffer"].any() for state in optimizer.state.values())


@pytest.mark.parametrize("pair", [*itertools.permutations(OPTIMIZERS, 2)])
def test_restore_refuses_the_state_of_another_optimizer(pair: tuple[str, str]) -> None:
    trained, other = (OPTIMIZERS[name](network().parameters()) for name in pair)
    state = {"optimizer": trained.state_dict()}
    if {*pair} == {"sgd", "fused sgd"}:
        checkpoint.restore({"optimizer": other}, state, Path("c.pt"))
        return
    with pytest.raises(ValueError, match="it is the state of another optimizer, which has no '"):
        checkpoint.restore({"optimizer": other}, state, Path("c.pt"))


def test_restore_names_the_entry_when_an_object_refuses() -> None:
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match=r"c\.pt: entry 'scaler' does not fit: .*empty") as caught:
        checkpoint.restore({"scaler": scaler}, {"scaler": {}}, Path("c.pt"))
    assert "\n" not in str(caught.value)


def test_random_generators_continue_where_they_were(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.random(), random.gauss(), float(np.random.rand()), float(torch.rand(()))

    draw()
    state = {**STATE, "rng": [checkpoint.rng_state()]}
    path = checkpoint.save(tmp_path, state, epoch=0, is_best=False)
    expected = [draw(), draw()]
    checkpoint.set_rng_state(checkpoint.load(path)["rng"][0])
    assert [draw(), draw()] == expected
