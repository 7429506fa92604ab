"""Lightning's Trainer with the callback: what a plain loop gives, through checkpoints as well."""

import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from sparse.integrations.lightning import SparseCallback
from sparse.methods import Rigl
from sparse.topology.shards import whole
from tests.sparse.nets import METHODS, assert_inactive_zero, convnet, images, make, sgd
from tests.sparse.ranks import run
from tests.sparse.test_checkpoints import assert_identical

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's use of torch
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty"),
]
STEPS = 14


def batches() -> DataLoader[Any]:
    """Load the batches of `nets.images`, in order."""
    inputs, labels = zip(*map(images, range(STEPS)), strict=True)
    return DataLoader(TensorDataset(torch.cat(inputs), torch.cat(labels)), batch_size=6)


class Module(lightning.LightningModule):
    """A network that is trained with SGD."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.network = convnet(seed)

    def configure_optimizers(self) -> Any:
        return sgd(self.network)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return self.training_step(batch, index)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def fit(
    callback: SparseCallback, folder: Path, *, epochs: int = 1, module: Any = None, **options: Any
) -> Any:
    """Train, with a checkpoint folder/epoch=N.ckpt of each epoch; return the LightningModule."""
    module = module or Module()
    resumed = options.pop("ckpt_path", None)
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback, saving],
        default_root_dir=folder,
        **{"logger": False, **SILENT, **options},
    )
    trainer.fit(module, batches(), ckpt_path=resumed)
    return module


SILENT = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}


def callback_of(method: str, **options: Any) -> SparseCallback:
    factory, settings = METHODS[method]
    return SparseCallback(factory.__name__, **({"sparsity": 0.8} | settings | options))


def ends(module: Any, callback: SparseCallback) -> dict[str, Any]:
    optimizer = module.trainer.optimizers[0]
    assert callback.sparsifier is not None
    assert_inactive_zero(callback.sparsifier, module, optimizer)
    return {"weights": module.state_dict(), "optimizer": optimizer.state_dict(),
            "sparse": callback.state_dict()}  # fmt: skip


def assert_same_end(module: Any, callback: SparseCallback, whole: dict[str, Any]) -> None:
    found = ends(module, callback)
    for part in ("weights", "sparse"):
        assert_identical(found[part], whole[part])
    for index, state in whole["optimizer"]["state"].items():
        assert_identical(found["optimizer"]["state"][index], state)


@pytest.mark.parametrize("method", ["rigl", "set", "snfs", "snip", "gmp", "static"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_trains_as_a_plain_loop(method: str, accumulation: int, tmp_path: Path) -> None:
    callback = callback_of(method)
    module = fit(callback, tmp_path, accumulate_grad_batches=accumulation)

    plain = Module()
    optimizer = sgd(plain.network)
    sparsifier = make(method, plain, optimizer)
    for step in range(STEPS):
        (plain.training_step(images(step), step) / accumulation).backward()
        if (step + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert_identical(module.state_dict(), plain.state_dict())
    assert_identical(callback.state_dict(), sparsifier.state_dict())


@pytest.mark.parametrize("method", ["rigl", "snfs", "snip", "gmp", "gmp_global"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    method: str, precision: Any, tmp_path: Path
) -> None:
    later = {"prune_end": 30} if "gmp" in method else {"t_end": 30}
    settings = {} if method == "snip" else later
    first, second, other = (callback_of(method, **settings) for _ in range(3))
    whole = ends(fit(first, tmp_path / "whole", epochs=2, precision=precision), first)
    fit(other, tmp_path / "cut", epochs=1, precision=precision)
    resumed = fit(
        second,
        tmp_path / "cut",
        epochs=2,
        module=Module(seed=1),
        precision=precision,
        ckpt_path=tmp_path / "cut" / "epoch=0.ckpt",
    )
    assert_same_end(resumed, second, whole)


def test_a_second_fit_goes_on(tmp_path: Path) -> None:
    once, twice = callback_of("set", t_end=30), callback_of("set", t_end=30)
    fit(once, tmp_path)
    module = fit(twice, tmp_path)
    masks = twice.state_dict()["masks"]
    fit(twice, tmp_path, module=module)  # a new Trainer and optimizer
    assert twice.state_dict()["step"] == 2 * STEPS
    assert_inactive_zero(twice.sparsifier, module, module.trainer.optimizers[0])
    assert once.state_dict()["masks"].keys() == masks.keys()


def test_a_checkpoint_with_other_masks_is_tested_whole(tmp_path: Path) -> None:
    callback = callback_of("set", t_end=60)
    module = fit(callback, tmp_path, epochs=3)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    module.trainer.test(module, batches(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert_identical(module.state_dict(), saved)
    assert callback.state_dict()["step"] == STEPS


def test_updates_are_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="logs")
    fit(callback_of("rigl"), tmp_path, logger=logger)
    rows = (tmp_path / "logs" / "metrics.csv").read_text().splitlines()
    assert rows[0].split(",") == [
        *(f"sparse/{name}" for name in ("drop_fraction", "dropped", "grown", "sparsity")), "step"
    ]  # fmt: skip
    updates = [0, 4, 8, 12]  # the record has the step count after the batch
    assert [int(row.rpartition(",")[2]) for row in rows[1:]] == [step + 1 for step in updates]
    assert all(0.79 < float(row.split(",")[3]) < 0.81 for row in rows[1:])


def test_the_topology_settles_in_time(tmp_path: Path) -> None:
    callback = SparseCallback(sparsity=0.8, delta_t=1)
    fit(callback, tmp_path, epochs=2, accumulate_grad_batches=2)
    assert callback.sparsifier.method.t_end == int(0.75 * STEPS)
    callback = SparseCallback("gmp", sparsity=0.8, prune_every=1, t_end_fraction=0.5)
    fit(callback, tmp_path / "gmp")
    assert callback.sparsifier.method.prune_end == STEPS // 2
    fit(SparseCallback(Rigl(sparsity=0.8, t_end=5, delta_t=2)), tmp_path / "record")


def test_settings_in_steps_follow_from_the_length_of_training(tmp_path: Path) -> None:
    """As main.py derives them: shares of all steps, and epochs."""
    fit(callback := SparseCallback("granet", sparsity=0.8), tmp_path, epochs=2)
    granet = callback.sparsifier.method
    assert (granet.prune_end, granet.t_end) == (int(0.3 * 2 * STEPS), 2 * STEPS)
    partitions = ["network.0", "network.3"]
    options: dict[str, Any] = {"partitions": partitions, "phase_epochs": 0.5, "num_phases": 2}
    callback = SparseCallback("gap", sparsity=0.8, **options)
    fit(callback, tmp_path, epochs=2, accumulate_grad_batches=2)
    assert callback.sparsifier.method.phase == round(0.5 * -(-STEPS // 2))
    epochs = dict.fromkeys(("dense_warmup_epochs", "sparse_phase_epochs", "dense_phase_epochs"), 1)
    epochs |= dict.fromkeys(("last_dense_epochs", "last_sparse_epochs"), 0.5)
    callback = SparseCallback("acdc", sparsity=0.8, **epochs)
    fit(callback, tmp_path, epochs=3)
    acdc = callback.sparsifier.method
    assert (acdc.total_steps, acdc.dense_warmup) == (3 * STEPS, STEPS)
    assert acdc.last_sparse == round(STEPS / 2)
    with pytest.raises(ValueError, match="phase and phase_epochs say the same: give one of them"):
        fit(SparseCallback("gap", sparsity=0.8, phase=3, **options), tmp_path)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for options, words in (
        ({"method": "lottery"}, "method must be one of .*rigl.*, got 'lottery'"),
        ({"sparsty": 0.9}, "method 'rigl' takes no setting sparsty"),
        ({"method": Rigl(sparsity=0.8, t_end=5), "delta_t": 2}, "takes no setting delta_t"),
        ({"t_end_fraction": 1.5}, r"t_end_fraction must be in \(0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=words):
            SparseCallback(**options)
    with pytest.raises(ValueError, match="the run has no known length: give t_end, in steps"):
        fit(SparseCallback(sparsity=0.8), tmp_path, epochs=-1)

    class Two(Module):
        def configure_optimizers(self) -> Any:
            return [sgd(self.network[:1]), sgd(self.network[1:])]

        automatic_optimization = False

    with pytest.raises(ValueError, match="needs one optimizer, the model has 2: call "):
        fit(SparseCallback(sparsity=0.8), tmp_path, module=Two())


def test_a_state_of_other_weights_is_refused(tmp_path: Path) -> None:
    callback = callback_of("rigl")
    fit(callback, tmp_path)
    with pytest.raises(ValueError, match=r"network.0.weight is not 0 where its mask is inactive"):
        fit(callback, tmp_path, module=Module(seed=1))


class Sharded(Module):
    """The same, with weights that FSDP2 spreads over the processes."""

    def configure_model(self) -> None:
        for layer in (*self.network, self.network):
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def two_ranks(rank: int, world_size: int, folder: Path, strategy: str, method: str) -> Any:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    logging.getLogger("lightning").setLevel(logging.ERROR)
    results = {}
    for name, epochs, resumed in (("whole", 2, False), ("cut", 1, False), ("cut", 2, True)):
        callback, module = callback_of(method, t_end=20), Module()
        path = folder / "cut" / "epoch=0.ckpt" if resumed else None
        options: dict[str, Any] = {"devices": world_size, "ckpt_path": path, "strategy": "ddp"}
        if strategy != "ddp":
            options["strategy"] = ModelParallelStrategy(
                data_parallel_size=2,
                tensor_parallel_size=1,
                save_distributed_checkpoint=strategy == "fsdp, a checkpoint per process",
            )
            module = Sharded()
        fit(callback, folder / name, epochs=epochs, module=module, **options)
        # without the buffers of the norm, which each process has for itself
        weights = {name: whole(weight.detach()) for name, weight in module.named_parameters()}
        results[name] = {"weights": weights, "sparse": callback.state_dict()}
    return results


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "method"),
    [("ddp", "rigl"), ("fsdp, a checkpoint per process", "rigl"), ("fsdp, a whole one", "snfs")],
)
def test_two_processes_train_one_network_and_resume(
    strategy: str, method: str, tmp_path: Path
) -> None:
    work = functools.partial(two_ranks, folder=tmp_path, strategy=strategy, method=method)
    one, other = run(2, work, tmp_path)
    assert one["whole"]["sparse"]["step"] == STEPS  # each process trains half of the batches
    assert one["whole"]["sparse"]["num_updates"] > 2
    for results in (one, other):
        assert_identical(results["cut"], results["whole"])
        assert_identical(results["whole"]["sparse"], one["whole"]["sparse"])
        weights = (rank["whole"]["weights"]["network.3.weight"] for rank in (one, results))
        assert torch.equal(*weights)
