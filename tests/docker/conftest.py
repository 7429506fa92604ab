"""The image under test, built once for all tests."""

import subprocess
from collections.abc import Iterator

import pytest

from tests.docker import building
from tests.docker.building import NAME, SITE, Image, execute


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """Build the image; skip where there is no engine or no base image to build it on."""
    building.require_engine()
    base = building.base_with_torch(tmp_path_factory.mktemp("base"))
    checkout = tmp_path_factory.mktemp("checkout")
    commit = building.copy_checkout(checkout)
    building.plant(checkout)
    build = ["bash", str(checkout / "docker/build.sh"), "--network=host"]
    execute([*build, "--build-arg", f"BASE_IMAGE={base}"], {"IMAGE": NAME})
    results = tmp_path_factory.mktemp("results")
    mount = f"--volume={building.site_packages()}:{SITE}:ro"
    yield Image(commit, flags=("--cpu", "--network=none", f"--results={results}", mount))
    subprocess.run(["docker", "rmi", "--force", NAME, base], capture_output=True)
