"""Plans through the C interface that Python's own libraries have: what runs, what is refused."""

import ctypes
import functools
import hashlib
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparse import runtime
from sparse.native import __main__ as native
from sparse.native import library
from sparse.runtime import bindings, plan_file
from sparse.runtime.network import Program
from tests.sparse.runtime import plans
from tests.sparse.runtime.conftest import LEVELS
from tests.sparse.runtime.plans import HEADER, NETWORKS, Api, bits, case_of, draw_for, replaced


def compare(seed: int, kernels: bindings.Kernels, api: Api) -> None:
    """Compare a random plan that the C interface runs with Python's program and with torch."""
    case = draw_for(seed, kernels)
    for threads in (1, 3):
        network = api.open(case.data, threads)
        assert not isinstance(network, str), (seed, network)
        assert network.in_shape == tuple(case.images.shape[1:])
        found = network.run(case.images).view(case.wanted.shape)
        case.check(found)
        program = Program(case.plan, kernels, threads)
        assert torch.equal(found, program.run(case.images)), seed


def test_random_plans_equal_python_and_torch(each_kernels: bindings.Kernels) -> None:
    api = Api(each_kernels.path)
    for seed in range(40):
        compare(seed, each_kernels, api)


@pytest.mark.slow
def test_many_random_plans_equal_python_and_torch(each_kernels: bindings.Kernels) -> None:
    api = Api(each_kernels.path)
    for seed in range(1000, 1600):
        compare(seed, each_kernels, api)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_every_kind_equal_python_and_torch(
    name: str, api: Api, kernel_cache: Path, tmp_path: Path
) -> None:
    compact = tmp_path / "network"
    case = case_of(name, library.cpu_level(), compact)
    for threads in (1, 3):
        network = open_(api, case.data, threads)
        python = runtime.load(compact, threads=threads, tune=False, cache=kernel_cache)
        for images in (case.images, case.images[:1]):
            assert torch.equal(network.run(images)[..., 0, 0], python(images))
        case.check(network.run(case.images)[..., 0, 0])
    assert api.call("retune", network.handle) == "SPARSE_OK"
    case.check(network.run(case.images)[..., 0, 0])


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 20, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 33, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(33, 7),
    )


@pytest.fixture
def compact(save: Callable[..., Path]) -> Path:
    torch.manual_seed(0)
    return save(small(), density=0.3)


@pytest.fixture
def api(kernels: bindings.Kernels) -> Api:
    return Api(kernels.path)


@pytest.fixture
def plan(compact: Path, tmp_path: Path) -> bytes:
    """Return the plan of a small network for this processor."""
    runtime.save_plan(compact, tmp_path / "plan", tune=False)
    return (tmp_path / "plan").read_bytes()


def open_(api: Api, plan: bytes | Path, threads: int = 0) -> plans.Network:
    network = api.open(plan, threads)
    assert isinstance(network, plans.Network), network
    return network


def test_a_plan_tells_what_it_takes(
    api: Api, compact: Path, tmp_path: Path, kernel_cache: Path
) -> None:
    path = tmp_path / "net.plan"
    tuned = runtime.save_plan(compact, path, image_size=40, threads=2, cache=kernel_cache)
    assert tuned
    network = open_(api, path)
    assert network.in_shape == (3, 40, 40)
    assert network.out_shape == (7, 1, 1)
    assert network.ask("threads") == 2
    assert network.ask("level") == library.cpu_level().encode()
    header = runtime.read(compact).header
    for name in ("mean", "std"):
        assert network.ask(name)[:3] == np.float32(getattr(header, name)).tolist()
    images = torch.randn(5, 3, 40, 40)
    wanted = runtime.load(compact, threads=2, cache=kernel_cache)(images)
    assert torch.equal(network.run(images)[..., 0, 0], wanted)
    assert open_(api, path, threads=1).ask("threads") == 1


