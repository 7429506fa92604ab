"""Loops we did not write: closures, nested steps, copies, compiled steps, torch's own helpers."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, Optimizer
from torch.optim.swa_utils import AveragedModel

import sparse
from tests.sparse.nets import METHODS, assert_inactive_zero, backward, convnet, images, make, sgd
from tests.sparse.nets import train as train_plainly
from tests.sparse.test_checkpoints import assert_identical

Step = Callable[[nn.Module, Optimizer, int], object]


def with_none(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    optimizer.zero_grad()
    backward(model, images(step))
    optimizer.step(None)


def with_closure(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    calls = []

    def closure() -> torch.Tensor:
        calls.append(step)
        optimizer.zero_grad()
        return backward(model, images(step))

    loss = optimizer.step(closure) if step % 2 else optimizer.step(closure=closure)
    assert isinstance(loss, torch.Tensor)
    assert calls == [step]


def run(
    method: str,
    step: Step,
    make_optimizer: Callable[..., Optimizer] = sgd,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Take 14 steps in a way, and give all that they left."""
    model = convnet().to(dtype)
    optimizer = make_optimizer(model)
    sparsifier = make(method, model, optimizer)
    for number in range(14):
        step(model, optimizer, number)
        assert_inactive_zero(sparsifier, model, optimizer)
    parts = (model, optimizer, sparsifier)
    return {type(part).__name__: copy.deepcopy(part.state_dict()) for part in parts}


