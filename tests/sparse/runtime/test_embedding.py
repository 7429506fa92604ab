"""The library that CMake builds, and the examples, on this machine and on 64-bit ARM."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import sparse
from sparse import runtime
from sparse.native import library
from tests.documents import blocks
from tests.sparse.runtime import plans
from tests.sparse.runtime.conftest import prune_
from tests.sparse.runtime.plans import NETWORKS, RUN_PLANS, Target, compile_program, draw, install
from tests.sparse.runtime.test_plans import small

EXAMPLES = plans.ROOT / "examples" / "embedding"
HERE = library.family()[-1]
"""The level that every processor of this machine's family runs."""


@pytest.fixture(params=["here", "aarch64", pytest.param("best", marks=pytest.mark.slow)])
def target(request: pytest.FixtureRequest) -> Target:
    """Return the level of all processors like this one, 64-bit ARM, and this processor's best."""
    levels = {"here": HERE, "best": library.cpu_level()}
    return Target(levels[request.param]) if request.param in levels else plans.aarch64()


@pytest.mark.parametrize("threads", [1, 3])
def test_random_plans_equal_torch_and_python(target: Target, threads: int, tmp_path: Path) -> None:
    cases = [draw(seed, target.level) for seed in range(1000, 1050)]
    program = compile_program(target, RUN_PLANS, tmp_path / "run_plans", shared=True)
    found = plans.run_cases(target, program, cases, tmp_path, threads=threads)
    for case, outputs in zip(cases, found, strict=True):
        case.check(outputs)
    if target.emulator:
        return
    api = plans.Api(library.KERNELS.find(target.level, library.default_cache()))
    for case, outputs in zip(cases, found, strict=True):
        network = api.open(case.data, threads)
        assert isinstance(network, plans.Network)
        assert torch.equal(outputs, network.run(case.images).view(outputs.shape))


def test_networks_of_every_kind_equal_torch(target: Target, tmp_path: Path) -> None:
    compacts = [tmp_path / name.replace(" ", "-") for name in NETWORKS]
    cases = [
        plans.case_of(name, target.level, compact)
        for name, compact in zip(NETWORKS, compacts, strict=True)
    ]
    program = compile_program(target, RUN_PLANS, tmp_path / "run_plans", shared=True)
    one, three = (
        plans.run_cases(target, program, cases, tmp_path, threads=threads) for threads in (1, 3)
    )
    for compact, case, outputs, others in zip(compacts, cases, one, three, strict=True):
        case.check(outputs)
        assert torch.equal(outputs, others)
        if not target.emulator:  # bit for bit
            python = runtime.load(compact, threads=3, level=target.level, tune=False)
            assert torch.equal(outputs, python(case.images))


