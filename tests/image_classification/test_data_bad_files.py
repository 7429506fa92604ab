"""Loaders on data sets with files that cannot be read."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from image_classification import data
from image_classification.data import (
    DataConfig,
    DataError,
    create_train_loader,
    create_val_loader,
    share_bad_files,
)
from image_classification.data.bad_files import BadFiles
from image_classification.data.folder import list_images
from image_classification.data.order import BatchPlan
from tests.image_classification import corpus

pytestmark = pytest.mark.filterwarnings(  # workers are forked, from Python 3.12 on with a warning
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)

ROOT = Path(__file__).parents[2]
BACKENDS = ("pytorch", "dali-cpu")
CREATE = {"train": create_train_loader, "val": create_val_loader}


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> tuple[Path, Path, set[str]]:
    """A corpus, its mended copy, and the names of its bad files below each split."""
    root = tmp_path_factory.mktemp("corpus")
    bad = corpus.make(root)
    return root, corpus.mend(root, tmp_path_factory.mktemp("mended"), bad), bad


@pytest.mark.parametrize("split", ["train", "val"])
def test_good_tiff_files_are_read_without_a_word(tmp_path, split, capfd):
    """DALI's decoders complain of kinds that they leave to each other, and of files cut off."""
    folder = tmp_path / split / "a"
    folder.mkdir(parents=True)
    photo = corpus.photo(0)
    for mode, options in (
        ("CMYK", {}),
        ("1", {}),
        ("RGB", {"compression": "lzma"}),
        ("RGB", {"compression": "tiff_lzw"}),
        ("L", {"compression": "tiff_adobe_deflate"}),
        ("P", {}),
    ):
        name = f"{mode}{options.get('compression', '')}.tif"
        (folder / name).write_bytes(corpus.encoded(photo.convert(mode), "TIFF", **options))
    (folder / "inside.tiff").write_bytes(corpus.encoded(photo, "JPEG", quality=95))
    (folder / "cut.tif").write_bytes(corpus.encoded(photo, "TIFF")[:-999])
    capfd.readouterr()
    loaded = []
    for backend in BACKENDS:
        loader = CREATE[split](config(tmp_path, backend, num_classes=1, batch_size=8))
        ((images, _),) = loader.epoch(0)
        bad, (said, complained) = loader.bad_files.fresh, capfd.readouterr()
        assert (len(images), [Path(name).name for name in bad]) == (7, ["cut.tif"])
        assert (said, complained) == ("", "")
        loaded.append(images)
        loader.close()
    assert (loaded[0] - loaded[1]).abs().mean() < 0.02


@pytest.fixture
def plain(tmp_path) -> Path:
    """Twelve good images in each split."""
    corpus.make(tmp_path)
    for split in ("train", "val"):
        shutil.rmtree(tmp_path / split / "a")
    return tmp_path


def config(path: Path, backend: str, **settings) -> DataConfig:
    defaults = {"image_size": 16, "resize": 18, "batch_size": 5, "workers": 0, "num_classes": 2}
    return DataConfig(path=path, backend=backend, **{**defaults, "max_bad_files": 1, **settings})


def share(loader: data.Loader) -> list[str]:
    """Return the warnings of a single process."""
    warnings: list[str] = []
    share_bad_files([loader.bad_files], device=torch.device("cpu"), warn=warnings.append)
    return warnings


def names(loader: data.Loader, directory: Path) -> set[str]:
    return {str(Path(file).relative_to(directory)) for file in loader.bad_files.fresh}