def batch(model: nn.Module, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, labels = images(step)
    return inputs.to(next(model.parameters()).dtype), labels


def plainly(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    list(train_plainly(model, optimizer, range(step, step + 1), lambda s: batch(model, s)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [with_none, with_closure])
def test_every_way_of_stepping_is_the_plain_loop(method: str, step: Step) -> None:
    assert_identical(run(method, step), run(method, plainly))


class TwiceHooked(SGD):
    """Calls its parent's step, which torch hooks, too, once SGD was used anywhere."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [plainly, with_none, with_closure])
def test_a_step_that_calls_its_parents_counts_once(method: str, step: Step) -> None:
    def twice_hooked(model: nn.Module) -> Optimizer:
        return TwiceHooked(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)

    twice, once = run(method, step, twice_hooked), run(method, plainly)
    assert_identical(twice["Sparsifier"], once["Sparsifier"])
    assert_identical(twice["Sequential"], once["Sequential"])


def test_a_step_that_raises_leaves_the_next_one_whole() -> None:
    class Failing(TwiceHooked):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            if self.fails:
                raise OSError
            return None

    model = convnet()
    optimizer = Failing(model.parameters(), 0.1, momentum=0.9)
    sparsifier = make("rigl", model, optimizer)
    for step in range(9):
        optimizer.fails = step in (1, 2, 5)
        try:
            plainly(model, optimizer, step)
        except OSError:
            assert optimizer.fails
        assert_inactive_zero(sparsifier, model, optimizer)
    assert sparsifier.step == 6


class Extragradient(SGD):
    """Evaluates its closure twice."""

    def step(self, closure: Any = None) -> Any:
        closure()
        super().step()
        closure()
        return super().step()


def test_optimizers_that_evaluate_repeatedly_are_refused() -> None:
    model = convnet()
    optimizer = Extragradient(model.parameters(), 0.1)
    make("static", model, optimizer)
    with pytest.raises(ValueError, match="Extragradient evaluates its closure more than once"):
        with_closure(model, optimizer, 0)


class Ascending(SGD):
    """Evaluates its closure once, after it moved the weights along the gradients it found."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        moves = [(p, 0.1 * p.grad) for p in self.param_groups[0]["params"] if p.grad is not None]
        for parameter, move in moves:
            parameter += move
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        for parameter, move in moves:
            parameter -= move
        super().step()
        return loss


def test_optimizers_that_evaluate_elsewhere_are_refused() -> None:
    """The closure was called before the step, whose result would belong to other weights."""
    model = convnet()
    optimizer = Ascending(model.parameters(), 0.1)
    make("static", model, optimizer)
    backward(model, images(0))
    with pytest.raises(ValueError, match=r"Ascending evaluates its closure .* at other weights"):
        optimizer.step(lambda: backward(model, images(0)))


class SharpnessAware(Optimizer):
    """The published programs of SAM: a wrapper whose `step` may never be called."""

    def __init__(self, parameters: Any, base: Callable[..., Optimizer], **options: Any) -> None:
        super().__init__(parameters, options)
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for parameter in parameters:
            self.state[parameter]["old_p"] = parameter.clone()
            parameter += 0.05 * parameter.grad / norm
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data = self.state[parameter]["old_p"]
        self.base_optimizer.step()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


@pytest.mark.parametrize("in_two_steps", [True, False])
@pytest.mark.parametrize("method", ["static", "rigl", "set"])
def test_steps_in_two_parts_are_those_of_a_masked_network(method: str, in_two_steps: bool) -> None:
    """With the gradients of the ascent masked; beside it, for a fixed mask, a loop by hand."""
    model = convnet()
    optimizer = SharpnessAware(model.parameters(), SGD, lr=0.1, momentum=0.9)
    sparsifier = make(method, model, optimizer)
    assert sparsifier.masks["3.weight"].sum() == sparsifier.num_active["3.weight"] < 200
    plain = copy.deepcopy(model)
    beside = SharpnessAware(plain.parameters(), SGD, lr=0.1, momentum=0.9)
    for step in range(10):
        masks, weights = sparsifier.masks, sparse.prunable(model)
        backward(model, images(step))
        for name, mask in masks.items():
            weights[name].grad *= mask
        if in_two_steps:
            optimizer.first_step()
            backward(model, images(step))
            optimizer.second_step()
        else:
            optimizer.step(lambda step=step: backward(model, images(step)))
        optimizer.zero_grad()
        assert_inactive_zero(sparsifier, model, optimizer.base_optimizer)
        for part in (beside.first_step, beside.second_step):
            backward(plain, images(step))
            for name, weight in sparse.prunable(plain).items():
                weight.grad *= masks[name]
            part()
        beside.zero_grad()
    assert sparsifier.step == 10
    assert sparsifier.num_updates == (0 if method == "static" else 3)
    if method == "static":
        assert_identical(model.state_dict(), plain.state_dict())


def deep_copied(parts: Any) -> Any:
    return copy.deepcopy(parts)


def pickled(parts: Any) -> Any:
    return pickle.loads(pickle.dumps(parts))


def saved(parts: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(parts, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("copied", [deep_copied, pickled, saved])
def test_a_copy_trains_like_its_original(method: str, copied: Callable[[Any], Any]) -> None:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make(method, model, optimizer)
    list(train_plainly(model, optimizer, range(6)))
    twin = copied({"s": sparsifier, "m": model, "o": optimizer})
    ends = []
    for m, o, s in ((model, optimizer, sparsifier), (twin["m"], twin["o"], twin["s"])):
        list(train_plainly(m, o, range(6, 14)))
        assert_inactive_zero(s, m, o)
        m.load_state_dict(convnet(seed=3).state_dict())
        assert_inactive_zero(s, m, o)
        ends.append({"weights": m.state_dict(), "sparse": s.state_dict()})
    assert_identical(ends[0], ends[1])


def test_an_average_of_the_model_takes_no_sparsifier_along() -> None:
    model = convnet()
    sparsifier = make("static", model, sgd(model))
    average = AveragedModel(model)
    dense = convnet(seed=1)
    average.module.load_state_dict(dense.state_dict())
    assert torch.equal(average.module[7].weight, dense[7].weight)
    assert len(pickle.dumps(average)) < 2 * len(pickle.dumps(dense))
    sparsifier.metrics()


def test_a_second_sparsifier_is_refused_before_it_changes_anything() -> None:
    model = convnet()
    optimizer = sgd(model)
    first = make("rigl", model, optimizer)
    weights = copy.deepcopy(model.state_dict())
    for hooks in (True, False):
        with pytest.raises(ValueError, match="this SGD has a sparsifier already"):
            make("rigl", model, optimizer, seed=1, hooks=hooks)
    assert_identical(model.state_dict(), weights)
    first.remove()
    second = make("rigl", model, optimizer, seed=1)
    list(train_plainly(model, optimizer, range(6)))
    assert (first.step, second.step) == (0, 6)
    assert_inactive_zero(second, model, optimizer)


def test_a_newer_optimizer_takes_the_model_over() -> None:
    model = convnet()
    make("static", model, sgd(model), seed=1)
    optimizer = sgd(model)
    sparsifier = make("static", model, optimizer, seed=2)
    model.load_state_dict(convnet(seed=1).state_dict())
    assert sparsifier.num_active["7.weight"] == int(model[7].weight.count_nonzero())


def test_calls_by_hand_beside_the_hooks_are_refused() -> None:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make("rigl", model, optimizer)
    for call in (sparsifier.before_step, sparsifier.after_step):
        with pytest.raises(RuntimeError, match="hooks=False"):
            call()
    list(train_plainly(model, optimizer, range(3)))
    assert sparsifier.step == 3
    sparsifier.remove()
    sparsifier.before_step()


def assert_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Compare two runs: a compiled step may round otherwise, masks and counts are the same."""
    assert_identical(one["Sparsifier"], other["Sparsifier"])
    torch.testing.assert_close(one["Sequential"], other["Sequential"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [SGD, TwiceHooked])
@pytest.mark.parametrize("method", ["rigl", "set", "snip"])
def test_a_compiled_optimizer_step(method: str, kind: type[Optimizer]) -> None:
    def build(model: nn.Module) -> Optimizer:
        return kind(model.parameters(), lr=0.1)

    compiled: dict[int, Any] = {}

    def compiled_step(model: nn.Module, optimizer: Optimizer, step: int) -> None:
        if id(optimizer) not in compiled:
            torch._dynamo.reset()
            compiled[id(optimizer)] = torch.compile(optimizer.step, backend="eager")
        optimizer.zero_grad()
        backward(model, batch(model, step))
        compiled[id(optimizer)]()

    assert_close(
        run(method, compiled_step, build, torch.float64), run(method, plainly, build, torch.float64)
    )


def test_a_compiled_training_step() -> None:
    def whole(
        model: nn.Module, optimizer: Optimizer, inputs: torch.Tensor, labels: torch.Tensor
    ) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    torch._dynamo.reset()
    compiled = torch.compile(whole, backend="eager", dynamic=False)

    def compiled_step(model: nn.Module, optimizer: Optimizer, step: int) -> None:
        compiled(model, optimizer, *batch(model, step))

    assert_close(
        run("rigl", compiled_step, dtype=torch.float64), run("rigl", plainly, dtype=torch.float64)
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer_of", [sgd, lambda m: torch.optim.AdamW(m.parameters(), 0.01)])
def test_torch_may_make_the_optimizer_create_its_state(
    method: str, optimizer_of: Callable[[nn.Module], Optimizer]
) -> None:
    def new_run() -> tuple[nn.Module, Optimizer, sparse.Sparsifier]:
        model = convnet()
        optimizer = optimizer_of(model)
        return model, optimizer, make(method, model, optimizer)

    model, optimizer, sparsifier = new_run()
    masks = sparsifier.masks
    get_optimizer_state_dict(model, optimizer)
    assert (sparsifier.step, sparsifier.num_updates) == (0, 0)
    assert all(torch.equal(mask, masks[name]) for name, mask in sparsifier.masks.items())

    model, optimizer, sparsifier = new_run()
    list(train_plainly(model, optimizer, range(6)))
    kept = copy.deepcopy(
        (model.state_dict(), get_optimizer_state_dict(model, optimizer), sparsifier.state_dict())
    )
    list(train_plainly(model, optimizer, range(6, 14)))
    for first in ("sparsifier", "optimizer"):
        other, other_optimizer, resumed = new_run()
        if first == "sparsifier":
            resumed.load_state_dict(kept[2])
        set_optimizer_state_dict(other, other_optimizer, copy.deepcopy(kept[1]))
        other.load_state_dict(kept[0])
        if first == "optimizer":
            resumed.load_state_dict(kept[2])
        list(train_plainly(other, other_optimizer, range(6, 14)))
        assert_identical(other.state_dict(), model.state_dict())
        assert_identical(resumed.state_dict(), sparsifier.state_dict())


def test_a_warm_up_from_zero_counts_its_first_step() -> None:
    model = convnet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    sparsifier = make("rigl", model, optimizer)
    list(train_plainly(model, optimizer, range(1)))
    assert (sparsifier.step, sparsifier.num_updates) == (1, 1)


@pytest.mark.parametrize("method", ["snip", "snip_global"])
def test_snip_refuses_a_layer_without_any_gradient(method: str) -> None:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make(method, model, optimizer)
    backward(model, images(0))
    model[7].weight.grad.zero_()
    with pytest.raises(RuntimeError, match=r"ranks 7\.weight by a gradient that is 0 everywhere"):
        optimizer.step()
    assert (sparsifier.step, sparsifier.num_updates) == (0, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["snip", "snip_global"])
def test_snip_refuses_gradients_that_are_not_finite(method: str, value: float) -> None:
    """They would decide for the whole run; a step that is left out changes nothing."""
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make(method, model, optimizer)
    backward(model, images(0))
    model[7].weight.grad[0, :3] = value
    with pytest.raises(RuntimeError, match=r"7\.weight by a gradient .* NaN in 3 places"):
        optimizer.step()
    assert sparsifier.num_updates == 0
    list(train_plainly(model, optimizer, range(2)))
    assert_inactive_zero(sparsifier, model, optimizer)
    assert sparsifier.num_updates == 1


def test_something_else_than_an_optimizer_is_refused() -> None:
    model = convnet()
    with pytest.raises(ValueError, match=r"Identity is no torch\.optim\.Optimizer with hooks"):
        make("static", model, nn.Identity())
