"""Small networks, batches and loops that several tests share."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse
from sparse.methods.layers import named_parameters

# Short schedules: updates at 0, 4, 8, 12 of most methods.
ACDC = {"total_steps": 20, "dense_warmup": 3, "sparse_phase": 2, "dense_phase": 2}
ACDC |= {
    "last_dense": 3,
    "last_sparse": 4,
}  # sparse from 3, 7, 11, 16; dense from 5, 9, 13
GAP: dict[str, Any] = {"partitions": ["[0-2].*", "[3-9].*"], "phase": 4, "num_phases": 4}

METHODS: dict[str, tuple[Callable[..., sparse.Sparsifier], dict[str, Any]]] = {
    "static": (sparse.static, {}),
    "set": (sparse.set, {"delta_t": 4, "t_end": 15}),
    "rigl": (sparse.rigl, {"delta_t": 4, "t_end": 15}),
    "rigl_reset": (sparse.rigl_reset, {"delta_t": 4, "t_end": 15}),
    "snfs": (sparse.snfs, {"delta_t": 4, "t_end": 15}),
    "snfs_none": (sparse.snfs, {"delta_t": 4, "t_end": 15, "redistribution": "none"}),
    "rigl_blocks": (sparse.rigl, {"delta_t": 4, "t_end": 15, "block": (1, 2)}),
    "magnitude": (sparse.magnitude, {}),
    "magnitude_global": (sparse.magnitude, {"scope": "global"}),
    "snip": (sparse.snip, {}),
    "snip_global": (sparse.snip, {"scope": "global"}),
    "gmp": (sparse.gmp, {"prune_every": 4, "prune_start": 2, "prune_end": 14}),
    "gmp_blocks": (
        sparse.gmp,
        {"prune_every": 4, "prune_start": 2, "prune_end": 14, "block": (2, 2)},
    ),
    "gmp_global": (sparse.gmp, {"prune_every": 4, "prune_end": 14, "scope": "global"}),
    "granet": (sparse.granet, {"delta_t": 4, "t_end": 20, "prune_end": 12}),
    "granet_dense": (
        sparse.granet,
        {"delta_t": 4, "t_end": 20, "prune_end": 12, "initial_sparsity": 0.0},
    ),
    "srigl": (sparse.srigl, {"delta_t": 4, "t_end": 20, "gradient_steps": 2}),
    "srigl_whole": (
        sparse.srigl,
        {"delta_t": 4, "t_end": 20, "min_salient": 0.0, "gradient_steps": 2},
    ),
    "gap": (sparse.gap, GAP),
    "gap_magnitude": (sparse.gap, {**GAP, "mask_init": "magnitude"}),
    "acdc": (sparse.acdc, ACDC),
    "acdc_global": (sparse.acdc, {**ACDC, "scope": "global"}),
}

# The same for runs of 30 steps.
LONGER: dict[str, dict[str, Any]] = {"acdc": {}, "acdc_global": {}}
LONGER |= {name: {"t_end": 30, "prune_end": 30} for name in ("granet", "granet_dense")}
LONGER |= {name: {"t_end": 30, "drop_anneal": "constant"} for name in ("srigl", "srigl_whole")}
LONGER |= {name: {"num_phases": 7} for name in ("gap", "gap_magnitude")}
LONGER |= {name: {"prune_end": 30} for name in ("gmp", "gmp_blocks", "gmp_global")}
LONGER |= {
    name: {"drop_anneal": "constant", "t_end": 30}
    for name in ("set", "rigl", "rigl_blocks", "rigl_reset", "snfs", "snfs_none")
}


def convnet(seed: int = 0) -> nn.Sequential:
    """Build a network with a convolution, a norm and linear layers; the last one is unlike."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 20),
        nn.ReLU(),
        nn.Linear(20, 4),
    )


def mlp(seed: int = 0) -> nn.Sequential:
    """Build a network without BatchNorm, in float64: gradients add up over any split of a batch."""
    torch.manual_seed(seed)
    layers = [nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3)]
    return nn.Sequential(*layers).double()


def images(step: int, count: int = 6) -> tuple[Tensor, Tensor]:
    """Make the batch of a step for `convnet`."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(count, 2, 6, 6, generator=generator)
    return inputs, torch.randint(0, 4, (count,), generator=generator)


def rows(step: int, count: int = 12) -> tuple[Tensor, Tensor]:
    """Make the batch of a step for `mlp`."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(count, 10, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (count,), generator=generator)


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    """Make SGD with momentum and weight decay."""
    defaults: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    return torch.optim.SGD(model.parameters(), **(defaults | options))


def backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Compute the loss of a batch and add its gradients."""
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss.detach()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    batches: Callable[[int], tuple[Tensor, Tensor]] = images,
) -> Iterator[int]:
    """Take optimizer steps, one per item."""
    for step in steps:
        optimizer.zero_grad()
        backward(model, batches(step))
        optimizer.step()
        yield step


def make(name: str, model: nn.Module, optimizer: Any, **options: Any) -> sparse.Sparsifier:
    """Attach a method of `METHODS` at sparsity 0.8."""
    factory, defaults = METHODS[name]
    return factory(model, optimizer, **({"sparsity": 0.8} | defaults | options))


def assert_inactive_zero(sparsifier: sparse.Sparsifier, model: nn.Module, optimizer: Any) -> None:
    """Check that weights and optimizer state of inactive connections are exactly 0."""
    weights = named_parameters(model)
    for name, mask in sparsifier.masks.items():
        tensors = [weights[name], *optimizer.state.get(weights[name], {}).values()]
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.shape == mask.shape:
                assert not tensor.detach()[~mask].any(), name
