"""Weights that FSDP2 and tensor parallelism spread over processes: what one process does, exactly.

The network has uneven shards and layers whose shard on the last rank is empty.
"""

import contextlib
import copy
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import sparse
from benchmarks.sharded import Collectives
from sparse.topology import rows
from sparse.topology.rng import Draw
from sparse.topology.selection import largest_in_layers, largest_together, replace
from tests.sparse.nets import METHODS, make
from tests.sparse.ranks import run
from tests.sparse.test_batched import together

pytestmark = pytest.mark.distributed

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
SPREAD = [name for name in METHODS if name != "gmp_blocks"]  # two processes would share blocks
Model = Any  # an nn.Module, with the methods of FSDPModule where it is sharded


class Net(nn.Module):
    """Convolutions and linear layers of 5, 7, 9, 1 and 4 output channels."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 7, 3)
        self.f1, self.f2, self.f3 = nn.Linear(7, 9), nn.Linear(9, 1, bias=False), nn.Linear(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c2(self.c1(x).relu()).relu().mean((2, 3))
        out: Tensor = self.f3(self.f2(self.f1(x).relu()))
        return out


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def sharded(model: nn.Module, mesh: DeviceMesh | None = None, **options: Any) -> Model:
    """Shard every layer, and the rest."""
    for child in model.children():
        fully_shard(child, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def batch(step: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randn(8, 4, generator=generator)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def train(
    model: Model,
    optimizer: torch.optim.Optimizer,
    steps: range,
    *,
    rank: int = 0,
    clip: float = 0.0,
    accumulate: int = 1,
    scaler: torch.amp.GradScaler | None = None,
    overflow: int = -1,
) -> None:
    """Take steps on the batches of a rank; one rank alone sees an infinity at a step."""
    for step in steps:
        optimizer.zero_grad()
        for micro in range(accumulate):
            if accumulate > 1:
                model.set_requires_gradient_sync(micro == accumulate - 1)
            inputs, targets = batch(step * accumulate + micro, rank)
            loss = (model(inputs) - targets).square().mean() / accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()
        if step == overflow and rank == 0:
            local(next(model.parameters()).grad).view(-1)[0] = float("inf")
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()


def local(tensor: Any) -> Tensor:
    part: Tensor = tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()
    return part


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def results(model: nn.Module, sparsifier: sparse.Sparsifier) -> dict[str, Any]:
    """Gather all weights and masks, and what the sparsifier says."""
    return {
        "weights": {name: whole(p).clone() for name, p in model.named_parameters()},
        "masks": {name: whole(mask) for name, mask in sparsifier.masks.items()},
        "num_active": sparsifier.num_active,
        "metrics": sparsifier.metrics(),
        "step": sparsifier.step,
    }


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


def masks_at(sparsity: float) -> dict[str, Tensor]:
    model = net()
    return sparse.static(model, sgd(model), sparsity=sparsity, seed=7).masks


OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {} for name in SPREAD},
    "gap": {"partitions": ["c?", "f?"]},
    "gap_magnitude": {"partitions": ["c?", "f?"]},
    "rigl given": {"masks": masks_at(0.6)},
    "gmp given": {"masks": masks_at(0.4)},
    "rigl explored": {"track_exploration": True, "drop_noise": 0.01},
    "rigl new": {"grow_init": "gradient", "initial_acc_scale": 0.5},
    "snfs magnitude": {"redistribution": "magnitude"},
    "snfs nonzero": {"redistribution": "nonzero", "growth": "random"},
}


def train_all(rank: int, world_size: int) -> dict[str, Any]:
    """Train with every method on the same batches on all ranks."""
    found = {}
    for name, options in OPTIONS.items():
        model: Model = net() if world_size == 1 else sharded(net())
        optimizer = sgd(model)
        sparsifier = make(name.split()[0], model, optimizer, sparsity=0.6, **options)
        train(model, optimizer, range(14))
        found[name] = results(model, sparsifier)
        assert sparsifier.num_updates > 0 or name.startswith(("static", "magnitude"))
    return found


def test_every_method_on_two_ranks_does_what_one_process_does(tmp_path: Path) -> None:
    alone = train_all(0, 1)
    for found in run(2, train_all, tmp_path):
        for name in OPTIONS:
            assert_same(found[name], alone[name])


# Selection ---------------------------------------------------------------------------------------

SHAPES = [(7, 5), (1, 9), (6, 3, 2, 2), (33, 41), (2, 2)]
ODD = (0.0, float("nan"), -0.0, float("-inf"))


def layers(case: int) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, int]]:
    """Make scores with ties and odd values, or draws; candidates; and how many to pick."""
    generator = torch.Generator().manual_seed(case)
    dtype = (torch.float32, torch.bfloat16, torch.float64)[case % 3]
    scores: dict[str, Any] = {}
    masks, counts = {}, {}
    for layer in range(4):
        name, shape = str(layer), SHAPES[(case + layer) % len(SHAPES)]
        values = torch.randn(shape, generator=generator)
        values = (2 * values).round() if case % 2 else values
        values.view(-1)[::7] = ODD[case // 4 % 4]
        drawn = (case + layer) % 4 == 3
        scores[name] = Draw(shape, (case, layer)) if drawn else values.to(dtype)
        masks[name] = torch.rand(shape, generator=generator) < 0.6
        most = int(masks[name].sum())
        counts[name] = int(torch.randint(0, most + 1, (), generator=generator))
    return scores, masks, counts


def pick(scores: Any, masks: Any, counts: dict[str, int]) -> list[dict[str, Tensor]]:
    free = {name: math.prod(mask.shape) - int(whole(mask).sum()) for name, mask in masks.items()}
    grown = {name: min(count, free[name]) for name, count in counts.items()}
    more = {name: count + 3 for name, count in counts.items()}
    dense = {name: score for name, score in scores.items() if isinstance(score, Tensor)}
    among, total = {name: masks[name] for name in dense}, sum(counts[name] for name in dense)
    return [
        replace(masks, drop=scores, num_dropped=counts, grow=scores, num_grown=grown),
        largest_in_layers(scores, more, masks),
        largest_together(dense, total, among),
        {name: sparse.topk_mask(score, counts[name]) for name, score in dense.items()},
        {
            name: sparse.drop_and_grow(among[name], score, score, grown[name], active_first=False)
            for name, score in dense.items()
        },
    ]


def select_shards(rank: int, world_size: int) -> int:
    """Compare selections over shards with those on whole tensors; give how many there were."""
    line, compared = init_device_mesh("cpu", (world_size,)), 0
    meshes: list[tuple[DeviceMesh, list[Any]]] = [(line, [Shard(0)]), (line, [Shard(1)])]
    if world_size == 4:
        square = init_device_mesh("cpu", (2, 2))
        meshes += [(square, [Shard(0), Shard(1)]), (square, [Replicate(), Shard(0)])]
    for case in range(12):
        scores, masks, counts = layers(case)
        expected = pick(scores, masks, counts)
        for mesh, placements in meshes:
            spread = [dict(scores), dict(masks)]
            for tensors in spread:
                for name, tensor in tensors.items():
                    alone = case % 5 == 0 and name == "2"  # a whole layer among sharded ones
                    if isinstance(tensor, Tensor) and not alone:
                        options = {"src_data_rank": None}
                        tensors[name] = distribute_tensor(tensor, mesh, placements, **options)
            with contextlib.ExitStack() as stack:
                if case % 2:
                    stack.enter_context(together())  # as on a device
                found = pick(*spread, counts)
            for masks_found, masks_expected in zip(found, expected, strict=True):
                for name, mask in masks_found.items():
                    assert torch.equal(whole(mask), masks_expected[name]), (case, placements, name)
                    compared += 1
    return compared


@pytest.mark.parametrize("world_size", [2, 4])
def test_entries_are_picked_over_shards_as_in_whole_tensors(
    world_size: int, tmp_path: Path
) -> None:
    assert all(compared > 200 for compared in run(world_size, select_shards, tmp_path))


def in_rows(marks: Tensor, draws: Any, masks: Any, others: Any, keep: Any, grow: Any) -> list[Any]:
    counts = rows.count_in_rows(masks, others) // 2
    filled = rows.fill_rows(masks, counts, keep, grow)
    drawn = rows.fill_rows(masks, counts, None, draws)
    return [filled, drawn, rows.within_rows(filled, marks), {"counts": counts}]


def rows_of_shards(rank: int, world_size: int) -> int:
    """Compare rows of shards with those of whole tensors; give how many layers there were."""
    line, compared = init_device_mesh("cpu", (world_size,)), 0
    meshes: list[tuple[DeviceMesh, list[Any]]] = [(line, [Shard(0)])]
    if world_size == 4:
        meshes.append((init_device_mesh("cpu", (2, 2)), [Replicate(), Shard(0)]))
    for case in range(8):
        generator = torch.Generator().manual_seed(case)
        shapes = {str(n): SHAPES[(case + n) % len(SHAPES)] for n in range(4)}
        masks = {n: torch.rand(shape, generator=generator) < 0.6 for n, shape in shapes.items()}
        keep, grow = (
            {n: torch.randn(s, generator=generator).mul(2).round() for n, s in shapes.items()}
            for _ in range(2)
        )
        draws = {n: Draw(shape, (case, 1)) for n, shape in shapes.items()}
        marks = torch.rand(sum(map(len, masks.values())), generator=generator) < 0.7
        others = {n: scores > 0 for n, scores in keep.items()}
        expected = in_rows(marks, draws, masks, others, keep, grow)
        for mesh, placements in meshes:
            spread: list[Any] = [
                {
                    n: t
                    if case % 3 == 0 and n == "2"  # a whole layer among sharded ones
                    else distribute_tensor(t, mesh, placements, src_data_rank=None)
                    for n, t in tensors.items()
                }
                for tensors in (masks, others, keep, grow)
            ]
            with together() if case % 2 else contextlib.nullcontext():
                found = in_rows(marks, draws, *spread)
            for layers_found, layers_expected in zip(found, expected, strict=True):
                for n, mask in layers_found.items():
                    assert torch.equal(whole(mask), layers_expected[n]), (case, placements, n)
                    compared += 1
    return compared


@pytest.mark.parametrize("world_size", [2, 4])
def test_rows_of_shards_are_those_of_whole_tensors(world_size: int, tmp_path: Path) -> None:
    assert all(compared >= 8 * 13 for compared in run(world_size, rows_of_shards, tmp_path))


def refuse_split_rows(rank: int, world_size: int) -> str:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    parallelize_module(model, init_device_mesh("cpu", (world_size,)), {"0": RowwiseParallel()})
    with pytest.raises(ValueError, match=r"srigl needs the rows of 0\.weight whole") as told:
        sparse.srigl(model, sgd(model), sparsity=0.5, t_end=9)
    return str(told.value)


def test_rows_that_are_split_are_refused(tmp_path: Path) -> None:
    assert all("use DDP or FSDP2" in line for line in run(2, refuse_split_rows, tmp_path))


# Every update is that of the method on whole tensors ---------------------------------------------


def watch(sparsifier: sparse.Sparsifier) -> list[bool]:
    """Hold each update against the method's own on the gathered tensors; list whether masks moved.

    Raises, in the update, if the masks differ.
    """
    moved: list[bool] = []
    method = sparsifier.method
    kind = type(method)

    def update(self: Any, masks: Any, weights: Any, grads: Any, step: int, state: Any) -> Any:
        given = [{name: whole(t) for name, t in found.items()} for found in (masks, weights, grads)]
        expected = kind.update(self, *given, step, dict(state))
        new = kind.update(self, masks, weights, grads, step, state)
        found = {name: whole(mask) for name, mask in new.items()}
        assert_same(found, dict(expected))
        moved.append(any(not torch.equal(found[name], given[0][name]) for name in found))
        return new

    watched = copy.copy(method)
    object.__setattr__(watched, "__class__", type(kind.__name__, (kind,), {"update": update}))
    sparsifier.method = watched
    return moved


def adamw(fused: bool = False) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.AdamW(model.parameters(), 0.01, fused=fused)


LOOPS: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (sgd, {}),
    "AdamW and clipping": (adamw(), {"clip": 0.1}),
    "fused AdamW": (adamw(fused=True), {}),
    "accumulation": (sgd, {"accumulate": 3}),
    "bfloat16": (sgd, {}),
    "overflow on one rank": (sgd, {"overflow": 4}),
    "overflow on one rank, fused": (adamw(fused=True), {"overflow": 4}),
}


def train_apart(rank: int, world_size: int) -> dict[str, tuple[int, int]]:
    """Train on other batches on each rank, in all kinds of loops; give updates and steps."""
    found = {}
    for loop, (optimizer_of, options) in LOOPS.items():
        others = ("set", "gmp_global", "snip") if loop in ("SGD", "overflow on one rank") else ()
        for name in ("rigl", "snfs", *others):
            low = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
            model = sharded(net(), **(low if loop == "bfloat16" else {}))
            optimizer = optimizer_of(model)
            sparsifier = make(name, model, optimizer, sparsity=0.6)
            moved = watch(sparsifier)
            given = dict(options)
            if "overflow" in given:
                given["scaler"] = torch.amp.GradScaler("cpu", init_scale=8.0)
            train(model, optimizer, range(10), rank=rank, **given)
            assert sum(moved) >= (1 if name == "snip" else 2), (loop, name)
            assert_inactive_zero_here(sparsifier, optimizer)
            found[f"{loop}: {name}"] = (sparsifier.num_updates, sparsifier.step)
    return found


def assert_inactive_zero_here(
    sparsifier: sparse.Sparsifier, optimizer: torch.optim.Optimizer
) -> None:
    """Check the part of weights and optimizer state that lies on this rank."""
    for name, weight in sparsifier.maskable.items():
        inactive = ~local(sparsifier.masks[name])
        for tensor in [weight, *optimizer.state[weight].values()]:
            if tensor.shape == weight.shape:
                assert not local(tensor)[inactive].any(), name


def test_every_update_on_three_ranks_is_that_of_the_method_on_whole_tensors(
    tmp_path: Path,
) -> None:
    first, *others = run(3, train_apart, tmp_path)
    assert all(other == first for other in others)
    for case, (updates, step) in first.items():
        skipped = "overflow" in case
        assert step == 10 - skipped - ("snip" in case), case
        # An update that falls on a skipped step takes place at the next one.
        assert updates == (1 if "snip" in case else first[f"SGD: {case.split(': ')[1]}"][0]), case


# What travels ------------------------------------------------------------------------------------


def count_collectives(rank: int, world_size: int) -> dict[str, Any]:
    """Count what travels in updates and other steps of networks of several sizes."""
    found: dict[str, Any] = {}
    networks: dict[str, Callable[[], nn.Module]] = {
        "narrow": lambda: nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)),
        "wide": lambda: nn.Sequential(nn.Linear(8, 300), nn.Linear(300, 8)),
        "resnet50": lambda: torchvision.models.resnet50(),
    }
    for name, build in networks.items():
        model = sharded(build())
        optimizer = sgd(model)
        sparsifier = sparse.rigl(model, optimizer, sparsity=0.9, delta_t=3, t_end=9)
        for step in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            with Collectives() as collectives:
                optimizer.step()
            found[f"{name} {step}"] = collectives.found
        if rank == 1:  # one rank may ask alone
            sparsifier.metrics(), sparsifier.masks, sparsifier.state_dict(), sparsifier.num_active
    return found


def count_of_methods(rank: int, world_size: int) -> dict[str, tuple[int, float]]:
    """Give the collectives of an update of each method, and their KiB per layer."""
    found = {}
    for name in [n for n in SPREAD if not n.startswith(("static", "magnitude", "rigl_b"))]:
        model = sharded(mlp())
        optimizer = sgd(model)
        sparsifier = make(name, model, optimizer, sparsity=0.6)
        while sparsifier.num_updates < 1:
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            with Collectives() as collectives:
                optimizer.step()
        sent = sum(size for _, size in collectives.found)
        found[name] = (len(collectives.found), sent / 1024 / len(sparsifier.maskable))
    return found


def test_an_update_takes_what_the_page_on_scaling_says(tmp_path: Path) -> None:
    table = re.findall(
        r"^\| ([a-z_, ]+) \| (\d+) \| ([\d.]+)(.*) \|$", PAGE.read_text(), re.MULTILINE
    )
    told_of = {name: row for names, *row in table for name in names.split(", ")}
    found = run(2, count_of_methods, tmp_path)[0]
    assert found.keys() == told_of.keys()
    for name, (collectives, size) in found.items():
        told, per_layer, in_all = told_of[name]
        assert collectives == int(told), name
        assert size <= float(per_layer) + (4 / 3 if "4 in all" in in_all else 0), name


def test_an_update_takes_few_small_collectives_and_other_steps_none(tmp_path: Path) -> None:
    for found in run(2, count_collectives, tmp_path):
        sent = {name: sum(size for _, size in calls) for name, calls in found.items()}
        for name in ("narrow", "wide", "resnet50"):
            assert 1 <= len(found[f"{name} 0"]) <= 11
            assert found[f"{name} 1"] == found[f"{name} 2"] == []
        assert sent["narrow 0"] == sent["wide 0"]
        assert sent["resnet50 0"] < 0.5e6


# Checkpoints -------------------------------------------------------------------------------------

METHODS_SAVED = {"snfs": {"delta_t": 2}, "gmp": {}, "rigl": {"track_exploration": True}}


def begin(name: str, world_size: int, kind: str) -> tuple[Model, Any, sparse.Sparsifier]:
    model: Model = sharded(net()) if kind == "sharded" else net()
    optimizer = sgd(model)
    options = METHODS_SAVED[name]
    return model, optimizer, make(name, model, optimizer, sparsity=0.6, **options)


def save_and_go_on(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Save half-way with torch.distributed.checkpoint and in one file; train on to the end."""
    found = {}
    for name in METHODS_SAVED:
        model, optimizer, sparsifier = begin(name, world_size, "sharded")
        train(model, optimizer, range(7))
        # The helpers of torch take a step of their own to create state; here there is some.
        weights, state = get_state_dict(model, optimizer)
        content = {"model": weights, "optimizer": state, "sparse": sparsifier}
        dcp.save(content, checkpoint_id=folder / name)
        half = results(model, sparsifier) | {"updates": sparsifier.num_updates}
        train(model, optimizer, range(7, 13))
        found[name] = [half, results(model, sparsifier)]
    return found


