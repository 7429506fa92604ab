"""The loaders of every backend, on real files."""

import gc
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from image_classification import data
from image_classification.data import DataConfig, create_train_loader, create_val_loader
from tests.cli.test_convert import noise

pytestmark = pytest.mark.filterwarnings(  # workers are forked, from Python 3.12 on with a warning
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)

FOLDER_BACKENDS = ("pytorch", "dali-cpu")
CPU_BACKENDS = ("dali-cpu", "pytorch", "synthetic")
MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
NUM_TRAIN, NUM_VAL = 23, 11
# Height and width: odd, tall, wide, smaller than the crop, exactly the crop, exactly the resized
# side, one pixel more, and so narrow that the longer side is many times the crop.
ODD_SIZES = (
    (375, 500),
    (333, 301),
    (501, 97),
    (97, 301),
    (20, 30),
    (7, 11),
    (224, 224),
    (256, 256),
    (257, 255),
    (224, 900),
    (481, 640),
)


def texture(height: int, width: int, seed: int, scales: tuple[int, ...]) -> Image.Image:
    """Return a picture with detail at several scales."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    for cells in scales:
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray((image / len(scales)).astype(np.uint8))


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Path:
    """Images that tell their number by their color, in three classes."""
    root = tmp_path_factory.mktemp("numbered")
    for split, count in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        for number in range(count):
            file = root / split / f"class{number % 3}" / f"{number:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9 + number, 8), (number * 10, 0, 255 - number)).save(file)
    return root


@pytest.fixture(scope="module")
def textured(tmp_path_factory) -> Path:
    """JPEG files of odd sizes, in two classes."""
    root = tmp_path_factory.mktemp("textured")
    for split in ("train", "val"):
        for number, size in enumerate(ODD_SIZES):
            file = root / split / "ab"[number % 2] / f"{number:02}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            texture(*size, seed=number, scales=(3, 12, 48)).save(file, quality=90)
    return root


def config(path: Path | None, backend: str, **settings) -> DataConfig:
    defaults = {"image_size": 8, "resize": 8, "batch_size": 4, "workers": 0, "num_classes": 3}
    return DataConfig(path=path, backend=backend, **{**defaults, **settings})


def batches(loader: data.Loader, epoch: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(loader.epoch(epoch))


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Undo the normalization: values from 0 to 255."""
    return (images * STD + MEAN) * 255


def numbers(loaded: list[tuple[torch.Tensor, torch.Tensor]]) -> list[int]:
    """Return the numbers of numbered images, after a look at their targets."""
    found = []
    for images, targets in loaded:
        of_batch = (pixels(images)[:, 0].mean((1, 2)) / 10).round().long()
        assert torch.equal(of_batch % 3, targets)
        found += of_batch.tolist()
    return found


def equal(left, right) -> bool:
    pairs = list(zip(left, right, strict=True))
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_batches_are_normalized_floats_in_the_memory_format(numbered, backend, memory_format):
    path = None if backend == "synthetic" else numbered
    settings = config(path, backend, memory_format=memory_format, synthetic_length=3)
    train, val = create_train_loader(settings), create_val_loader(settings)
    for loader in (train, val):
        loaded = batches(loader)
        assert len(loaded) == len(loader) > 0
        for images, targets in loaded:
            assert images.shape[1:] == (3, 8, 8)
            assert images.dtype == torch.float32
            assert images.is_contiguous(memory_format=memory_format)
            assert targets.shape == images.shape[:1]
            assert targets.dtype == torch.int64
            assert 0 <= targets.min() <= targets.max() < 3
            exact = pixels(images)
            assert (exact - exact.round()).abs().max() < 1e-3
            assert exact.min() > -1e-3
            assert exact.max() < 255 + 1e-3
        loader.close()


@pytest.mark.parametrize("backend", FOLDER_BACKENDS)
def test_training_shares_each_epoch_out_anew(numbered, backend):
    ranks = [
        create_train_loader(config(numbered, backend, batch_size=3, rank=rank, world_size=2))
        for rank in range(2)
    ]
    epochs = []
    for epoch in range(2):
        shards = [numbers(batches(loader, epoch)) for loader in ranks]
        assert [len(shard) for shard in shards] == [9, 9]  # 3 batches: 23 // (2 * 3)
        assert len({number for shard in shards for number in shard}) == 18  # none twice
        epochs.append(shards)
    assert epochs[0][0] != epochs[1][0]
    assert set(epochs[0][0]) != set(epochs[1][0])  # members move between ranks, not only places
    other = create_train_loader(
        config(numbered, backend, batch_size=3, rank=0, world_size=2, seed=1)
    )
    assert numbers(batches(other)) != epochs[0][0]


