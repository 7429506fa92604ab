"""No write out of bounds, no data race: the kernels under the compilers' sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparse import compiled
from sparse.runtime import native

SCRIPT = Path(__file__).with_name("sanitized.py")
ROOT = Path(native.__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["address,undefined", "thread"])
def test_kernels_are_clean_under(name: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ and its sanitizers")
    runtime = {"address,undefined": "libasan.so", "thread": "libtsan.so"}[name]
    found = subprocess.run(
        [compiler, f"-print-file-name={runtime}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip(f"{compiler} comes without {runtime}")
    flags = (f"-fsanitize={name}", "-O1", "-g", "-fno-omit-frame-pointer")
    library = native.LIBRARY.build(compiled.cpu_level(), tmp_path, flags=flags)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(library)],
        env={
            **os.environ,
            "LD_PRELOAD": found,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            # Python itself leaves memory to the end of the process.
            "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
            "TSAN_OPTIONS": "halt_on_error=1:report_bugs=1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "clean\n"
