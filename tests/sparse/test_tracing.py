"""No host sync, no value read, no tensor of another device: everything traces on a fake device."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparse
from tests.sparse.nets import METHODS, make

# Stands for a GPU: it is not the host, and every build of torch has it. "cuda" would not do: builds
# without it refuse, and torch 2.9 asks its driver even for a fake tensor.
DEVICE = "meta"
KNOWS_GPUS = torch.backends.cuda.is_built()  # for a fake tensor no GPU is needed
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "rigl": [
        {"drop_noise": 1e-5},
        {"grow_init": "gradient", "initial_acc_scale": 0.5, "track_exploration": True},
        {"grow_init": "random"},
    ],
    "snfs": [{}, {"redistribution": "magnitude", "growth": "random"}],
}


def fake_tensors() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)  # what torch.tensor makes on "meta"


def build(device: str, dtype: torch.dtype) -> nn.Sequential:
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, **options),
        nn.BatchNorm2d(16, **options),
        nn.Conv2d(16, 8, 1, **options),
        nn.Linear(8, 4, **options),
    )


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_traces_without_touching_the_host(method: str, dtype: torch.dtype) -> None:
    for options in OPTIONS.get(method, [{}]):
        with fake_tensors():
            model = build(DEVICE, dtype)
            optimizer = torch.optim.SGD(
                model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
            )
            sparsifier = make(method, model, optimizer, **options)
            take_steps(model, optimizer, 6)
            assert sparsifier.step == (5 if "snip" in method else 6)
            assert sparsifier.num_updates == {"static": 0, "gmp": 1}.get(
                method, sparsifier.num_updates
            )
            assert sparsifier.masks["0.weight"].device.type == DEVICE


def test_whole_steps_trace_on_a_fake_cpu() -> None:
    with fake_tensors():
        model = build("cpu", torch.float32)[0]
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        sparsifier = make("rigl", model, optimizer)
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 5, 5)).sum().backward()
            optimizer.step()
        assert (sparsifier.step, sparsifier.num_updates) == (6, 2)


def test_the_trap_is_armed() -> None:
    # A tensor read or a CPU tensor mixed in is an error there: the tests above prove something.
    with fake_tensors():
        tensor = torch.ones(3, device=DEVICE)
        with pytest.raises(DataDependentOutputException):
            tensor.sum().item()
        with pytest.raises(RuntimeError, match=r"two (different )?devices,? meta"):
            tensor + torch.ones(3)


class NoTraffic(TorchDispatchMode):
    """Refuses operations that bring something from the host to a GPU or back."""

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*arguments, **(kwargs or {}))
        leaves = tree_leaves((arguments, kwargs, result))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        if {"cpu", "cuda"} <= devices:
            raise AssertionError(f"{function} waits for the GPU")
        return result


# The host waits while a list becomes a tensor of the GPU. A tensor on "meta" takes a list unseen.
@pytest.mark.skipif(not KNOWS_GPUS, reason="torch is built without CUDA")
@pytest.mark.skipif(torch.__version__ < "2.10", reason="torch 2.9 asks the driver")
@pytest.mark.parametrize("method", METHODS)
def test_nothing_goes_from_the_host_to_a_gpu(method: str) -> None:
    with fake_tensors():
        on_gpu = torch.zeros(2, device="cuda")
        with NoTraffic(), pytest.raises(AssertionError, match="waits for the GPU"):
            torch.tensor([1.0, 2.0], device="cuda")  # the trap is armed
        with NoTraffic():
            torch.where(on_gpu > 0, 1.0, on_gpu)
    for number, options in enumerate(OPTIONS.get(method, [{}])):
        with fake_tensors():
            model = build("cuda", torch.float32)
            if number % 2:
                for parameter in (model[0].weight, model[2].weight):
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
            optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
            with NoTraffic():
                make(method, model, optimizer, **options)
                take_steps(model, optimizer, 6)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_on_the_meta_device(method: str) -> None:
    model = build("meta", torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier = make(method, model, optimizer)
    take_steps(model, optimizer, 6)
    assert sparsifier.masks["0.weight"].shape == (16, 3, 3, 3)
    assert sparse.prunable(model)["0.weight"].is_meta