@pytest.mark.parametrize("backend", FOLDER_BACKENDS)
@pytest.mark.parametrize("world_size", [1, 3, 13])
def test_validation_sees_every_image_once(numbered, backend, world_size):
    seen, lengths = [], []
    for rank in range(world_size):
        loader = create_val_loader(config(numbered, backend, rank=rank, world_size=world_size))
        loaded = batches(loader)
        assert len(loaded) == len(loader)
        seen += numbers(loaded)
        lengths.append(len(loader))
        assert equal(loaded, batches(loader, epoch=1))
        loader.close()
    assert sorted(seen) == list(range(NUM_VAL))
    assert lengths == {1: [3], 3: [1, 1, 1], 13: [1] * 11 + [0, 0]}[world_size]


@pytest.mark.parametrize("backend", FOLDER_BACKENDS)
def test_an_epoch_does_not_depend_on_what_ran_before(textured, backend):
    settings = config(textured, backend, num_classes=2, image_size=32, resize=37)
    straight = create_train_loader(settings)
    epochs = [batches(straight, epoch) for epoch in range(3)]
    assert not equal(epochs[0], epochs[1])
    fresh = create_train_loader(settings)
    assert equal(batches(fresh, 2), epochs[2])
    assert equal(batches(fresh, 0), epochs[0])

    # In the middle of an epoch, through a file.
    left = create_train_loader(settings)
    running = left.epoch(1)
    next(running)
    file = io.BytesIO()
    torch.save(left.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert equal(batches(fresh, 1), epochs[1][1:])
    assert equal(batches(fresh, 2), epochs[2])

    # An epoch that is given up leaves nothing behind.
    assert equal(batches(left, 2), epochs[2])
    for loader in (straight, fresh, left):
        loader.close()


@pytest.mark.parametrize("backend", FOLDER_BACKENDS)
def test_the_number_of_workers_changes_nothing(textured, backend):
    settings = {"num_classes": 2, "image_size": 32, "resize": 37, "seed": 7}
    if backend == "pytorch":
        settings["augmentation"] = "autoaugment"
    alone = create_train_loader(config(textured, backend, **settings))
    helped = create_train_loader(config(textured, backend, workers=2, **settings))
    for epoch in range(2):  # the second one with the same workers
        assert equal(batches(alone, epoch), batches(helped, epoch))
    running = helped.epoch(0)  # workers are ahead of an epoch that is given up
    next(running)
    assert equal(batches(helped, 1), batches(alone, 1))
    helped.close()


def test_a_state_names_the_position_of_the_batch_handed_out_last(numbered):
    loader = create_train_loader(config(numbered, "pytorch", batch_size=5, world_size=2))
    positions = []
    for _ in loader.epoch(3):
        state = loader.state_dict()
        positions.append((state["epoch"], state["samples"]))
    assert positions == [(3, 10), (4, 0)]
    other = create_train_loader(config(numbered, "pytorch", seed=1))
    with pytest.raises(ValueError, match="its --seed was 0, now it is 1"):
        other.load_state_dict({"epoch": 3, "samples": 10, "seed": 0, "num_samples": NUM_TRAIN})
    with pytest.raises(ValueError, match="number of images was 99, now it is 23"):
        other.load_state_dict({"epoch": 3, "samples": 10, "seed": 1, "num_samples": 99})
    other.load_state_dict({"epoch": 4, "samples": 0, "seed": 0, "num_samples": 99})  # no position


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("image_size", "resize"), [(224, None), (224, 224), (224, 225), (33, 40)])
def test_validation_pixels_equal_those_of_torchvision(textured, interpolation, image_size, resize):
    settings = {
        "num_classes": 2,
        "image_size": image_size,
        "resize": resize,
        "interpolation": interpolation,
    }
    mode = v2.InterpolationMode(interpolation)
    reference = v2.Compose(
        [
            v2.Resize(resize or 256, interpolation=mode, antialias=True),
            v2.CenterCrop(image_size),
            v2.PILToTensor(),
        ]
    )
    files = sorted((textured / "val").glob("*/*.jpg"))
    expected = torch.stack([reference(Image.open(file)) for file in files]).float()
    for backend in FOLDER_BACKENDS:
        loader = create_val_loader(config(textured, backend, **settings))
        images = pixels(torch.cat([images for images, _ in batches(loader)]))
        difference = (images - expected).abs().mean((1, 2, 3))
        assert difference.max() < 0.3, (backend, files[int(difference.argmax())])
        loader.close()


