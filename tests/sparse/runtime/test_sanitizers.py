"""No write out of bounds, no data race: the kernels under the compilers' sanitizers."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparse.native import library

SCRIPT = Path(__file__).with_name("sanitized.py")
ROOT = Path(library.__file__).parents[2]


@functools.cache
def sanitized(name: str, directory: Path) -> tuple[Path, dict[str, str]]:
    """Return kernels compiled with a sanitizer, and the environment in which they run."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ and its sanitizers")

    def path_of(file: str) -> str:
        command = [compiler, f"-print-file-name={file}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    found = path_of({"address,undefined": "libasan.so", "thread": "libtsan.so"}[name])
    if not os.path.isabs(found):
        pytest.skip(f"{compiler} comes without {found}")
    flags = (f"-fsanitize={name}", "-O1", "-g", "-fno-omit-frame-pointer")
    return library.KERNELS.compile(library.cpu_level(), directory, flags=flags), {
        **os.environ,
        # Sanitizers look for what throws exceptions when they start.
        "LD_PRELOAD": f"{found} {path_of('libstdc++.so.6')}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        # Python itself leaves memory to the end of the process.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:report_bugs=1",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["address,undefined", "thread"])
def test_kernels_are_clean_under(name: str, kernel_cache: Path) -> None:
    library, environment = sanitized(name, kernel_cache)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(library)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "clean\n"


@pytest.mark.slow
def test_files_of_strangers_touch_their_own_memory_only(kernel_cache: Path, tmp_path: Path) -> None:
    library, environment = sanitized("address,undefined", kernel_cache)
    done = subprocess.run(
        [sys.executable, "-m", "tests.sparse.runtime.fuzzed", str(library), "3000", str(tmp_path)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("clean\n")
