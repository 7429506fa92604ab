"""Several threads, and processes whose defaults or limits are not the usual ones."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors
import torch

from image_classification.models import create_model
from sparse import runtime
from tests.sparse.runtime.test_kernels import assert_close
from tests.sparse.runtime.test_networks import ROOT, logits_of

Save = Callable[..., Path]

NUM_THREADS, NUM_CALLS = 4, 30


@pytest.mark.parametrize("threads", [1, 2])
def test_several_threads_may_call_a_network(save: Save, kernel_cache: Path, threads: int) -> None:
    model = create_model("small_cnn", num_classes=7)
    network = runtime.load(save(model), threads=threads, tune=False, cache=kernel_cache)
    batches = [torch.randn(1 + i % 2, 3, 64, 64) for i in range(NUM_THREADS)]
    wanted = [logits_of(model, images) for images in batches]
    found: list[list[torch.Tensor]] = [[] for _ in batches]
    together = threading.Barrier(NUM_THREADS)

    def call(i: int) -> None:
        together.wait()  # the first call plans
        found[i] += [network(batches[i]) for _ in range(NUM_CALLS)]

    workers = [threading.Thread(target=call, args=(i,)) for i in range(NUM_THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for results, right in zip(found, wanted, strict=True):
        assert len(results) == NUM_CALLS
        for result in results:
            assert_close(result, right)


@contextmanager
def default(kind: torch.dtype | str) -> Iterator[None]:
    """Let torch make tensors of another type, or elsewhere, unless it is told."""
    if isinstance(kind, str):
        with torch.device(kind):
            yield
        return
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, "meta"])
@pytest.mark.parametrize("options", [{"fold": True}, {"dtype": "int8"}])
def test_other_defaults_of_torch_do_no_harm(
    save: Save, kernel_cache: Path, kind: torch.dtype | str, options: dict[str, object]
) -> None:
    model = create_model("small_cnn", num_classes=7)
    images = torch.randn(2, 3, 32, 32)
    path = save(model, density=0.4, **options)
    stored, state = metadata(path), runtime.read(path).state_dict()
    masks = runtime.read(path).masks()
    weights = model.state_dict()
    for backend in ("native", "torch"):
        arguments = {"backend": backend, "tune": False, "cache": kernel_cache}
        wanted = runtime.load(path, **arguments)(images)
        with default(kind):
            network = runtime.load(path, **arguments)
            found, array = network(images), network(images.numpy())
            again = network.state_dict()
        assert torch.equal(found, wanted)
        assert array.dtype == "float32"
        for name, value in again.items():
            assert value.dtype == state[name].dtype
            assert torch.equal(value, state[name])
    header = network.header
    with default(kind):
        runtime.save(
            path,
            weights,
            masks,
            nodes=runtime.trace(model),
            arch=header.arch,
            model=header.model,
            image_size=header.image_size,
            mean=header.mean,
            std=header.std,
            **options,
        )
    assert metadata(path) == stored  # with the digest of everything


LIMITED = """
import resource, sys, warnings
import torch, sparse.runtime
network = sparse.runtime.load(sys.argv[1], cache=sys.argv[2], tune=False, threads=4)
size = next(int(line.split()[1]) for line in open("/proc/self/status") if "VmSize" in line)
# Stacks take 1 GiB each: there is room for two.
resource.setrlimit(resource.RLIMIT_AS, (1024 * size + 2**31 + 2**29, resource.RLIM_INFINITY))
images = torch.ones(5, 3, 32, 32)
with warnings.catch_warnings(record=True) as caught:
    logits = network(images)
print(network.program(32, 32).threads, caught[0].message, caught[0].filename)
print(*logits[4].tolist())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of stacks by Linux's means")
def test_a_system_that_starts_fewer_threads_is_left_with_them(
    save: Save, kernel_cache: Path
) -> None:
    model = create_model("small_cnn", num_classes=7)
    command = ["sh", "-c", 'ulimit -s 1048576 && exec "$@"', "sh"]
    done = subprocess.run(
        [*command, sys.executable, "-c", LIMITED, str(save(model)), str(kernel_cache)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told, logits = done.stdout.splitlines()
    assert told == "3 the system has started 3 of 4 threads: the network runs on them <string>"
    found = torch.tensor([float(x) for x in logits.split()])
    assert_close(found, logits_of(model, torch.ones(1, 3, 32, 32))[0])