def load_and_go_on(folder: Path, kind: str, rank: int, world_size: int) -> dict[str, Any]:
    found = {}
    for name in METHODS_SAVED:
        model, optimizer, sparsifier = begin(name, world_size, kind)
        weights, state = get_state_dict(model, optimizer)
        assert (sparsifier.step, sparsifier.num_updates) == (0, 0)
        content = {"model": weights, "optimizer": state, "sparse": sparsifier}
        dcp.load(content, checkpoint_id=folder / name)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        half = results(model, sparsifier) | {"updates": sparsifier.num_updates}
        assert_inactive_zero_here(sparsifier, optimizer)
        train(model, optimizer, range(7, 13))
        found[name] = [half, results(model, sparsifier)]
    return found


def test_a_checkpoint_of_two_ranks_is_read_by_any_number_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    expected = run(2, functools.partial(save_and_go_on, folder), tmp_path)[0]
    for world_size, kind in ((3, "sharded"), (2, "sharded"), (1, "sharded"), (1, "plain")):
        work = functools.partial(load_and_go_on, folder, kind)
        for found in run(world_size, work, tmp_path):
            for name, (half, end) in found.items():
                assert_same(half, expected[name][0])
                if world_size < 3:  # gradients of three ranks add up in another order
                    assert_same(end, expected[name][1])
                else:
                    assert_same(end["num_active"], expected[name][1]["num_active"])


