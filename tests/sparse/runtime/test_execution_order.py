"""The order of execution: everything once, and nothing read that is not there or is lost."""

import functools
from collections.abc import Callable

import numpy as np
import pytest
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from image_classification.models import create_model
from sparse.runtime import bindings, execution_order, trace
from sparse.runtime.arrange import Arrangement, arrange, banded_grids
from sparse.runtime.layout import Grid, Map
from sparse.runtime.lower import Layer, lower
from sparse.runtime.operation import Operation
from tests.sparse.runtime.conftest import prune_

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: ResNet(BasicBlock, (2, 2, 2, 2), num_classes=7),
    "bottleneck": lambda: ResNet(Bottleneck, (2, 2, 2, 2), num_classes=7),
    "mobilenet_v1": lambda: create_model("mobilenet_v1", num_classes=7, width=0.5),
    "wrn22_2": lambda: create_model("wrn22_2", num_classes=7),
}


@functools.cache
def layers_of(name: str, density: float = 0.05) -> list[Layer]:
    model = NETWORKS[name]().eval()
    prune_(model, density)
    return lower(trace(model), model.state_dict(), in_channels=3)


def plan_of(name: str, size: int, lanes: int = 8, grid: Grid | None = None) -> Arrangement:
    return Arrangement(layers_of(name), (3, size, size), lanes=lanes, grid=grid)


def row_at(value: Map, y: int) -> slice:
    """Return where a row lies in the arena, halos included."""
    start = value.position - value.halo * value.lanes + y * value.row
    return slice(start, start + value.plane * value.channels)


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the order be the same on all machines."""
    monkeypatch.setattr(execution_order, "core_cache", lambda: 512 * 1024)


def rows_of(operation: Operation, value: Map, begin: int, end: int) -> range:
    """Return the rows of `value` that a operation reads for its rows begin .. end - 1.

    With bands, the rows above the first and below the last are copies of those of other bands.
    """
    if value is operation.residual and value is not operation.source:
        return range(begin, end)
    kernel, padding, dilation = 1, 0, 1
    if operation.layer is not None:
        kernel, padding = operation.layer.kernel[0], operation.layer.padding[0]
        dilation = operation.layer.dilation[0]
    if isinstance(operation.target, Map):
        if operation.target.grid.bands != value.grid.bands:
            return range(value.rows)
        if value.grid.bands > 1 and operation.target.rows * operation.stride[0] != value.rows:
            return range(value.rows)  # the bands begin with other rows of the image
    first = begin * operation.stride[0] - padding
    last = (end - 1) * operation.stride[0] + (kernel - 1) * dilation - padding
    if value.grid.bands > 1:
        return range(first, last + 1)
    return range(max(0, first), min(value.rows, last + 1))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("size", "lanes"), [(32, 8), (97, 8), (224, 8), (224, 16)])
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("banded", [False, True])
def test_every_row_read_is_the_one_that_was_written(
    name: str, size: int, lanes: int, layerwise: bool, banded: bool
) -> None:
    """Follow the plan row by row, with the memory of each row labeled by the value it holds."""
    grids = banded_grids(size, size, lanes=lanes) if banded else [None]
    for grid in grids:
        follow(plan_of(name, size, lanes, grid), layerwise, grouped=size == 224)
    assert grids or size == 97  # which fills no bands


def follow(plan: Arrangement, layerwise: bool, grouped: bool) -> None:
    pieces = plan.pieces
    if layerwise:  # as several threads execute the same plan
        pieces = [
            execution_order.Piece(i, 0, operation.num_rows())
            for i, operation in enumerate(plan.operations)
        ]
    elif grouped:
        assert len(pieces) > len(plan.operations)
    memory = np.full(plan.arena_size, -1)
    done: list[list[int]] = [[] for _ in plan.operations]
    for piece in pieces:
        operation = plan.operations[piece.operation]
        done[piece.operation] += range(piece.begin, piece.end)
        for value in (operation.source, operation.residual):
            if isinstance(value, Map):
                begin, end = piece.begin, piece.end
                if not isinstance(operation.target, Map) and operation.kind != bindings.OUTPUT:
                    begin, end = 0, value.rows  # pooling reads all rows for some channels
                for y in rows_of(operation, value, begin, end):
                    assert (memory[row_at(value, y)] == id(value) % 1_000_003).all(), (piece, y)
        if isinstance(operation.target, Map):
            for y in range(piece.begin, piece.end):
                for copy in rows_and_copies(operation.target, y):
                    memory[row_at(operation.target, copy)] = id(operation.target) % 1_000_003
    for operation, rows in zip(plan.operations, done, strict=True):
        assert sorted(rows) == list(range(operation.num_rows()))


def rows_and_copies(value: Map, y: int) -> list[int]:
    """Return where a row is written: above and below as well if other bands border on it."""
    rows = [y]
    if value.grid.bands > 1:
        rows += [y - value.rows] if y >= value.rows - value.pad_top else []
        rows += [y + value.rows] if y < value.pad_bottom else []
    return rows


def test_bands_of_other_rows_wait_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution_order, "core_cache", lambda: 4096)
    monkeypatch.setattr(execution_order, "MAX_WORK", 1e9)
    model = nn.Sequential(nn.Conv2d(1, 8, (2, 3), stride=3, padding=1)).eval()
    layers = lower(trace(model), model.state_dict(), in_channels=1)
    grid = Grid(vectors=12, rows=16, lanes=8, bands=2)
    plan = Arrangement(layers, (1, 28, 33), lanes=8, grid=grid)
    repacked = plan.operations[1].target
    assert isinstance(repacked, Map)
    assert (repacked.grid.bands, repacked.rows) == (2, 15)
    follow(plan, layerwise=False, grouped=False)


def test_a_sum_takes_the_place_of_what_it_adds_only_when_nobody_else_reads_it() -> None:
    places = {
        operation.layer.name: operation.target.position == operation.residual.position
        for operation in plan_of("bottleneck", 224).operations
        if operation.layer is not None
        and operation.residual is not None
        and operation.target is not None
    }
    assert places["layer1_0_downsample_0"]
    assert places["layer1_1_conv3"]
    for operation in plan_of("basic", 224).operations:
        assert (
            operation.target is None
            or operation.source is None
            or operation.target is not operation.source
        )


def test_groups_hold_small_weights_and_end_in_a_single_value() -> None:
    plan = plan_of("bottleneck", 224)
    groups = execution_order.fuse(plan.operations)
    assert [i for members in groups for i in members] == list(range(len(plan.operations)))
    assert any(len(members) > 3 for members in groups)
    for members in groups:
        inside = {id(plan.operations[i].target) for i in members[:-1]}
        later = plan.operations[members.stop :]
        assert not inside & {
            id(v) for operation in later for v in (operation.source, operation.residual)
        }


def test_bands_are_taken_where_they_fill_vectors_that_rows_do_not() -> None:
    layers = layers_of("bottleneck", density=0.3)
    found = arrange(layers, (3, 224, 224), lanes=16)
    assert isinstance(found.operations[0].target, Map)
    assert found.operations[0].target.grid.bands > 1  # rows of 56 fill 7 of 8 lanes
    assert found.estimated_time() < Arrangement(layers, (3, 224, 224), lanes=16).estimated_time()
    whole = arrange(layers, (3, 512, 512), lanes=16).operations[0].target  # rows of 128, 64, 32, 16
    assert isinstance(whole, Map)
    assert whole.grid.bands == 1
