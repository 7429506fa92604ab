"""One body for the CPU and for GPUs, and the same examples of properties each time."""

import os

# This process and those that tests start add numbers up in the same order: on one thread.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

torch.set_num_threads(1)  # torch may have been imported before

# A busy machine breaks no deadline. --hypothesis-profile=default looks for new examples.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return the CPU and, where there is one, the current GPU."""
    if request.param == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse tests that are marked `gpu` by hand: without a GPU nobody would run their bodies."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if by_hand := [item.nodeid for item in marked if _device(item) != "cuda"]:
        raise pytest.UsageError(f"not the mark gpu, but the fixture `device`: {', '.join(by_hand)}")


def _device(item: pytest.Item) -> object:
    return item.callspec.params.get("device") if hasattr(item, "callspec") else None
