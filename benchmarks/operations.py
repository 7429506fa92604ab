"""Count what a device executes for sparse training; needs no device, only tensors without data."""

import math
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout

import sparse

FREE = frozenset(
    "view _unsafe_view slice as_strided detach expand permute select alias t transpose unsqueeze "
    "squeeze split split_with_sizes unbind empty empty_like empty_strided new_empty "
    "new_empty_strided".split()
)
"""Operations that only look at memory, or take memory as it is."""

OVERWRITES = frozenset({"copy_", "_foreach_copy_", "zero_", "_foreach_zero_"})
"""Operations that do not read what they write to."""


def tensors_in(tree: Any) -> list[Tensor]:
    """List the tensors in nested arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def traffic(name: str, arguments: Any, kwargs: Any, result: Any) -> int:
    """Count the bytes that an operation reads and writes, each entry of an expanded tensor once."""
    read = tensors_in((arguments[name in OVERWRITES :], {**kwargs, "out": None}))
    written = tensors_in(result) or tensors_in(arguments[0])
    return sum(
        tensor.element_size()
        * math.prod(n for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s)
        for tensor in (*read, *written)
    )


class Watch(TorchDispatchMode):
    """Counts operations of a device, their traffic, and the bytes allocated at the same time.

    Views are free, and so are questions for a tensor's device, which torch asks for views of
    tensors without data. Tensors that a multi-tensor copy copies one by one count one by one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = self.traffic = self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), kwargs: Any = None
    ) -> Any:
        namespace, name = str(function).split(".")[:2]
        result = function(*arguments, **(kwargs or {}))
        if namespace == "prim" or name in FREE:
            number = 0
        elif name == "_foreach_copy_" and any(
            one.stride() != other.stride() for one, other in zip(*arguments[:2], strict=True)
        ):
            number = len(arguments[0])
        else:
            number = 1
        self.num_operations += number
        if number:
            self.traffic += traffic(name, arguments, kwargs or {}, result)
        known = {tensor.untyped_storage()._cdata for tensor in tensors_in((arguments, kwargs))}
        for tensor in tensors_in(result):
            if tensor.untyped_storage()._cdata not in known:
                self._allocated(tensor.untyped_storage())
        return result

    def _allocated(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


SETTINGS: dict[str, dict[str, Any]] = {
    "static": {},
    "rigl": {"delta_t": 2, "t_end": 10**6, "drop_anneal": "constant"},
    "set": {"delta_t": 2, "t_end": 10**6, "drop_anneal": "constant"},
    "snfs": {"delta_t": 2, "t_end": 10**6, "drop_anneal": "constant"},
    "gmp": {"prune_every": 2, "prune_end": 10**6},
    "granet": {"delta_t": 3, "prune_end": 10**5, "t_end": 10**6},
    "srigl": {"delta_t": 3, "t_end": 10**6, "drop_anneal": "constant"},
    "gap": {"phase": 3, "num_phases": 10},
    "acdc": {
        "total_steps": 10**4,
        "dense_warmup": 3,
        **dict.fromkeys(["sparse_phase", "dense_phase", "last_dense", "last_sparse"], 2),
    },
}
"""Of methods: an update at every second step, or with the third."""


def count(
    method: str, arch: str, *, channels_last: bool = False, **settings: Any
) -> dict[str, float]:
    """Count the operations of making a model sparse, of an update and of an ordinary step.

    Args:
        method: One of `SETTINGS`.
        arch: Of torchvision.
        channels_last: Memory format of the weights.
        **settings: Of the method, beside `SETTINGS`.

    Returns:
        Of "install", "update" and "step"; and per maskable weight the "bytes" that an update
        allocates, and the "traffic" of an update and of a step ("step_traffic"), in bytes.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("meta"):
            model = torchvision.models.get_model(arch)
        for parameter in model.parameters():
            if channels_last and parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with Watch() as made:
            sparsifier = getattr(sparse, method)(
                model, optimizer, sparsity=0.8, hooks=False, **SETTINGS[method], **settings
            )
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        steps = []
        for _ in range(4):
            with Watch() as watch:
                sparsifier.before_step()
                sparsifier.after_step()
            steps.append(watch)
    weights = sum(weight.numel() for weight in sparsifier.maskable.values())
    return {
        "install": made.num_operations,
        "update": steps[2].num_operations,
        "step": steps[3].num_operations,
        "bytes": round(steps[2].peak / weights, 2),
        "traffic": round(steps[2].traffic / weights, 1),
        "step_traffic": round(steps[3].traffic / weights, 1),
    }