def test_pixels_are_normalized_as_in_training(api: Api, plan: bytes, compact: Path) -> None:
    header = runtime.read(compact).header
    pixels = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    mean, std = (np.float32(values) for values in (header.mean, header.std))
    images = (pixels.numpy().astype(np.float32) / np.float32(255) - mean) / std
    images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    for threads in (1, 3):
        network = open_(api, plan, threads)
        assert torch.equal(network.run(pixels), network.run(images))


def test_without_tuning_the_same_network_gives_the_same_bytes(
    compact: Path, tmp_path: Path
) -> None:
    made = []
    for level in (*library.LEVELS, *library.LEVELS):
        assert not runtime.save_plan(compact, tmp_path / "plan", level=level, tune=False)
        made.append((tmp_path / "plan").read_bytes())
    assert made[: len(library.LEVELS)] == made[len(library.LEVELS) :]
    assert len(set(made)) == len(library.LEVELS)


def test_a_level_of_another_machine_is_for_plans_only(
    compact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = next(level for level in library.LEVELS if level not in library.family())
    assert not runtime.save_plan(compact, tmp_path / "plan", level=foreign)  # not tuned
    told = f"level {foreign} is not for this machine"
    with pytest.raises(ValueError, match=told):
        runtime.load(compact, level=foreign)
    assert native.main([foreign]) == 2
    assert capsys.readouterr().err.startswith(f"sparse.native: error: {told} (")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"level": "sse"}, "level must be one of avx512, avx2, aarch64, portable, got 'sse'"),
        ({"threads": 0}, "threads must be 1 to 1024, got 0"),
        ({"image_size": 0}, "image_size must be 1 to 16384, got 0"),
        ({"image_size": 1}, "images of 1x1 are too small"),
    ],
)
def test_options_out_of_range_are_refused(
    options: dict[str, object], told: str, compact: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        runtime.save_plan(compact, tmp_path / "plan", **options)


def test_the_python_side_knows_the_kernels(each_kernels: bindings.Kernels) -> None:
    assert each_kernels.plan_version == plan_file.VERSION
    pointers = [kind is ctypes.c_void_p for _, kind in bindings.Op._fields_]
    assert pointers == sorted(pointers), "plan.cpp expects the pointers last"
    assert bindings.Op._fields_[bindings.NUMBERS][0] == "mask", "the first pointer of check.cpp"


def test_every_kind_of_operation_is_checked() -> None:
    header, checks = ((plans.SOURCES / name).read_text() for name in ("op.h", "check.cpp"))
    kinds = re.findall(
        r"^  (k\w+) = \d+,$", header.partition("enum Kind")[2].partition("}")[0], re.M
    )
    assert len(kinds) >= 9
    assert {kind for kind in kinds if f"case {kind}: return" not in checks} == set()


def test_the_registers_of_a_level_are_known(libraries: dict[int, Path]) -> None:
    best = library.LEVELS[library.cpu_level()][0]
    for lanes, path in libraries.items():
        if lanes <= best:
            found = bindings.Kernels(path).num_registers
            assert found == library.num_registers(LEVELS[lanes])


@pytest.mark.parametrize(
    ("member", "value", "status", "told"),
    [
        ("lanes", 5, "OTHER_LEVEL", "for 5 lanes and"),
        ("registers", 64, "OTHER_LEVEL", "and 64 registers"),
        ("version", 99, "OTHER_VERSION", "version 99, this library reads version 4"),
        ("op_bytes", 8, "OTHER_VERSION", "operations of 8 bytes"),
        ("bytes", 1000, "BAD_PLAN", "bytes of 1000"),
        ("threads", 0, "BAD_PLAN", "its number of threads"),
        ("arena", 16, "BAD_PLAN", "operation 0: "),
        ("arena", 2**60, "NO_MEMORY", "half of the memory"),
        ("channels", 2**62, "BAD_PLAN", "a shape is out of range"),
        ("height", 31, "BAD_PLAN", "operation 0: the size of the image differs"),
        ("outputs", 8, "BAD_PLAN", "the size of the output differs"),
        ("num_ops", 2**59, "BAD_PLAN", "its parts lie outside"),
        ("num_ops", 0, "BAD_PLAN", ""),
        ("num_pieces", 1, "BAD_PLAN", ""),
        ("num_tables", 1, "BAD_PLAN", ""),
    ],
)
def test_a_header_that_does_not_fit_is_refused(
    member: str, value: int, status: str, told: str, api: Api, plan: bytes
) -> None:
    refused = api.open(replaced(plan, {HEADER[member]: value}))
    assert isinstance(refused, str)
    assert refused.startswith(f"SPARSE_{status}: ")
    assert told in refused
    assert "\n" not in refused


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], plans.Case]:
    """Return a function that makes the plans of small networks once."""

    @functools.cache
    def make(name: str) -> plans.Case:
        compact = tmp_path_factory.mktemp("plan") / "network"
        return case_of(name, library.cpu_level(), compact)

    return make