def exchange_files(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Load what a plain process saved; give what is to be the same afterwards."""
    found = {}
    for name in METHODS_SAVED:
        model, optimizer, sparsifier = begin(name, world_size, "sharded")
        saved = torch.load(folder / f"{name}.pt", weights_only=True)
        set_model_state_dict(model, saved["model"], options=FULL)
        set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=FULL)
        sparsifier.load_state_dict(saved["sparse"])
        train(model, optimizer, range(7, 13))
        found[name] = results(model, sparsifier)
    return found


FULL = StateDictOptions(full_state_dict=True)


def test_the_file_of_one_process_is_read_by_two(tmp_path: Path) -> None:
    expected = {}
    for name in METHODS_SAVED:
        model, optimizer, sparsifier = begin(name, 1, "plain")
        train(model, optimizer, range(7))
        weights, state = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": state, "sparse": sparsifier.state_dict()}
        torch.save(saved, tmp_path / f"{name}.pt")
        train(model, optimizer, range(7, 13))
        expected[name] = results(model, sparsifier)
    for found in run(2, functools.partial(exchange_files, tmp_path), tmp_path):
        for name in METHODS_SAVED:
            assert_same(found[name], expected[name])


# Other layouts -----------------------------------------------------------------------------------

PLAN = {"0": ColwiseParallel(), "2": RowwiseParallel()}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 5))


def lay_out(layout: str, model: nn.Module, world_size: int) -> Model:
    """Shard a model in one of several ways."""
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("copy", "shard"))
        return sharded(model, mesh)
    if layout == "tensor parallel":
        mesh = init_device_mesh("cpu", (world_size,))
        return parallelize_module(model, mesh, PLAN)
    if layout == "both":
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], PLAN)
        return sharded(model, mesh["data"])
    if layout == "one layer":
        mesh = init_device_mesh("cpu", (world_size,))
        fully_shard(model.get_submodule("2"), mesh=mesh)
        return model
    return model


def train_layouts(rank: int, world_size: int) -> dict[str, Any]:
    found = {}
    for layout in ("plain", "hsdp", "tensor parallel", "both", "one layer"):
        for name in ("rigl", "set", "snfs", "gmp_global"):
            model = lay_out(layout, mlp(), world_size)
            optimizer = sgd(model)
            sparsifier = make(name, model, optimizer, sparsity=0.6)
            moved = watch(sparsifier)
            for step in range(13):
                optimizer.zero_grad()
                generator = torch.Generator().manual_seed(step)
                model(torch.randn(6, 10, generator=generator)).square().mean().backward()
                optimizer.step()
            assert sum(moved) >= 2
            assert_inactive_zero_here(sparsifier, optimizer)
            found[f"{layout}: {name}"] = results(model, sparsifier)
    return found


def test_replicas_and_split_rows_do_what_whole_tensors_do(tmp_path: Path) -> None:
    for found in run(4, train_layouts, tmp_path):
        for case, result in found.items():
            expected = found[f"plain: {case.split(': ')[1]}"]
            assert result["num_active"] == expected["num_active"], case
            torch.testing.assert_close(result["weights"], expected["weights"])
            assert_same(result["masks"], expected["masks"])


# Refusals ----------------------------------------------------------------------------------------


def message(action: Callable[[], Any]) -> str:
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing said"


class PerShard(sparse.METHODS["rigl"]):  # type: ignore[name-defined, misc]
    """A method of somebody's own that ranks what lies here."""

    def update(self, masks: Any, weights: Any, grads: Any, step: int, state: Any) -> Any:
        return {name: local(weights[name]).abs() > 0.01 for name in masks}


def provoke(rank: int, world_size: int) -> dict[str, str]:
    found = {}
    model = net()
    optimizer = sgd(model)
    make("rigl", model, optimizer)
    model = sharded(model)
    optimizer_after = sgd(model)
    del optimizer_after
    found["sharded after"] = message(lambda: train(model, optimizer, range(1)))
    model = sharded(net())
    fused = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    found["fused"] = message(lambda: make("rigl", model, fused))
    optimizer = sgd(model)
    method = PerShard(sparsity=0.5, delta_t=1, t_end=5)
    sparse.Sparsifier(model, optimizer, method)
    found["per shard"] = message(lambda: train(model, optimizer, range(1)))
    model = sharded(net())
    optimizer = sgd(model)
    sparsifier = make("rigl", model, optimizer)
    with torch.no_grad():  # a violation on one rank stops all of them
        if rank == 1:
            local(model.c1.weight).fill_(1.0)
    found["violation"] = message(lambda: train(model, optimizer, range(1)))
    found["group"] = message(
        lambda: sparse.static(*(lambda m: (m, sgd(m)))(sharded(net())), sparsity=0.5)
    )
    del sparsifier
    return found


def test_what_cannot_be_right_is_refused_in_one_line(tmp_path: Path) -> None:
    for found in run(2, provoke, tmp_path):
        assert "was replaced by another tensor" in found["sharded after"]
        assert "fully_shard" in found["sharded after"]
        assert found["fused"] == "fused SGD cannot train sharded weights; use foreach=True"
        assert "method rigl gave no bool mask" in found["per shard"]
        assert "c1.weight is not 0 at" in found["violation"]
        assert found["group"] == "nothing said"
