"""What the import contracts of pyproject.toml cannot say about the rooms of the house."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("sparse", "image_classification", "cli")


def imports(path: Path) -> set[str]:
    """Return the packages and programs that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_no_room_imports_a_program() -> None:
    programs = {path.stem for path in ROOT.glob("*.py")}
    assert len(programs) >= 5
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        assert not imports(path) & programs, path


def test_the_trainer_has_no_word_of_sparsity() -> None:
    for path in (ROOT / "image_classification").rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            text = re.sub(r"pthread_sigmask|SIG_SETMASK", "", line)  # names of the system
            assert not re.search(r"spars|mask", text, re.IGNORECASE), f"{path}:{number}"


DENSE = """
import sys
from pathlib import Path

from image_classification import build, config, distributed
from image_classification.config import Config
from image_classification.log import Logger
from image_classification.run import Extension


def train(*argv):
    (c,) = config.parse(argv, Config, description="")
    config.check(c)
    dataset = build.inspect(c)
    start = build.prepare(c, dataset, build.sketch_model(c, dataset))
    world = distributed.start(cpu=c.cpu)
    logger = Logger(raport=Path(c.workspace) / c.raport_file, append=False)
    attach = lambda *joined: Extension()
    run = build.build(c, dataset, start, world=world, logger=logger, attach=attach)
    run.fit()
    run.close()
    logger.close()
    distributed.stop()


train(*sys.argv[1:])
train(*sys.argv[1:], "--pretrained-from-file", "checkpoint.pth.tar")
"""


def test_a_dense_trainer_is_left_without_the_other_rooms(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "image_classification",
        tmp_path / "image_classification",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    (tmp_path / "dense.py").write_text(DENSE)
    flags = "--data-backend synthetic --synthetic-batches 2 --arch small_cnn --image-size 32 -b 2"
    done = subprocess.run(
        [sys.executable, "dense.py", *f"{flags} --cpu --epochs 1".split()],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SAVING checkpoint.pth.tar") == 2
    assert "starting from checkpoint.pth.tar, entry 'state_dict'" in done.stdout