def test_the_triangular_filter_of_dali_is_its_antialiased_bilinear_one(textured):
    loaded = [
        batches(create_val_loader(config(textured, "dali-cpu", num_classes=2, interpolation=name)))
        for name in ("triangular", "bilinear")
    ]
    assert equal(*loaded)


@pytest.mark.parametrize("backend", FOLDER_BACKENDS)
def test_validation_pixels_equal_those_of_tensorflow(tmp_path, backend):
    """tf_views.json: some pixels of what TensorFlow's own functions make of these images."""
    golden = json.loads((Path(__file__).parents[1] / "data/tf_views.json").read_text())
    (tmp_path / "val/a").mkdir(parents=True)
    for number, view in enumerate(golden["views"]):
        height, width = view["height"], view["width"]
        image = (noise(f"photo {height}x{width}", (height, width, 3)) + 1) * 128
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / f"val/a/{number}.png")
    settings = {"num_classes": 1, "image_size": 224, "resize": None}
    loader = create_val_loader(config(tmp_path, backend, **settings, interpolation="tensorflow"))
    images = pixels(torch.cat([images for images, _ in batches(loader)]))
    loader.close()
    at = torch.tensor(golden["places"])
    for image, view in zip(images, golden["views"], strict=True):
        found = image[:, at][:, :, at].permute(1, 2, 0)
        # half a step of 8 bits, and TensorFlow's table of the kernel
        difference = (found - torch.tensor(view["pixels"]).clamp(0, 255)).abs().max()
        assert difference < 0.85, (view["height"], view["width"])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "tensorflow"])
def test_backends_crop_and_flip_alike(textured, interpolation):
    loaded = []
    for backend in FOLDER_BACKENDS:
        settings = config(
            textured, backend, num_classes=2, image_size=64, interpolation=interpolation, resize=73
        )
        loaded.append(batches(create_train_loader(settings)))
    for (images, targets), (others, other_targets) in zip(*loaded, strict=True):
        assert torch.equal(targets, other_targets)
        difference = (pixels(images) - pixels(others)).abs().mean((1, 2, 3))
        assert difference.max() < 0.5
        # The other way round they would be far apart.
        assert (pixels(images) - pixels(others).flip(-1)).abs().mean((1, 2, 3)).min() > 2


@pytest.mark.parametrize("backend", FOLDER_BACKENDS)
def test_every_kind_of_image_becomes_rgb(tmp_path, backend):
    photo = texture(48, 48, seed=0, scales=(3, 6))
    gray = photo.convert("L")
    turned = Image.Exif()
    turned[0x0112] = 6  # shown rotated by a quarter
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    for name, image, options in (
        ("bmp.bmp", photo, {}),
        ("cmyk.jpg", photo.convert("CMYK"), {"quality": 95}),
        ("deep.png", deep, {}),
        ("exif.jpg", photo, {"quality": 95, "exif": turned}),
        ("gray.jpg", gray, {"quality": 95}),
        ("gray.png", gray, {}),
        ("palette.png", photo.quantize(), {}),
        ("progressive.jpg", photo, {"quality": 95, "progressive": True}),
        ("rgb.ppm", photo, {}),
        ("rgb.tif", photo, {}),
        ("rgb.webp", photo, {"lossless": True}),
        ("rgba.png", photo.convert("RGBA"), {}),
    ):
        file = tmp_path / "val" / "a" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, **options)
    loader = create_val_loader(
        config(tmp_path, backend, num_classes=1, image_size=48, resize=48, batch_size=16)
    )
    ((images, _),) = batches(loader)
    in_color = F.pil_to_tensor(photo).float()
    in_gray = F.pil_to_tensor(gray.convert("RGB")).float()
    for file, image in zip(sorted((tmp_path / "val/a").iterdir()), pixels(images), strict=True):
        expected = in_gray if file.stem in ("gray", "deep") else in_color
        tolerance = 8 if file.stem in ("palette", "cmyk") else 2  # few colors; coarse chroma
        assert (image - expected).abs().mean() < tolerance, file.name
    loader.close()


def test_a_process_may_end_within_an_epoch(textured):
    script = f"""
from pathlib import Path
from image_classification.data import DataConfig, create_train_loader
running = []
for backend in {FOLDER_BACKENDS}:
    config = DataConfig(path=Path({str(textured)!r}), backend=backend, image_size=32,
                        batch_size=2, workers=1, num_classes=2)
    running.append(create_train_loader(config).epoch(0))
    next(running[-1])
"""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stderr) == (0, "")