FAR, FURTHER = 10**6, 2**31 - 1


@pytest.mark.parametrize(
    ("name", "kind", "member", "value", "told"),
    [
        ("vit", "ATTENTION", "heads", 3, "the heads have other channels"),
        ("vit", "ATTENTION", "depth", 2**31, "the heads have other channels"),
        ("vit", "ATTENTION", "num_tokens", 0, "no such number of tokens"),
        ("vit", "ATTENTION", "num_tokens", 2**31, "no such number of tokens"),
        ("vit", "ATTENTION", "in_plane", FAR // 16 * 16, "overlap"),
        ("vit", "ATTENTION", "score_scale", bits(math.nan), "score_scale is out of range"),
        ("vit", "ATTENTION", "score_scale", bits(1e300), "score_scale is out of range"),
        ("vit", "ATTENTION", "num_parts", 2, "other parts"),
        ("vit", "ATTENTION", "offsets", None, "a table is missing"),
        ("vit", "ATTENTION", "offsets", FURTHER, "outside the arena"),
        ("vit", "ATTENTION", "offsets", -1, "a token lies elsewhere"),
        ("vit", "ATTENTION", "num_windows", 0, "no such number of tokens"),
        ("vit", "ATTENTION", "num_windows", 2**31, "no such number of tokens"),
        ("swin", "ATTENTION", "num_windows", 99, "no such number of tokens"),
        ("swin", "ATTENTION", "num_tokens", 11, "a token lies elsewhere"),
        ("swin", "ATTENTION", "num_tokens", 13, "a token lies elsewhere"),
        ("swin", "ATTENTION", "offsets", FURTHER, "outside the arena"),
        ("swin", "ATTENTION", "counts", None, "a table is missing"),
        ("swin", "ATTENTION", "counts", -1, "there is no such bias"),
        ("swin", "ATTENTION", "counts", FURTHER, "a table is too short"),
        ("vit", "LAYER_NORM", "weights", None, "a table is missing"),
        ("vit", "LAYER_NORM", "bias", None, "a table is missing"),
        ("vit", "LAYER_NORM", "eps", bits(-1.0), "eps is out of range"),
        ("vit", "LAYER_NORM", "num_parts", 0, "other parts"),
        ("vit", "LAYER_NORM", "channels", 40, "overlap"),
        ("vit", "TOKENS", "weights", None, "a table is missing"),
        ("vit", "TOKENS", "offsets", FURTHER, "outside the arena"),
        ("vit", "TOKENS", "rows", 2, "a table is too short"),
        ("vit", "TOKENS", "in_plane", FAR, "outside the arena"),
        ("vit", "TOKEN", "channels", FAR, "outside the arena"),
        ("vit", "TOKEN", "in_plane", FAR, "outside the arena"),
        ("vit", "TOKEN", "channels", 0, "the output is empty"),
        ("convnext", "VECTOR_NORM", "channels", 17, "a table is too short"),
        ("convnext", "VECTOR_NORM", "in_", FAR, "a member is out of range"),
        ("convnext", "SPARSE_CONV", "activation", 10, "no such activation"),
        ("convnext", "VECTOR_NORM", "eps", bits(math.inf), "eps is out of range"),
        ("squeeze and excitation", "SCALE", "res", -1, "there are no factors"),
        ("squeeze and excitation", "SCALE", "res", "arena", "outside the arena"),
        ("squeeze and excitation", "SCALE", "in_", 1, "not aligned"),
        ("squeeze and excitation", "SCALE", "in_row", FAR // 16 * 16, "outside the arena"),
        ("shuffle", "REPACK", "row_channel", FURTHER, "outside the arena"),
        ("shuffle", "REPACK", "row_channel", -1, "there is no channel"),
        ("flatten", "OUTPUT", "out", "arena", "outside the arena"),
        ("flatten", "OUTPUT", "channels", 7, "overlap|outside the arena"),
    ],
)
def test_an_operation_that_does_not_fit_is_refused(
    name: str,
    kind: str,
    member: str,
    value: int | str | None,
    told: str,
    api: Api,
    networks: Callable[[str], plans.Case],
) -> None:
    """None stands for no table, and a number in the place of a table for its first entries."""
    plan = networks(name).data
    number = getattr(bindings, kind)
    place = plans.member(plan, number, member)
    is_table = dict(bindings.Op._fields_)[member] is ctypes.c_void_p
    if value == "arena":
        value = plans.number_at(plan, HEADER["arena"])
    elif is_table and value is not None:
        place = plans.table(plan, number, member)
    refused = api.open(replaced(plan, {place: int(value or 0)}))
    assert isinstance(refused, str)
    assert refused.startswith("SPARSE_BAD_PLAN: the plan is damaged: operation ")
    assert re.search(told, refused), refused


def test_an_attention_writes_no_pixel_twice(
    api: Api, networks: Callable[[str], plans.Case]
) -> None:
    plan = networks("swin").data
    windows, tokens = (
        plans.number_at(plan, plans.member(plan, bindings.ATTENTION, name))
        for name in ("num_windows", "num_tokens")
    )
    lanes = plans.number_at(plan, HEADER["lanes"])
    places = plans.table(plan, bindings.ATTENTION, "offsets")
    written = places + 4 * windows * -(-tokens // lanes) * lanes  # the second half of the table
    first = int.from_bytes(plan[written : written + 4], "little")
    refused = api.open(replaced(plan, {written: first * (1 + 2**32)}))
    assert isinstance(refused, str)
    assert "two tokens are one" in refused


def test_what_a_thread_needs_counts_towards_the_memory(
    api: Api, networks: Callable[[str], plans.Case]
) -> None:
    plan = networks("vit").data
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
    full = replaced(plan, {HEADER["arena"]: most - 1000})
    assert api.open(full, 1) == (
        "SPARSE_NO_MEMORY: the plan needs more than half of the memory of this machine"
    )


def test_a_plan_of_another_level_is_refused_with_both_names(
    libraries: dict[int, Path], compact: Path, tmp_path: Path
) -> None:
    portable = Api(libraries[4])
    runtime.save_plan(compact, tmp_path / "plan", level="avx512", tune=False)
    path = tmp_path / "plan"
    assert portable.open(path) == (
        f"SPARSE_OTHER_LEVEL: {path}: the plan is for 16 lanes and 32 registers (level avx512), "
        f"this library has 4 lanes and {library.num_registers('portable')} registers: "
        "export it for the level of the library"
    )


def test_damaged_and_foreign_files_are_refused(api: Api, plan: bytes, tmp_path: Path) -> None:
    for size in (0, 7, 183, 184, len(plan) // 2, len(plan) - 1):
        refused = api.open(plan[:size])
        assert isinstance(refused, str)
        assert refused.startswith("SPARSE_BAD_PLAN: ")
    flipped = bytearray(plan)
    for place in range(8, len(plan), 1001):
        flipped[place] ^= 4
        assert isinstance(api.open(bytes(flipped)), str)
        flipped[place] ^= 4
    assert api.open(b"x" * 1000) == "SPARSE_BAD_PLAN: this is no plan"
    missing = tmp_path / "missing"
    assert api.open(missing) == (
        f"SPARSE_NO_FILE: {missing}: cannot be read: No such file or directory"
    )
    assert api.open(tmp_path) == f"SPARSE_NO_FILE: {tmp_path}: cannot be read: Is a directory"


def test_calls_that_make_no_sense_are_refused(api: Api, plan: bytes) -> None:
    assert api.open(plan, -1) == "SPARSE_BAD_ARGUMENT: threads must be 0 to 1024, got -1"
    network = open_(api, plan)
    some = (ctypes.c_float * 10)()
    for name in ("run", "run_uint8"):
        for arguments, told in (
            ((None, some, 1, some), "network is null"),
            ((network.handle, some, -1, some), "num_images must not be negative, got -1"),
            ((network.handle, None, 1, some), "images is null"),
            ((network.handle, some, 1, None), "outputs is null"),
        ):
            first, images, count, outputs = arguments
            status = api.call(name, first, images, ctypes.c_int64(count), outputs)
            assert (status, api.error()) == ("SPARSE_BAD_ARGUMENT", told)
        assert api.call(name, network.handle, None, ctypes.c_int64(0), None) == "SPARSE_OK"
    assert api.call("open_memory", None, ctypes.c_size_t(9), 0, None) == "SPARSE_BAD_ARGUMENT"
    assert api.call("retune", None) == "SPARSE_BAD_ARGUMENT"
    api._library.sparse_close(None)


def test_tuned_plans_still_compute_their_networks(each_kernels: bindings.Kernels) -> None:
    """Also when they are tuned once more, from tables that tuning has made."""
    api = Api(each_kernels.path)
    for seed in range(8):
        case = draw_for(seed, each_kernels)
        network = open_(api, case.data, threads=3)
        for _ in range(2):
            assert api.call("retune", network.handle) == "SPARSE_OK"
            case.check(network.run(case.images).view(case.wanted.shape))


def test_several_threads_may_run_a_network_at_a_time(api: Api, plan: bytes) -> None:
    network = open_(api, plan, threads=2)
    images = [torch.randn(3, 3, 32, 32) for _ in range(4)]
    wanted = [network.run(each) for each in images]
    found: dict[int, list[Tensor]] = {}

    def call(i: int) -> None:
        found[i] = [network.run(images[i]) for _ in range(20)]

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(images))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for i, outputs in enumerate(wanted):
        assert len(found[i]) == 20
        assert all(torch.equal(outputs, each) for each in found[i])


def test_the_digest_is_that_of_the_standard(api: Api, plan: bytes) -> None:
    """Of messages of every length around the blocks of the algorithm."""
    assert plan[8:40] == hashlib.sha256(plan[40:]).digest()
    for extra in range(1, 130):
        longer = plan + bytes(extra)
        open_(api, replaced(longer, {HEADER["bytes"]: len(longer)}))


def test_changed_plans_do_no_harm(kernels: bindings.Kernels) -> None:
    command = [sys.executable, "-m", "tests.sparse.runtime.fuzzed_plans", kernels.path]
    done = subprocess.run(
        [*map(str, command), "700", "--limit"], cwd=plans.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-100:] + done.stderr[-2000:]
    found = re.search(r"opened (\d+), refused (\d+)", done.stdout)
    assert found
    assert min(map(int, found.groups())) > 100