def test_the_examples_print_what_python_computes(
    target: Target, save: Callable[..., Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    compact = save(small(), density=0.3)
    plan, image = tmp_path / "network.plan", tmp_path / "image.ppm"
    runtime.save_plan(compact, plan, level=target.level, tune=False)
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    plans.write_ppm(image, pixels)
    header = runtime.read(compact).header
    images = (pixels / 255 - torch.tensor(header.mean)) / torch.tensor(header.std)
    here = not target.emulator
    level = target.level if here else HERE
    wanted = runtime.load(compact, level=level, tune=False)(images.permute(2, 0, 1).contiguous())
    values, classes = wanted.topk(5)
    lines = [f"class {c}: {v:.9g}\n" for c, v in zip(classes, values.tolist(), strict=True)]
    printed = set()
    for source, shared in (("classify.c", True), ("classify.cpp", False)):
        program = compile_program(target, EXAMPLES / source, tmp_path / "classify", shared=shared)
        printed.add(target.run(program, plan, image))
        done = subprocess.run(
            [*target.emulator, program, image, image], capture_output=True, text=True
        )
        assert done.returncode == 1
        assert done.stderr == f"SPARSE_BAD_PLAN: {image}: this is no plan\n"
    (text,) = printed
    if here:
        assert text == "".join(lines)  # bit for bit
    found = [line.split(": ") for line in text.splitlines()]
    assert [name for name, _ in found] == [f"class {c}" for c in classes]
    assert torch.allclose(torch.tensor([float(v) for _, v in found]), values, rtol=1e-4)


def test_an_installed_library_is_found_by_cmake(tmp_path: Path) -> None:
    prefix = install(Target(HERE))
    shutil.copy(EXAMPLES / "classify.cpp", tmp_path)
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.16)\n"
        "project(example LANGUAGES CXX)\n"
        "find_package(sparse_runtime REQUIRED)\n"
        "add_executable(classify classify.cpp)\n"
        "target_compile_features(classify PRIVATE cxx_std_17)\n"
        "target_link_libraries(classify PRIVATE sparse_runtime_static)\n"
    )
    cmake, build = plans.needed("cmake"), tmp_path / "build"
    plans.run(cmake, "-S", tmp_path, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}")
    plans.run(cmake, "--build", build)
    done = subprocess.run([build / "classify"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: " in done.stderr


def test_the_code_of_the_document_compiles(tmp_path: Path) -> None:
    (code,) = blocks((plans.ROOT / "docs" / "embedding.md").read_text(), "c")
    (tmp_path / "code.c").write_text(code)
    include = f"-I{plans.SOURCES}/include"
    plans.run(plans.needed("cc"), "-Werror", "-Wall", include, "-fsyntax-only", tmp_path / "code.c")


def test_a_level_of_another_machine_is_refused(tmp_path: Path) -> None:
    cmake = plans.needed("cmake")
    foreign = next(level for level in library.LEVELS if level not in library.family())
    command = [cmake, "-S", plans.SOURCES, "-B", tmp_path, f"-DSPARSE_LEVEL={foreign}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"got {foreign}" in done.stderr


def test_cmake_and_python_compile_with_the_same_flags() -> None:
    text = (plans.SOURCES / "CMakeLists.txt").read_text()
    for level, (lanes, flags) in library.LEVELS.items():
        if flags:
            _, _, branch = text.partition(f'STREQUAL "{level}")\n')
            assert branch.startswith(f"  set(lanes {lanes})\n  set(flags {' '.join(flags)})\n")
        else:
            assert f"else()\n  set(lanes {lanes})\n  set(flags)\nendif()" in text
    assert "set(levels portable avx2 avx512)" in text
    assert {*library.FAMILIES["x86_64"]} == {"portable", "avx2", "avx512"}


def resnet50(size: int, compact: Path) -> nn.Module:
    """Write ResNet-50 with an ERK mask of sparsity 0.9 as a compact file."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = sparse.static(model, optimizer, sparsity=0.9, distribution="erk").masks
    prune_(model.eval(), 1.0)  # draws BatchNorms
    runtime.save(
        compact,
        model.state_dict(),
        masks,
        nodes=runtime.trace(model),
        arch="resnet50",
        model={},
        image_size=size,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        fold=True,
    )
    return model


def compare_resnet50(size: int, folder: Path) -> None:
    """Run a sparse ResNet-50 on 64-bit ARM, on one and three threads, and with torch."""
    target = plans.aarch64()
    model = resnet50(size, folder / "net")
    images = torch.randn(2, 3, size, size)
    (folder / "0.in").write_bytes(images.numpy().tobytes())
    program = compile_program(target, RUN_PLANS, folder / "run_plans", shared=True)
    with torch.no_grad():
        wanted = model.double()(images.double())
    runtime.save_plan(folder / "net", folder / "0.plan", level=target.level, threads=3)
    for threads in (1, 3):
        target.run(program, threads, 1, folder / "0")
        found = torch.from_numpy(np.fromfile(folder / "0.out", np.float32)).view(2, 1000)
        assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


def test_a_sparse_resnet50_on_arm_equals_torch(tmp_path: Path) -> None:
    compare_resnet50(32, tmp_path)


@pytest.mark.slow
def test_a_sparse_resnet50_of_full_size_on_arm_equals_torch(tmp_path: Path) -> None:
    compare_resnet50(224, tmp_path)
