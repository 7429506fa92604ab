"""Saving and loading: bit-identical continuation in a new process, and clear refusals."""

import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse
from sparse import pack, unpack
from tests.sparse.nets import METHODS, convnet, make, sgd, train

ROOT = Path(__file__).parents[2]


def new_run(method: str) -> tuple[Any, Any, sparse.Sparsifier]:
    model = convnet()
    optimizer = sgd(model)
    grows = not method.startswith(("static", "gmp", "snip", "magnitude"))
    options = TRACKED if grows else {}
    if method == "rigl_reset":
        options = {}
    return model, optimizer, make(method, model, optimizer, **options)


TRACKED = {"track_exploration": True}


def save(model: Any, optimizer: Any, sparsifier: sparse.Sparsifier) -> bytes:
    buffer = io.BytesIO()
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "sparse": sparsifier.state_dict(),
        },
        buffer,
    )
    return buffer.getvalue()


def load(content: bytes, method: str) -> tuple[Any, Any, sparse.Sparsifier]:
    state = torch.load(io.BytesIO(content), weights_only=True)
    model, optimizer, sparsifier = new_run(method)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    sparsifier.load_state_dict(state["sparse"])
    return model, optimizer, sparsifier


def finish(run: tuple[Any, Any, sparse.Sparsifier], steps: range) -> dict[str, Any]:
    model, optimizer, sparsifier = run
    list(train(model, optimizer, steps))
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "sparse": sparsifier.state_dict(),
        "metrics": sparsifier.metrics(),
    }


def assert_identical(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_identical(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list):
        for index, (x, y) in enumerate(zip(one, other, strict=True)):
            assert_identical(x, y, f"{where}/{index}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [0, 1, 6])
def test_a_resumed_run_is_the_same_to_the_bit(method: str, stop: int) -> None:
    run = new_run(method)
    list(train(run[0], run[1], range(stop)))
    resumed = load(save(*run), method)
    assert_identical(finish(run, range(stop, 18)), finish(resumed, range(stop, 18)))


def test_resuming_in_a_new_process(tmp_path: Path) -> None:
    run = new_run("rigl")
    list(train(run[0], run[1], range(6)))
    (tmp_path / "state.pt").write_bytes(save(*run))
    program = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from tests.sparse.test_checkpoints import finish, load\n"
        "folder = Path(sys.argv[1])\n"
        "run = load((folder / 'state.pt').read_bytes(), 'rigl')\n"
        "torch.save(finish(run, range(6, 18)), folder / 'end.pt')\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True)
    other = torch.load(tmp_path / "end.pt", weights_only=True)
    assert_identical(finish(run, range(6, 18)), other)


def test_masks_take_one_bit_per_weight() -> None:
    model = torch.nn.Linear(1000, 1000)
    sparsifier = sparse.rigl(model, sgd(model), sparsity=0.9, t_end=100)
    buffer = io.BytesIO()
    torch.save(sparsifier.state_dict(), buffer)
    assert buffer.tell() < 1_000_000 / 8 + 4096


def edited(state: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Copy a state with the entry at a path replaced, or removed if the value is None."""
    head, _, rest = path.partition("/")
    copy = dict(state)
    if rest:
        copy[head] = edited(copy[head], rest, value)
    elif value is None:
        del copy[head]
    else:
        copy[head] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("version", 99, "its version is 99"),
        ("method", "set", "written by method 'set', this run uses 'rigl'"),
        ("step", None, "key 'step' is missing"),
        ("masks", None, "key 'masks' is missing"),
        ("masks", {}, "key '0.weight' of masks is missing"),
        ("masks/3.weight", None, "key '3.weight' of masks is missing"),
        ("masks/3.weight/bits", None, "key 'bits' of the mask of 3.weight is missing"),
        ("masks/3.weight/shape", [8, 8, 1, 1], r"the mask of 3.weight has shape \(8, 8, 1, 1\)"),
        ("masks/3.weight/bits", torch.zeros(72, dtype=torch.uint8), "3.weight has 0 active"),
        ("masks/3.weight/bits", torch.zeros(2, dtype=torch.uint8), "do not hold a mask"),
        ("masks/conv9.weight", {}, "a mask for conv9.weight, this run has none"),
        ("explored", {}, "key '0.weight' of explored is missing"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(path: str, value: Any, message: str) -> None:
    _, _, sparsifier = new_run("rigl")
    state = edited(sparsifier.state_dict(), path, value)
    with pytest.raises(ValueError, match=message):
        sparsifier.load_state_dict(state)


def test_masks_of_another_sparsity_are_refused() -> None:
    model = convnet()
    state = make("rigl", model, sgd(model), sparsity=0.5).state_dict()
    model = convnet()
    with pytest.raises(
        ValueError, match="it is of another sparsity, distribution or redistribution"
    ):
        make("rigl", model, sgd(model), sparsity=0.6).load_state_dict(state)


def test_going_back_to_before_the_pruning() -> None:
    model, optimizer, sparsifier = new_run("snip")
    start = sparsifier.state_dict()
    list(train(model, optimizer, range(2)))
    assert sparsifier.metrics()["sparsity"] > 0.7
    sparsifier.load_state_dict(start)
    assert (sparsifier.step, sparsifier.num_updates) == (0, 0)
    assert sparsifier.metrics()["sparsity"] == 0.0
    list(train(model, optimizer, range(1)))
    assert sparsifier.num_updates == 1


def test_what_a_run_needs_must_have_been_saved() -> None:
    model, optimizer, sparsifier = new_run("snfs")
    list(train(model, optimizer, range(3)))
    state = sparsifier.state_dict()
    with pytest.raises(ValueError, match="'averages' is empty"):
        sparsifier.load_state_dict(state | {"averages": {}})
    with pytest.raises(ValueError, match="'explored' is empty"):
        sparsifier.load_state_dict(state | {"explored": None})


def former(state: dict[str, Any], shapes: dict[str, torch.Size]) -> dict[str, Any]:
    """Write a state as version 1 did: masks without rows, no key for what there is not yet."""
    masks = {name: unpack(entry["bits"], entry["shape"]) for name, entry in state["masks"].items()}
    numbers = json.loads(state["method_state"]).items()
    averaged = json.loads(state["averaged"])
    return state | {
        "version": 1,
        "masks": {n: {"shape": [*mask.shape], "bits": pack(mask)} for n, mask in masks.items()},
        "last_update": json.loads(state["last_update"]),
        "averages": {name: state["averages"][name] for name in averaged},
        "method_state": {n: torch.tensor(v, dtype=getattr(torch, t)) for n, (t, v) in numbers},
        "explored": state["explored"]
        and {name: pack(unpack(bits, shapes[name])) for name, bits in state["explored"].items()},
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_state_of_version_1_goes_on_the_same(name: str) -> None:
    runs = new_run(name), new_run(name)
    (model, optimizer, sparsifier), (other, its_optimizer, its_sparsifier) = runs
    list(train(model, optimizer, range(7)))
    shapes = {name: weight.shape for name, weight in sparsifier.maskable.items()}
    saved = former(sparsifier.state_dict(), shapes)
    other.load_state_dict(model.state_dict())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    its_sparsifier.load_state_dict(saved)
    for trained, steps in ((model, optimizer), (other, its_optimizer)):
        list(train(trained, steps, range(7, 14)))
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0.0, atol=0.0)
    assert its_sparsifier.metrics() == sparsifier.metrics()
