"""A run: epochs of training and validation, checkpoints, resume, summaries."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from image_classification import checkpoint, distributed, preemption, sharding
from image_classification.config import Config, changes
from image_classification.data import DataError, Loader, share_bad_files
from image_classification.evaluate import evaluate
from image_classification.log import GpuMonitor, Logger, Verbosity
from image_classification.preemption import Preempted
from image_classification.trainer import Trainer, TrainingError


class Stateful(Protocol):
    """An object whose state a checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class Extension:
    """What a program joins to training. The trainer does not know what it is."""

    metrics: Callable[[], Mapping[str, float]] = dict
    """Numbers for every log record."""
    epoch_metrics: Callable[[], Mapping[str, float]] = dict
    """Further numbers at the end of an epoch, for the raport only."""
    bar: Sequence[str] = ()
    """Names of `metrics` that the progress bar and the console's line of an epoch show."""
    prepare_ema: Callable[[nn.Module], object] = lambda model: None
    """Called on the averaged model after each of its updates."""
    prepare_ddp: Callable[[DistributedDataParallel], object] = lambda model: None
    """Called on the model that DDP has wrapped, before its first use."""
    state: Mapping[str, Stateful] = field(default_factory=dict)
    """Further entries of the checkpoint."""
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Further flags for the checkpoint's `config`, with plain values."""


