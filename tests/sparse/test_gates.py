"""Gates: exact zeros for every dtype, layout and value, at little more than a byte a weight."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparse.native import library
from sparse.training import gates
from sparse.training.gates import Gate, active_positions, count_active, zero_inactive
from tests.sparse.nets import convnet, make, sgd, train

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


@pytest.fixture(params=["compiled", "torch"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero with the compiled loop, and as on a machine that cannot compile it."""
    if request.param == "torch":
        monkeypatch.setattr(gates, "_compiled_loop", lambda: None)


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other_dtype", [None, torch.float32])
def test_inactive_entries_become_zero_whatever_they_were(
    dtype: torch.dtype, layout: str, other_dtype: torch.dtype | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, 3, 3, generator=generator).to(dtype)
    weight = weight.to(memory_format=LAYOUTS[layout])
    mask = torch.rand(weight.shape, generator=generator) < 0.4
    gate = Gate(mask, weight)
    tensor = weight.to(other_dtype or dtype)
    tensor[0, 0, 0] = torch.tensor([float("inf"), float("nan"), -0.0])
    expected = torch.where(mask, tensor, 0.0)
    version = tensor._version
    zero_inactive([(tensor, gate)])
    assert torch.equal(tensor.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert not torch.signbit(tensor[~mask]).any()
    assert tensor._version > version  # autograd has to learn of it
    assert torch.equal(gate.mask(), mask)
    assert gate.mask().is_contiguous()
    counts = count_active({"a": gate}, {"a": weight, "b": weight})
    assert counts == {"a": int(mask.sum()), "b": weight.numel()}
    assert gate.nbytes <= 1.2 * weight.numel()
    gate.update(~mask)
    assert torch.equal(gate.mask(), ~mask)
    zero_inactive([(tensor, gate)])
    assert not tensor.any()


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("threads", [1, 3])
def test_many_tensors_of_any_size_at_once(threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(0, 3), (1,), (7, 9), (64, 2), (129, 5), (700, 800), (300, 1), (511, 3, 3, 1)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors += [tensors[5].double(), tensors[5].bfloat16(), tensors[5].t(), tensors[5][1:, 2:]]
    masks = [torch.rand(tensor.shape, generator=generator) < 0.5 for tensor in tensors]
    expected = [torch.where(mask, tensor, 0) for mask, tensor in zip(masks, tensors, strict=True)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tensors = [tensor.clone() for tensor in tensors]
        pairs = [(tensor, Gate(mask, tensor)) for tensor, mask in zip(tensors, masks, strict=True)]
        zero_inactive(pairs)
    finally:
        torch.set_num_threads(before)
    for tensor, wanted in zip(tensors, expected, strict=True):
        assert torch.equal(tensor, wanted)


def test_without_a_compiler_a_warning_says_what_it_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "COMPILERS", ())
    monkeypatch.setattr(gates, "default_cache", lambda: tmp_path)
    gates._compiled_loop.cache_clear()
    weight = torch.ones(3, 4)
    gate = Gate(torch.eye(3, 4) > 0, weight)
    with pytest.warns(UserWarning, match="twice as long on this CPU: there is no C\\+\\+ compiler"):
        zero_inactive([(weight, gate)])
    assert torch.equal(weight, torch.eye(3, 4))
    gates._compiled_loop.cache_clear()


def test_a_library_that_does_not_load_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "c++"  # what it makes is no library, as in a directory mounted noexec
    compiler.write_text('#!/bin/sh\nfor output; do :; done\necho no library >"$output"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(gates, "default_cache", lambda: tmp_path)
    monkeypatch.setattr(gates, "cpu_level", lambda: "portable")
    gates._compiled_loop.cache_clear()
    weight = torch.ones(3, 4)
    with pytest.warns(UserWarning, match="the library cannot be loaded: .*portable-"):
        zero_inactive([(weight, Gate(torch.eye(3, 4) > 0, weight))])
    assert torch.equal(weight, torch.eye(3, 4))
    gates._compiled_loop.cache_clear()


def test_a_damaged_library_is_compiled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = library.GATES.compile("portable", tmp_path)
    broken.write_bytes(b"no library")
    monkeypatch.setattr(gates, "default_cache", lambda: tmp_path)
    monkeypatch.setattr(gates, "cpu_level", lambda: "portable")
    gates._compiled_loop.cache_clear()
    weight = torch.ones(3, 4)
    zero_inactive([(weight, Gate(torch.eye(3, 4) > 0, weight))])
    assert torch.equal(weight, torch.eye(3, 4))
    assert gates._compiled_loop() is not None
    gates._compiled_loop.cache_clear()


def test_on_a_device_a_gate_takes_one_byte() -> None:
    weight = torch.empty(4, 4, device="meta")
    gate = Gate(torch.ones(4, 4, dtype=torch.bool, device="meta"), weight)
    zero_inactive([(weight, gate)])
    assert (gate.nbytes, gate.inactive.device.type) == (16, "meta")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_positions_are_those_in_memory(layout: str, other: str) -> None:
    weight = torch.randn(6, 5, 3, 3).to(memory_format=LAYOUTS[layout])
    mask = torch.rand(weight.shape) < 0.4
    gate = Gate(mask, weight)
    weight = weight.to(memory_format=LAYOUTS[other])
    memory = torch.zeros(weight.numel())
    memory[active_positions(gate, weight)] = 1
    assert torch.equal(memory.as_strided(weight.shape, weight.stride()), mask.float())


def test_positions_leave_no_room_for_gaps() -> None:
    weight = torch.randn(4, 6).t()[:3]
    mask = torch.rand(weight.shape) < 0.5
    positions = active_positions(Gate(mask, weight), weight)
    assert torch.equal(positions, mask.flatten().nonzero().flatten())


def test_training_takes_the_compiled_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_torch(tensor: Tensor, inactive: Tensor) -> None:
        raise AssertionError(f"{type(tensor)} of {tuple(tensor.shape)} is zeroed without the loop")

    monkeypatch.setattr(gates, "_zero_by_torch", by_torch)
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make("rigl", model, optimizer)
    for _ in train(model, optimizer, range(6)):
        sparsifier.enforce()
    assert sparsifier.num_updates == 2
