"""Transformers' Trainer with the callback: what a plain loop gives, through checkpoints as well."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments

import sparse
from sparse.integrations.transformers import FILE, SparseCallback
from tests.sparse.nets import METHODS, assert_inactive_zero, make, sgd
from tests.sparse.test_checkpoints import assert_identical

STEPS = 12


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


def bert(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, **options,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(0, 32, (8,), generator=generator),
            "labels": torch.tensor(n % 3),
        }
        for n in range(4 * STEPS)
    ]


def trainer_of(
    callback: SparseCallback, folder: Path, model: nn.Module | None = None, **options: Any
) -> transformers.Trainer:
    callbacks = [callback, *options.pop("callbacks", [])]
    given: dict[str, Any] = {
        "use_cpu": True, "per_device_train_batch_size": 4, "max_steps": STEPS, "report_to": [],
        "save_strategy": "steps", "save_steps": 5, "logging_steps": 3, "disable_tqdm": True,
        "learning_rate": 0.01, "seed": 0,
    }  # fmt: skip
    data = options.pop("rows", rows())
    arguments = TrainingArguments(output_dir=str(folder), **(given | options))
    return transformers.Trainer(
        model or bert(), arguments, train_dataset=data, eval_dataset=data[:8], callbacks=callbacks
    )


def callback_of(method: str) -> SparseCallback:
    factory, settings = METHODS[method]
    return SparseCallback(factory.__name__, **({"sparsity": 0.8} | settings))


def train(callback: SparseCallback, folder: Path, *, resumed: Any = None, **options: Any) -> Any:
    trainer = trainer_of(callback, folder, **options)
    trainer.train(resume_from_checkpoint=resumed)
    return trainer


def ends(trainer: Any, callback: SparseCallback) -> dict[str, Any]:
    assert callback.sparsifier is not None
    assert_inactive_zero(callback.sparsifier, trainer.model, trainer.optimizer.optimizer)
    state = trainer.optimizer.state_dict()["state"]
    return {
        "weights": trainer.model.state_dict(),
        "optimizer": {str(index): values for index, values in state.items()},
        "sparse": callback.sparsifier.state_dict(),
    }


@pytest.mark.parametrize("method", ["rigl", "gmp"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(method: str, tmp_path: Path) -> None:
    first, second = callback_of(method), callback_of(method)
    whole = ends(train(first, tmp_path), first)
    assert (tmp_path / "checkpoint-5" / FILE).is_file()
    resumed = train(second, tmp_path, resumed=str(tmp_path / "checkpoint-5"), model=bert(seed=1))
    assert_identical(ends(resumed, second), whole)


def test_it_trains_as_a_plain_loop(tmp_path: Path) -> None:
    model, callback = bert(), callback_of("rigl")
    optimizer = sgd(model)
    trainer = trainer_of(
        callback, tmp_path, model, max_grad_norm=0.0, train_sampling_strategy="sequential"
    )
    trainer.optimizer, trainer.lr_scheduler = optimizer, LambdaLR(optimizer, lambda step: 1.0)
    trainer.train()

    plain, data = bert(), rows()
    optimizer = sgd(plain)
    sparsifier = make("rigl", plain, optimizer)
    for first in range(0, len(data), 4):
        batch = {
            name: torch.stack([row[name] for row in data[first : first + 4]]) for name in data[0]
        }
        plain(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_identical(model.state_dict(), plain.state_dict())
    assert_identical(callback.sparsifier.state_dict(), sparsifier.state_dict())


def test_steps_are_those_of_the_optimizer(tmp_path: Path) -> None:
    callback = SparseCallback("set", sparsity=0.8, delta_t=2)
    train(callback, tmp_path, gradient_accumulation_steps=3, rows=rows() * 3)
    assert callback.sparsifier.step == STEPS
    assert callback.sparsifier.method.t_end == int(0.75 * STEPS)


def test_the_best_model_is_loaded_whole(tmp_path: Path) -> None:
    """Its masks are not those of the last step."""

    class Worse(TrainerCallback):
        """Lets the first evaluation be the best one."""

        def on_evaluate(
            self, args: Any, state: Any, control: Any, *, metrics: Any, **_: Any
        ) -> None:
            metrics["eval_loss"] = float(state.global_step)

    callback = SparseCallback("set", sparsity=0.8, delta_t=1, t_end=STEPS)
    trainer = train(
        callback, tmp_path, callbacks=[Worse()], save_steps=4, eval_steps=4, eval_strategy="steps",
        load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    best = tmp_path / "checkpoint-4"
    assert trainer.state.best_model_checkpoint == str(best)
    assert_identical(
        trainer.model.state_dict(), type(trainer.model).from_pretrained(best).state_dict()
    )
    assert callback.sparsifier.state_dict()["step"] == 4
    trainer.train()  # goes on from it, and again its first evaluation is the best
    assert callback.sparsifier.state_dict()["step"] == 4 + 4


def test_only_checkpoints_of_the_run_are_continued(tmp_path: Path) -> None:
    train(callback_of("rigl"), tmp_path / "one")
    train(callback_of("rigl"), tmp_path / "other", model=bert(seed=1), seed=1)
    other = str(tmp_path / "other" / "checkpoint-5")
    with pytest.raises(ValueError, match="is not 0 where its mask is inactive; the model does not"):
        train(callback_of("rigl"), tmp_path / "one", resumed=other)
    with pytest.raises(
        ValueError, match=r"new/checkpoint-5/sparsifier.pt is missing: .* elsewhere, pass"
    ):
        train(callback_of("rigl"), tmp_path / "new", resumed=other)
    moved = {"resumed": other, "resume_from_checkpoint": other}
    assert train(callback_of("rigl"), tmp_path / "new", **moved).state.global_step == STEPS


def test_what_of_gpt2_and_bert_is_prunable() -> None:
    """The blocks of GPT-2 are made of Conv1D, which is no linear layer of torch."""
    assert list(sparse.prunable(gpt2(tie_word_embeddings=False))) == ["lm_head.weight"]
    with pytest.raises(ValueError, match="no convolution or linear layer to make sparse; to make"):
        sparse.prunable(gpt2())
    layers = [name for name, module in bert().named_modules() if isinstance(module, nn.Linear)]
    assert list(sparse.prunable(bert())) == [f"{name}.weight" for name in layers]


def test_gpt2_trains_and_resumes_with_sparse_blocks(tmp_path: Path) -> None:
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows()]
    first, second = (
        SparseCallback("rigl", sparsity=0.8, include=["transformer.h.*"], delta_t=2)
        for _ in range(2)
    )
    whole = ends(train(first, tmp_path, model=gpt2(), rows=data), first)
    path = str(tmp_path / "checkpoint-5")
    resumed = train(second, tmp_path, resumed=path, model=gpt2(), rows=data)
    assert_identical(ends(resumed, second), whole)
    names = "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj".split()
    assert list(second.sparsifier.num_active) == [f"transformer.h.0.{n}.weight" for n in names]
    assert 0.79 < second.sparsifier.metrics()["sparsity"] < 0.81


def test_records_have_the_sparsity(tmp_path: Path) -> None:
    class Reporter(TrainerCallback):
        """Sees what reporters see that come after the callback."""

        def __init__(self) -> None:
            self.found: list[dict[str, float]] = []

        def on_log(self, args: Any, state: Any, control: Any, *, logs: Any, **_: Any) -> None:
            self.found.append(dict(logs))

    reporter = Reporter()
    trainer = train(callback_of("rigl"), tmp_path, callbacks=[reporter])
    for records in (trainer.state.log_history, reporter.found):
        found = [record["sparse/sparsity"] for record in records if "loss" in record]
        assert len(found) == STEPS // 3
        assert all(0.79 < value < 0.81 for value in found)
        assert all("sparse/dropped" in record for record in records if "loss" in record)


def test_settings_in_steps_follow_from_the_length_of_training(tmp_path: Path) -> None:
    options: dict[str, Any] = {"partitions": ["*encoder*", "*pooler*,*classifier*"]}
    callback = SparseCallback("gap", sparsity=0.8, phase_epochs=0.25, num_phases=2, **options)
    train(callback, tmp_path / "gap")
    assert callback.sparsifier.method.phase == round(0.25 * STEPS)
    callback = SparseCallback("granet", sparsity=0.8)
    train(callback, tmp_path / "granet")
    granet = callback.sparsifier.method
    assert (granet.prune_end, granet.t_end) == (int(0.3 * STEPS), STEPS)