class Run:
    """Trains, validates, saves and resumes one configuration.

    Args:
        config: The flags.
        trainer: Model and optimizer, ready to train.
        train_loader: Training batches of this process, or None if the run only validates.
        val_loader: Validation batches of this process, or None with --training-only.
        steps_per_epoch: Optimizer steps per epoch.
        optimizer_batch_size: Images per optimizer step over all processes.
        logger: Log of the run.
        extension: What the program joins to training.
        seed: Seed with which the run started. The checkpoint keeps it.
    """

    def __init__(
        self,
        config: Config,
        trainer: Trainer,
        *,
        train_loader: Loader | None,
        val_loader: Loader | None,
        steps_per_epoch: int,
        optimizer_batch_size: int,
        logger: Logger,
        extension: Extension,
        seed: int,
    ) -> None:
        self.config, self.trainer, self.logger = config, trainer, logger
        self.train_loader, self.val_loader = train_loader, val_loader
        self.steps_per_epoch, self.optimizer_batch_size = steps_per_epoch, optimizer_batch_size
        self.extension, self.seed = extension, seed
        self.epoch = 0
        """Number of finished epochs."""
        self.best_top1 = 0.0
        self._stale = 0  # epochs since best_top1 was reached
        self._totals: dict[str, float] = {}  # summary of the epochs so far
        self._saved: Path | None = None  # the newest checkpoint
        self._ballot = distributed.Ballot()
        self._gpu = GpuMonitor(trainer.world.device)

    def fit(self) -> None:
        """Run the epochs that are left and log the run's summary.

        Raises:
            DataError: In one line, why the data cannot be used any longer.
            Preempted: A rank was asked to stop. A checkpoint was written, unless checkpoints are
                off.
            TrainingError: In one line, why training cannot go on.
        """
        config = self.config
        last = config.epochs
        if config.run_epochs != -1:
            last = min(last, self.epoch + config.run_epochs)
        self.logger.headline(("train.loss", "val.top1", "val_ema.top1", *self.extension.bar))
        self.logger.message(f"RUNNING EPOCHS FROM {self.epoch} TO {last}")
        self._stop_if_requested()
        while self.epoch < last and not self._out_of_patience():
            record = self._train_epoch()
            is_best = self._validate_epoch(record)
            record["data.bad_files"] = self._share_bad_files()
            self.epoch += 1
            self._log_epoch(record)
            self._totals = _summarize(self._totals, record)
            if config.save_checkpoints:
                self.save(is_best=is_best)
            if config.prof != -1:
                break
            if self.epoch < last:
                self._stop_if_requested()
        if self._totals:
            self.logger.log((), self._totals, global_step=self.trainer.step)
        self.logger.message("Experiment ended")

    def validate(self, epoch: int = 0) -> dict[str, float]:
        """Return the metrics of the model, and of its EMA if there is one."""
        assert self.val_loader is not None
        models = {"val": self.trainer.model}
        if self.trainer.ema is not None:
            models["val_ema"] = self.trainer.ema.module
        record: dict[str, float] = {}
        for prefix, model in models.items():
            try:
                with sharding.whole_weights(model):
                    record |= evaluate(
                        model,
                        self.val_loader,
                        world=self.trainer.world,
                        precision=self.trainer.precision,
                        topk=self.config.topk,
                        logger=self.logger,
                        step=(epoch, self.steps_per_epoch * self.trainer.accumulation),
                        print_freq=self.config.print_freq,
                        limit=self.config.prof,
                        prefix=prefix,
                        after_batch=self._stop_if_agreed,
                    )
            except DataError:  # no image is left: name the bad files, or say there are too many
                self._share_bad_files()
                raise
        return record

    def evaluate(self) -> None:
        """Validate once and log the result as the run's summary."""
        names = [f"{kind}.{name}" for kind in ("val", "val_ema")
                 for name in ("top1", f"top{self.config.topk}", "loss")]  # fmt: skip
        self.logger.headline((*names, *self.extension.bar))
        record = {**self.extension.metrics(), **self.validate()}
        record["data.bad_files"] = self._share_bad_files()
        self.logger.log((), record)
        self.logger.log((), self.extension.epoch_metrics(), Verbosity.VERBOSE)

    def close(self) -> None:
        """Stop the processes and threads of the loaders."""
        for loader in (self.train_loader, self.val_loader):
            if loader is not None:
                loader.close()

    def save(self, *, is_best: bool = False) -> None:
        """Write a checkpoint of the present state. All ranks must call this; rank 0 writes.

        If weights are not finite, nothing is written, and the checkpoint before stays.
        """
        own = {"rng": checkpoint.rng_state(), "meter": self.trainer.meter.state_dict()}
        ranks = distributed.all_gather_object(own)
        is_main = self.trainer.world.is_main
        if is_main or sharding.is_sharded(self.trainer.model):
            state = sharding.collect(self._state(ranks), keep=is_main)
        if is_main:
            self._write(state, is_best=is_best)
        self._saved = distributed.broadcast_object(self._saved)  # waits until it is written

    @property
    def _epoch_step(self) -> int:
        """Number of optimizer steps in the unfinished epoch."""
        return self.trainer.epoch_step if self.trainer.epoch == self.epoch else 0

    def _state(self, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        loader = self.train_loader.state_dict() if self.train_loader is not None else None
        return {
            "format": checkpoint.FORMAT,
            "epoch": self.epoch,
            "epoch_step": self._epoch_step,
            "arch": self.config.arch,
            "best_prec1": self.best_top1,
            "epochs_since_best": self._stale,
            "totals": self._totals,
            "seed": self.seed,
            "optimizer_batch_size": self.optimizer_batch_size,
            **self.trainer.state_dict(),
            **{name: part.state_dict() for name, part in self.extension.state.items()},
            "loader": loader,
            "ranks": ranks,
            "config": self._flags,
        }

    @property
    def _flags(self) -> dict[str, Any]:
        return {**vars(self.config), **self.extension.flags}

    def _write(self, state: dict[str, Any], *, is_best: bool) -> None:
        weights = state["state_dict"].values()
        if not all(bool(w.isfinite().all()) for w in weights if w.is_floating_point()):
            self.logger.warning(
                f"step {self.trainer.step}: the weights are not finite, no checkpoint is written"
            )
            return
        try:
            path = checkpoint.save(
                Path(self.config.workspace),
                state,
                epoch=self.epoch,
                is_best=is_best,
                filename=self.config.checkpoint_filename,
                # within an epoch it would replace the file of the epoch before
                keep=0 if self._epoch_step else self.config.gather_checkpoints,
            )
            self._saved = path
            self.logger.saved(path)
        except OSError as error:  # a full disk must not end the run
            self.logger.warning(str(error))

    def load_weights(self, path: Path, state: Mapping[str, Any]) -> None:
        """Load the weights, the averaged weights and the extension's state, and nothing else.

        Raises:
            ValueError: One line that names the file and the entry that is missing or does not fit.
        """
        parts: dict[str, Any] = {"state_dict": self.trainer.model}
        if self.trainer.ema is not None:
            parts["ema"] = self.trainer.ema
        elif state.get("ema") is not None:
            self.logger.message(f"{path} has averaged weights, too: --use-ema evaluates them")
        joined = self.extension.state
        parts |= {name: joined[name] for name in joined if state.get(name) is not None}
        checkpoint.restore(parts, state, path)

    def resume(self, path: Path, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: One line that names the file and the entry that is missing or does not fit.
        """
        trainer = self.trainer
        parts: dict[str, Any] = {"state_dict": trainer.model, "optimizer": trainer.optimizer}
        if trainer.scaler.is_enabled() and state.get("scaler") != {}:  # empty: no scaler was in use
            parts["scaler"] = trainer.scaler
        if trainer.ema is not None:
            parts["ema"] = trainer.ema
        checkpoint.restore({**parts, **self.extension.state}, state, path)
        self._tell_changes(state, path)
        trainer.step = checkpoint.entry(state, "step", path)
        self.epoch = checkpoint.entry(state, "epoch", path)
        trainer.epoch_step = checkpoint.entry(state, "epoch_step", path)
        if trainer.epoch_step:
            trainer.epoch = self.epoch
        self.best_top1 = checkpoint.entry(state, "best_prec1", path)
        self._stale = checkpoint.entry(state, "epochs_since_best", path)
        self._totals = dict(checkpoint.entry(state, "totals", path))
        self._saved = path
        if self.train_loader is not None:
            self.train_loader.load_state_dict(checkpoint.entry(state, "loader", path))
        self._resume_rank(checkpoint.entry(state, "ranks", path), path)

    def _tell_changes(self, state: Mapping[str, Any], path: Path) -> None:
        """Tell which flags differ from those of the checkpoint, and what is not continued."""
        if changed := changes(state.get("config", {}), self._flags):
            self.logger.message(f"flags changed since {path}: {', '.join(changed)}")
        if self.trainer.ema is None and state.get("ema") is not None:
            self.logger.warning(
                f"the averaged weights of {path} are not continued: --use-ema is missing"
            )

    def _resume_rank(self, ranks: Sequence[Mapping[str, Any]], path: Path) -> None:
        """Restore what belongs to this rank: its meter and its random numbers."""
        world = self.trainer.world
        if len(ranks) == world.world_size:
            self.trainer.meter.load_state_dict(ranks[world.rank]["meter"])
            checkpoint.set_rng_state(ranks[world.rank]["rng"])
            return
        # Another number of processes: ranks get equal shares of the sums, and the random numbers
        # cannot continue.
        meters = [rank["meter"] for rank in ranks]
        shares = {name: sum(m[name] for m in meters) / len(meters) for name in ("loss", "images")}
        self.trainer.meter.load_state_dict({**meters[0], **shares})
        torch.manual_seed(self.seed + 1 + self.trainer.step * world.world_size + world.rank)
        self.logger.warning(
            f"{path} was written by {len(ranks)} processes, this run has {world.world_size}: "
            f"{self.optimizer_batch_size} images per step are kept with {self.trainer.accumulation}"
            " micro-batches, random numbers start anew"
        )

    def _train_epoch(self) -> dict[str, float]:
        assert self.train_loader is not None
        steps = self.steps_per_epoch
        if self.config.prof != -1:
            steps = min(steps, max(1, self.config.prof // self.trainer.accumulation))
        try:
            return self.trainer.train_epoch(
                self.train_loader,
                self.epoch,
                steps=steps,
                logger=self.logger,
                print_freq=self.config.print_freq,
                metrics=lambda: {
                    **self.extension.metrics(),
                    **self._gpu.sample(),
                    "data.bad_files": self._share_bad_files(),
                },
                bar=("train.loss", "train.total_ips", *self.extension.bar),
                after_step=self._after_step,
            )
        except TrainingError as error:
            stands = f"the last good checkpoint is {self._saved}" if self._saved else (
                "there is no checkpoint yet"
            )  # fmt: skip
            raise TrainingError(f"{error}; {stands}") from None
        except RuntimeError as error:
            operation, found, _ = str(error).partition(" does not have a deterministic")
            if not found:
                raise
            raise TrainingError(
                f"--deterministic: {operation} has no deterministic algorithm here: leave the flag "
                "out, or train another network"
            ) from error

    def _after_step(self) -> None:
        """Stop if the ranks have agreed to stop. Otherwise write a checkpoint if one is due."""
        every = self.config.checkpoint_every_steps
        if self._ballot.cast(preemption.requested() is not None):
            self._stop()
        elif every and self.trainer.step % every == 0 and self.config.save_checkpoints:
            self.save()

    def _stop_if_agreed(self) -> None:
        if self._ballot.cast(preemption.requested() is not None):
            raise Preempted

    def _stop_if_requested(self) -> None:
        """Stop before the next epoch if asked to. There is nothing new to save."""
        if self._ballot.decide(preemption.requested() is not None):
            raise Preempted

    def _stop(self) -> None:
        """Save and stop. No rank ends before the checkpoint is written."""
        if self.config.save_checkpoints:
            self.save()
        raise Preempted

    def _share_bad_files(self) -> int:
        """Warn of files that could not be read, and return their number. All ranks must call this.

        Raises:
            DataError: There are more bad files than --max-bad-files allows.
        """
        loaders = [self.train_loader, self.val_loader]
        return share_bad_files(
            [loader.bad_files for loader in loaders if loader is not None],
            device=self.trainer.world.device,
            warn=self.logger.warning,
        )

    def _validate_epoch(self, record: dict[str, float]) -> bool:
        """Add validation metrics to `record`. Return whether top-1 is the best so far."""
        if self.val_loader is None:
            return False
        try:
            record |= self.validate(self.epoch)
        except Preempted:  # the training of the epoch is saved; the resumed run validates it
            self._stop()
        top1 = max(record["val.top1"], record.get("val_ema.top1", 0.0))
        is_best = top1 > self.best_top1
        self._stale = 0 if is_best else self._stale + 1
        self.best_top1 = max(top1, self.best_top1)
        return is_best

    def _out_of_patience(self) -> bool:
        patience = self.config.early_stopping_patience
        if patience == -1 or self._stale < patience:
            return False
        self.logger.message(f"no better top-1 in {patience} epochs: stopping early")
        return True

    def _log_epoch(self, record: Mapping[str, float]) -> None:
        shown = dict(self.extension.metrics())
        detail: dict[str, float] = {}
        for name, value in record.items():
            (detail if "time" in name or "latency" in name else shown)[name] = value
        epoch = (self.epoch - 1,)
        self.logger.log(epoch, shown, global_step=self.trainer.step)
        self.logger.log(epoch, detail, Verbosity.VERBOSE, global_step=self.trainer.step)
        last = self.steps_per_epoch * self.trainer.accumulation
        self.logger.log((self.epoch - 1, last), self.extension.epoch_metrics(), Verbosity.VERBOSE,
                        global_step=self.trainer.step)  # fmt: skip


def _summarize(totals: Mapping[str, float], record: Mapping[str, float]) -> dict[str, float]:
    """Return the run's summary so far: the best accuracies and losses, else the last values."""
    best = {"top": max, "loss": min}
    merged = dict(record)
    for name, value in totals.items():
        for mark, choose in best.items():
            if mark in name.rpartition(".")[2] and name in record:
                merged[name] = choose(value, record[name])
    return merged