class Cycle:
    """Garbage whose finalizer tells in which process it ran."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.itself = folder, self

    def __del__(self) -> None:
        (self.folder / str(os.getpid())).touch()


def test_workers_do_not_finalize_garbage_of_the_training(numbered, tmp_path):
    collects = [True]
    os.register_at_fork(after_in_child=lambda: collects[0] and gc.collect())
    gc.disable()
    try:
        Cycle(tmp_path)
        loader = create_train_loader(config(numbered, "pytorch", workers=2))
        batches(loader)
        loader.close()
        assert not list(tmp_path.iterdir())
    finally:
        collects[0] = False
        gc.enable()
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_loading_leaves_the_random_numbers_of_the_training_alone(numbered, backend):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    augmentation = "autoaugment" if backend == "pytorch" else None
    settings = config(numbered, backend, augmentation=augmentation, synthetic_length=2)
    batches(create_train_loader(settings))
    batches(create_val_loader(settings))
    assert torch.equal(torch.get_rng_state(), before)


def test_autoaugment_changes_training_images_only(textured):
    settings = {"num_classes": 2, "image_size": 32, "resize": 37, "batch_size": 11}
    plain = config(textured, "pytorch", **settings)
    augmented = config(textured, "pytorch", augmentation="autoaugment", **settings)
    assert equal(batches(create_val_loader(plain)), batches(create_val_loader(augmented)))
    ((before, _),) = batches(create_train_loader(plain))
    ((after, _),) = batches(create_train_loader(augmented))
    changed = (before != after).flatten(1).any(1)
    assert changed.sum() >= 6


def test_synthetic_batches_are_finite_and_differ_between_ranks():
    settings = [config(None, "synthetic", synthetic_length=3, rank=r, world_size=2) for r in (0, 1)]
    first, second = (batches(create_train_loader(s)) for s in settings)
    assert len(first) == len(second) == 3
    assert equal(first, batches(create_train_loader(settings[0]), epoch=4))
    assert not equal(first, second)
    assert len(batches(create_val_loader(settings[0]))) == 3


def test_too_few_images_for_a_batch_are_an_error(numbered):
    with pytest.raises(ValueError, match=r"needs 24 images, .*/train has 23: pass a smaller"):
        create_train_loader(config(numbered, "pytorch", batch_size=12, world_size=2))


def test_a_class_count_that_does_not_fit_is_an_error(numbered):
    with pytest.raises(ValueError, match="--num-classes 10 does not fit the 3 class directories"):
        create_val_loader(config(numbered, "dali-cpu", num_classes=10))


def test_a_missing_dali_is_named_with_what_to_do(numbered, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "image_classification.data.dali_graph", raising=False)
    monkeypatch.delattr(data, "dali_graph", raising=False)
    with pytest.raises(ValueError, match=r"nvidia-dali-cuda130.*--data-backend pytorch"):
        create_train_loader(config(numbered, "dali-cpu"))


@pytest.mark.parametrize(
    ("backend", "settings", "message"),
    [
        ("dali", {}, "--data-backend 'dali' is not one of"),
        ("dali-gpu", {}, "--data-backend dali-gpu needs a CUDA device, not cpu"),
        ("pytorch", {"path": None}, "--data-backend pytorch needs a data directory"),
        ("pytorch", {"interpolation": "nearest"}, "--interpolation 'nearest' is not one of"),
        ("pytorch", {"interpolation": "triangular"}, "triangular needs a DALI backend"),
        ("dali-gpu", {"interpolation": "tensorflow"}, "pass --data-backend dali-cpu or pytorch"),
        ("dali-cpu", {"augmentation": "autoaugment"}, "needs --data-backend pytorch"),
        ("synthetic", {"augmentation": "autoaugment"}, "--augmentation has no effect"),
        ("pytorch", {"augmentation": "cutout"}, "--augmentation 'cutout' is not one of"),
        ("pytorch", {"batch_size": 0}, "--batch-size 0 must be at least 1"),
        ("pytorch", {"max_bad_files": 1.5}, "--max-bad-files 1.5 must be in [0, 1]"),
        ("pytorch", {"workers": -1}, "--workers -1 must be at least 0"),
        ("pytorch", {"rank": 2, "world_size": 2}, "rank 2 is not one of 2 processes"),
        ("pytorch", {"image_size": 9}, "resized to 8 pixels are too small for a crop of 9"),
        ("pytorch", {"memory_format": torch.preserve_format}, "channels last or contiguous"),
    ],
)
def test_settings_that_make_no_sense_are_refused(backend, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(settings.pop("path", Path("data")), backend, **settings)


def test_the_default_validation_resize_keeps_the_usual_proportion():
    assert DataConfig(path=None, backend="synthetic", image_size=224).shorter_side == 256
    assert DataConfig(path=None, backend="synthetic", image_size=32).shorter_side == 37