def equal(left, right) -> bool:
    pairs = list(zip(left, right, strict=True))
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("backend", "workers"), [("pytorch", 0), ("pytorch", 2), ("dali-cpu", 2)])
def test_bad_files_are_left_out_and_all_others_stay_as_they_are(odd, backend, workers, split):
    root, mended, bad = odd
    loader = CREATE[split](config(root, backend, workers=workers))
    reference = CREATE[split](config(mended, backend))
    images = list_images(root, split)
    is_good = np.array([images.path(i)[len(f"{root}/{split}/") :] not in bad for i in range(
        len(images))])  # fmt: skip
    plan = BatchPlan(num_samples=len(images), batch_size=5, rank=0, world_size=1, seed=0,
                     training=split == "train")  # fmt: skip
    met: set[str] = set()
    for epoch in range(2):  # in the second one they are known
        dealt = plan.batches(epoch)
        kept = [torch.from_numpy(is_good[indices]) for indices in dealt]
        expected = [
            (pixels[keep], targets[keep])
            for (pixels, targets), keep in zip(reference.epoch(epoch), kept, strict=True)
        ]
        assert equal(loader.epoch(epoch), expected)
        met |= {images.path(i) for indices in dealt for i in indices if not is_good[i]}
        assert set(loader.bad_files.fresh) == met
    assert not reference.bad_files.fresh
    if split == "val":
        assert names(loader, root / split) == bad
        assert sum(len(targets) for _, targets in loader.epoch(2)) == is_good.sum()
    for each in (loader, reference):
        each.close()


@pytest.mark.parametrize("split", ["train", "val"])
def test_both_backends_read_odd_images_alike(odd, split):
    root, _, bad = odd
    loaded = []
    for backend in BACKENDS:
        loader = CREATE[split](config(root, backend, batch_size=len(list_images(root, split))))
        loaded.append((list(loader.epoch(0)), names(loader, root / split)))
        loader.close()
    (first, first_bad), (second, second_bad) = loaded
    assert first_bad == second_bad == bad
    for (images, targets), (others, other_targets) in zip(first, second, strict=True):
        assert torch.equal(targets, other_targets)
        assert (images - others).abs().mean((1, 2, 3)).max() * 0.226 * 255 < 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_bad_file_is_named_once_and_counted_once(odd, backend):
    root, _, bad = odd
    loader = create_val_loader(config(root, backend))
    list(loader.epoch(0))
    warnings = share(loader)
    named = sorted(line.split()[3].rstrip(":") for line in warnings)
    assert named == sorted(f"{root}/val/{name}" for name in bad)
    assert all(line.endswith("; it is left out") and "\n" not in line for line in warnings)
    list(loader.epoch(1))
    assert share(loader) == []
    assert len(loader.bad_files) == len(bad)
    loader.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_bad_files_than_allowed_are_an_error(odd, backend):
    root, _, bad = odd
    share_of_files = (len(bad) - 1) / len(list_images(root, "val"))
    loader = create_val_loader(config(root, backend, max_bad_files=share_of_files))
    list(loader.epoch(0))
    count = f"{len(bad)} of {len(list_images(root, 'val'))} files in {root}/val cannot be used"
    with pytest.raises(DataError, match=rf"^{count}, --max-bad-files .* allows {len(bad) - 1};"
                       r" one of them: cannot read image \S+: [^\n]+$"):  # fmt: skip
        share(loader)
    loader.close()


