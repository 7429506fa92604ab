"""What holds on a GPU: every body runs on the CPU, too."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch
from torch import nn

import sparse
from tests.sparse.nets import METHODS, convnet, images, make, sgd

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def no_host_sync(device: torch.device) -> Iterator[None]:
    """Raise an error where the host waits for the GPU."""
    if device.type == "cuda":
        with warnings.catch_warnings():
            # Torch says so once. As an error it would leave the mode on for all tests to come.
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def recorded(device: torch.device, work: Callable[[], None]) -> Callable[[], None]:
    """Return what repeats the work: on a GPU the replay of a CUDA graph."""
    if device.type == "cpu":
        return work
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def set_gradients(models: list[nn.Module], step: int) -> None:
    """Give the same gradients to several models: small multiples of 1/8, which all types hold."""
    generator = torch.Generator().manual_seed(step)
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        gradient = torch.randint(-16, 17, parameters[0].shape, generator=generator) / 8
        for parameter in parameters:
            layout = torch.empty_like(parameter)
            parameter.grad = layout.copy_(gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", METHODS)
def test_masks_equal_those_of_the_cpu(
    device: torch.device, name: str, layout: str, dtype: str
) -> None:
    plain = convnet().to(DTYPES[dtype])
    other = copy.deepcopy(plain).to(device).to(memory_format=LAYOUTS[layout])
    optimizers = [sgd(plain, lr=0.125), sgd(other, lr=0.125)]
    ours, theirs = (
        make(name, model, optimizer)
        for model, optimizer in zip((plain, other), optimizers, strict=True)
    )
    for step in range(14):
        set_gradients([plain, other], step)
        for optimizer in optimizers:
            optimizer.step()
        for layer, mask in ours.masks.items():
            assert torch.equal(mask, theirs.masks[layer].cpu()), (layer, step)
    for layer, weight in theirs.maskable.items():
        assert not weight[~theirs.masks[layer]].any()


@pytest.mark.parametrize("name", METHODS)
def test_the_host_waits_in_no_ordinary_step(device: torch.device, name: str) -> None:
    model = convnet().to(device)
    optimizer = sgd(model, fused=True)
    sparsifier = make(name, model, optimizer)
    for step in range(14):
        set_gradients([model], step)
        if sparsifier.is_update_step or step < 2:
            optimizer.step()
        else:
            with no_host_sync(device):
                optimizer.step()
    assert sparsifier.step == (13 if name.startswith("snip") else 14)


@pytest.mark.parametrize("name", ["rigl", "set", "snfs", "gmp"])
def test_an_overflow_at_an_update_changes_nothing(device: torch.device, name: str) -> None:
    model = convnet().to(device)
    optimizer = sgd(model, fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=8.0)
    sparsifier = make(name, model, optimizer)
    inputs, labels = (tensor.to(device) for tensor in images(0))
    steps = overflows = 0
    while steps < 8:
        overflow = sparsifier.is_update_step and overflows < steps + 1
        before = sparsifier.num_updates, {n: m.clone() for n, m in sparsifier.masks.items()}
        loss = nn.functional.cross_entropy(model(inputs), labels)
        scaler.scale(loss).backward()
        if overflow:
            model[0].weight.grad[0] = torch.inf
            overflows += 1
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        steps += not overflow
        assert sparsifier.step == steps
        if overflow:
            assert sparsifier.num_updates == before[0]
            for layer, mask in sparsifier.masks.items():
                assert torch.equal(mask, before[1][layer])
    assert overflows > 1
    assert sparsifier.num_updates > 1


class OnDemand(sparse.METHODS["rigl"]):  # type: ignore[name-defined, misc]
    """RigL with updates when the test wants one."""

    wanted: ClassVar[bool] = False

    def due(self, step: int) -> bool:
        return OnDemand.wanted


def test_a_recorded_step_sees_a_later_update(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = convnet().to(device)
    optimizer = sgd(model)
    method = OnDemand(sparsity=0.8, t_end=1000, drop_anneal="constant")
    sparsifier = sparse.Sparsifier(model, optimizer, method, hooks=False)

    def step() -> None:
        sparsifier.before_step()
        optimizer.step()
        sparsifier.after_step()

    set_gradients([model], 0)
    buffers = [parameter.grad for parameter in model.parameters()]
    for _ in range(3):
        step()
    repeat = recorded(device, step)
    for number in range(1, 8):
        set_gradients([model], number)
        for parameter, buffer in zip(model.parameters(), buffers, strict=True):
            buffer.copy_(parameter.grad)  # a recorded step reads the same memory each time
            parameter.grad = buffer
        masks = sparsifier.masks
        if number in (3, 6):
            monkeypatch.setattr(OnDemand, "wanted", True)
            step()
            monkeypatch.setattr(OnDemand, "wanted", False)
            assert any(not torch.equal(m, masks[n]) for n, m in sparsifier.masks.items())
        else:
            repeat()
        for layer, weight in sparsifier.maskable.items():
            assert not weight[~sparsifier.masks[layer]].any()
    assert sparsifier.num_updates == 2


@pytest.mark.filterwarnings("ignore")  # what a compiler says of a GPU is not ours
def test_a_compiled_model_trains_as_a_plain_one(device: torch.device) -> None:
    plain = convnet().to(device)
    other = copy.deepcopy(plain)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(other, backend=backend)
    optimizers = [sgd(plain), sgd(other)]
    pair = [make("rigl", m, o) for m, o in zip((plain, compiled), optimizers, strict=True)]
    for number in range(6):
        inputs, labels = (tensor.to(device) for tensor in images(number))
        for model, optimizer in zip((plain, compiled), optimizers, strict=True):
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert pair[0].num_active == pair[1].num_active
    assert pair[1].num_updates == 2
    for layer, weight in pair[1].maskable.items():
        assert not weight[~pair[1].masks[layer]].any()
