"""Gates: exact zeros for every dtype, layout and value, at no more than 4 bytes a weight."""

import pytest
import torch

from sparse.gates import (
    active_positions,
    count_active,
    gate_mask,
    make_gate,
    update_gate,
    zero_inactive,
)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


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
    gate = make_gate(mask, weight)
    tensor = weight.to(other_dtype or dtype)
    tensor[0, 0, 0] = torch.tensor([float("inf"), float("nan"), -0.0])
    expected = torch.where(mask, tensor, 0.0)
    zero_inactive(tensor, gate)
    assert torch.equal(tensor.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert not torch.signbit(tensor[~mask]).any()
    assert torch.equal(gate_mask(gate), mask)
    assert gate_mask(gate).is_contiguous()
    counts = count_active({"a": gate}, {"a": weight, "b": weight})
    assert counts == {"a": int(mask.sum()), "b": weight.numel()}
    assert gate.element_size() <= 4
    assert gate.stride() == weight.stride()
    assert torch.equal(gate_mask(update_gate(gate, ~mask)), ~mask)


def test_on_a_device_a_gate_takes_one_byte() -> None:
    gate = make_gate(
        torch.ones(4, 4, dtype=torch.bool, device="meta"), torch.empty(4, 4, device="meta")
    )
    assert (gate.dtype, gate.device.type) == (torch.bool, "meta")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_positions_are_those_in_memory(layout: str, other: str) -> None:
    weight = torch.randn(6, 5, 3, 3).to(memory_format=LAYOUTS[layout])
    mask = torch.rand(weight.shape) < 0.4
    gate = make_gate(mask, weight)
    weight = weight.to(memory_format=LAYOUTS[other])
    memory = torch.zeros(weight.numel())
    memory[active_positions(gate, weight)] = 1
    assert torch.equal(memory.as_strided(weight.shape, weight.stride()), mask.float())


def test_positions_leave_no_room_for_gaps() -> None:
    weight = torch.randn(4, 6).t()[:3]
    mask = torch.rand(weight.shape) < 0.5
    positions = active_positions(make_gate(mask, weight), weight)
    assert torch.equal(positions, mask.flatten().nonzero().flatten())