@pytest.mark.parametrize(
    ("num_files", "limit", "allowed"),
    [(1000, 0.001, 1), (999, 0.001, 0), (2999, 0.001, 2), (100, 0.29, 29), (7, 1, 7), (7, 0, 0)],
)
def test_the_limit_is_rounded_down_to_whole_files(num_files, limit, allowed):
    bad = BadFiles(Path("x"), num_files=num_files, limit=limit, found={})
    files = {f"x/{number}": "cannot" for number in range(allowed)}
    assert len(bad.add([files, files])) == allowed
    bad.check()
    assert bad.add([files, {"x/more": "cannot"}, {"x/more": "cannot"}]) == []
    with pytest.raises(DataError, match=f"{allowed + 1} of {num_files} files in x .*{allowed};"):
        bad.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_epoch_with_bad_files_goes_on_where_it_was_left(odd, backend):
    root, _, _ = odd
    straight = create_train_loader(config(root, backend))
    whole = list(straight.epoch(1))
    share(straight)

    left = create_train_loader(config(root, backend, workers=2))
    running = left.epoch(1)
    before = [next(running) for _ in range(3)]
    file = io.BytesIO()
    torch.save(left.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    # Only what was handed out counts, whatever was made ahead.
    num_bad = 3 * 5 - sum(len(targets) for _, targets in before)
    assert len(state["bad_files"]) == num_bad > 0
    resumed = create_train_loader(config(root, backend))
    resumed.load_state_dict(state)
    assert equal(before + list(resumed.epoch(1)), whole)
    assert len(share(resumed)) == len(straight.bad_files) - num_bad  # the others are named already
    assert len(resumed.bad_files) == len(straight.bad_files)

    del state["bad_files"]  # as an older state
    resumed.load_state_dict(state)
    assert equal(resumed.epoch(1), whole[3:])
    for loader in (straight, left, resumed):
        loader.close()


def test_a_file_that_was_repaired_is_no_longer_counted_after_a_resume(plain):
    file = plain / "train/b/03.jpg"
    content = file.read_bytes()
    file.write_bytes(b"")
    settings = config(plain, "pytorch", num_classes=1, max_bad_files=0, batch_size=12)
    loader = create_train_loader(settings)
    list(loader.epoch(0))
    state = loader.state_dict()
    assert state["bad_files"] == ["b/03.jpg"]
    file.write_bytes(content)
    resumed = create_train_loader(settings)
    resumed.load_state_dict(state)
    list(resumed.epoch(1))
    assert share(resumed) == []
    assert len(resumed.bad_files) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_bad_files_keeps_its_place(plain, backend):
    for file in sorted((plain / "train/b").iterdir())[1:]:
        file.write_bytes(b"")
    for number in (0, 1, 6, 7, 8, 9):
        (plain / f"val/b/{number:02}.jpg").write_bytes(b"")
    settings = config(plain, backend, num_classes=1, batch_size=2)
    train, val = create_train_loader(settings), create_val_loader(settings)
    for epoch in range(2):
        loaded = list(train.epoch(epoch))
        assert sorted(len(targets) for _, targets in loaded) == [0, 0, 0, 0, 0, 1]
        assert {tuple(images.shape[1:]) for images, _ in loaded} == {(3, 16, 16)}
        assert [len(targets) for _, targets in val.epoch(epoch)] == [0, 2, 2, 0, 0, 2]
    assert len(train.bad_files.fresh) == 11
    train.close()
    val.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_class_that_vanishes_is_bad_files(plain, backend):
    shutil.copytree(plain / "train/b", plain / "train/c")
    settings = config(plain, backend, batch_size=4, workers=1, prefetch=1)
    loader = create_train_loader(settings)
    running = loader.epoch(0)
    num_read = len(next(running)[1])
    shutil.rmtree(plain / "train/c")
    for images, _ in running:
        num_read += len(images)
    assert num_read == 24 - len(loader.bad_files.fresh)
    assert sum(len(images) for images, _ in loader.epoch(1)) == 12
    assert names(loader, plain / "train") == {f"c/{number:02}.jpg" for number in range(12)}
    loader.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unreadable_file_behind_the_end_of_an_epoch_does_no_harm(plain, backend):
    (plain / "val/b/09.jpg").write_bytes(b"")
    loader = create_val_loader(config(plain, backend, num_classes=1, batch_size=4))
    running = loader.epoch(0)
    next(running)  # the last batch is under way
    assert not loader.bad_files.fresh
    assert [len(targets) for _, targets in loader.epoch(1)] == [4, 4, 3]
    assert names(loader, plain / "val") == {"b/09.jpg"}
    loader.close()


def test_links_that_lead_in_circles_are_followed_once(plain, tmp_path):
    split = plain / "train"
    (split / "b/deep").mkdir()
    shutil.copy(split / "b/00.jpg", split / "b/deep")
    (split / "linked").symlink_to("b/deep")  # a class like any other
    for link, target in (
        ("b/deep/up", "../../b"), ("b/root", ".."), ("b/self", "self"), ("lost", "nowhere"),
    ):  # fmt: skip
        (split / link).symlink_to(target)
    images = list_images(plain, "train")
    assert images.classes == ("b", "linked")
    assert len(images) == 14
    assert set(images.skipped) == {
        f"{split}/{link}" for link in ("b/deep/up", "b/root", "b/self", "linked/up", "lost")
    }
    loader = create_train_loader(config(plain, "pytorch", batch_size=14))
    list(loader.epoch(0))
    warnings = share(loader)
    assert len(warnings) == len(loader.bad_files) == 5
    assert f"cannot follow {split}/b/root: it leads back to where it lies; it is left out" in (
        warnings
    )
    assert loader.state_dict()["bad_files"] == []  # found anew at each start


def test_images_are_listed_in_the_order_of_torchvision(tmp_path):
    for name in ("b/2.jpg", "b/x-y/1.png", "b/x/z/3.jpg", "b/x/2.JPEG", "b/x/notes.txt", "a/1.ppm"):
        (tmp_path / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / name).touch()
    directory = str(tmp_path / "val")
    expected = make_dataset(directory, find_classes(directory)[1], extensions=IMG_EXTENSIONS)
    images = list_images(tmp_path, "val")
    listed = [(images.path(i), int(images.labels[i])) for i in range(len(images))]
    assert listed == expected


def test_a_class_that_only_leads_in_a_circle_is_an_error(plain):
    (plain / "train/c").symlink_to(".")
    with pytest.raises(ValueError, match=f"cannot follow {plain}/train/c: it leads back"):
        list_images(plain, "train")


SCRIPT = """
import multiprocessing, signal, sys
from pathlib import Path
from image_classification.data import DataConfig, create_train_loader

received = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: received.append(number))
config = DataConfig(path=Path(sys.argv[1]), backend="pytorch", image_size=16, batch_size=2,
                    workers=2, num_classes=1)
loaders = [create_train_loader(config) for _ in range(2)]
running = [loader.epoch(0) for loader in loaders]
count = sum(len(next(batches)[1]) for batches in running)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
sys.stdin.readline()
count += sum(len(targets) for batches in running for _, targets in batches)
running = [loader.epoch(1) for loader in loaders]
count += sum(len(targets) for batches in running for _, targets in batches)
loaders[0].close()  # the other one ends with the process
print(count, len(received), flush=True)
"""


SLOW_TO_BEGIN = """
import multiprocessing, os, sys, threading, time
from pathlib import Path
from image_classification.data import DataConfig, create_train_loader

os.register_at_fork(after_in_child=lambda: time.sleep(2))
config = DataConfig(path=Path(sys.argv[1]), backend="pytorch", image_size=16, batch_size=2,
                    workers=4, num_classes=1)
loader = create_train_loader(config)
threading.Thread(target=lambda: list(loader.epoch(0)), daemon=True).start()
while len(children := multiprocessing.active_children()) < 4:
    time.sleep(0.01)
print(*(child.pid for child in children), flush=True)
sys.stdin.readline()
"""


def start(path: Path, script: str = SCRIPT) -> tuple[subprocess.Popen[str], list[int]]:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script, str(path)],
        cwd=ROOT, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 4
    return process, workers


def alive(pids: list[int]) -> list[int]:
    """Return those that run; a zombie does not."""
    states = {}
    for pid in pids:
        try:
            states[pid] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [pid for pid, state in states.items() if state != "Z"]


def test_workers_leave_signals_to_the_training_process(plain):
    process, workers = start(plain)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.killpg(process.pid, number)  # as launchers and terminals do
        for worker in workers:
            os.kill(worker, number)
        time.sleep(0.1)  # for one at a time to arrive
    assert alive(workers) == workers
    out, err = process.communicate("go on\n", timeout=60)
    assert (process.returncode, out, err) == (0, "48 3\n", "")
    assert alive(workers) == []


@pytest.mark.parametrize("script", [SCRIPT, SLOW_TO_BEGIN], ids=["running", "beginning"])
def test_workers_end_when_the_training_process_is_killed(plain, script):
    process, workers = start(plain, script)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while alive(workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive(workers) == []
