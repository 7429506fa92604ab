"""Inactive is exactly 0: what else writes to weights or state is masked again, or named."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import timm.optim
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import sparse
from tests.sparse.nets import METHODS, assert_inactive_zero, convnet, images, make, sgd, train
from tests.sparse.test_checkpoints import assert_identical


def written_by_hand(model: nn.Module, optimizer: Optimizer, index: int) -> None:
    with torch.no_grad():
        model[index].weight += 1


def reset(model: nn.Module, optimizer: Optimizer, index: int) -> None:
    model[index].reset_parameters()


def momentum_by_hand(model: nn.Module, optimizer: Optimizer, index: int) -> None:
    optimizer.state[model[index].weight]["momentum_buffer"].fill_(1.0)


WRITES = [written_by_hand, reset, momentum_by_hand]


@pytest.mark.parametrize("method", ["static", "rigl", "set", "snfs", "gmp"])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_found_by_the_next_question(
    method: str, write: Callable[[nn.Module, Optimizer, int], None]
) -> None:
    for ask in (sparse.Sparsifier.metrics, sparse.Sparsifier.state_dict):
        model = convnet()
        optimizer = sgd(model)
        sparsifier = make(method, model, optimizer)
        list(train(model, optimizer, range(8)))
        ask(sparsifier)
        inactive = int((~sparsifier.masks["7.weight"]).sum())
        write(model, optimizer, 7)
        with pytest.raises(RuntimeError, match=rf"7\.weight is not 0 at {inactive} inactive"):
            ask(sparsifier)
        sparsifier.enforce()
        ask(sparsifier)
        assert_inactive_zero(sparsifier, model, optimizer)


@pytest.mark.parametrize("method", ["rigl", "set", "snfs", "gmp"])
def test_a_write_is_found_by_the_next_update(method: str) -> None:
    model = convnet()
    optimizer = sgd(model)
    make(method, model, optimizer)
    list(train(model, optimizer, range(7)))
    written_by_hand(model, optimizer, 3)
    with pytest.raises(RuntimeError, match=r"3\.weight is not 0 at \d+ inactive connections"):
        list(train(model, optimizer, range(7, 18)))


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
def test_optimizers_that_revive_weights_are_named() -> None:
    model = convnet()
    optimizer = timm.optim.create_optimizer_v2(model, "kron", lr=0.01)  # it mixes rows and columns
    sparsifier = make("static", model, optimizer)
    with torch.compiler.set_stance("force_eager"):  # timm compiles Kron, which takes a minute
        list(train(model, optimizer, range(2)))
    with pytest.raises(RuntimeError, match="or Kron moves weights whose gradient is 0"):
        sparsifier.metrics()


@pytest.mark.parametrize(
    "name", "sgd adamw adamax nadamw rmsprop lion lamb lars madgrad adan adopt laprop rprop".split()
)
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_optimizers_of_timm_raise_no_false_alarm(name: str, method: str) -> None:
    model = convnet()
    if name == "rprop":
        optimizer: Optimizer = torch.optim.Rprop(model.parameters())
    else:
        optimizer = timm.optim.create_optimizer_v2(model, name, lr=1e-3, momentum=0.9)
    sparsifier = make(method, model, optimizer)
    for _ in train(model, optimizer, range(10)):
        sparsifier.metrics()
    weights = sparse.prunable(model)
    assert not any(weights[name][~mask].any() for name, mask in sparsifier.masks.items())


@pytest.mark.parametrize(
    "method", [n for n in METHODS if "magnitude" not in n]
)  # chosen by weights
def test_a_dense_network_loaded_after_attaching_trains_sparse(method: str) -> None:
    """Equal to loading it before attaching, whatever part of the model loads it."""
    states = []
    for order in ("before", "after", "by layer"):
        model, dense = convnet(), convnet(seed=1)
        optimizer = sgd(model)
        if order == "before":
            model.load_state_dict(dense.state_dict())
        sparsifier = make(method, model, optimizer)
        if order == "after":
            nn.Sequential(model).load_state_dict(nn.Sequential(dense).state_dict())
        if order == "by layer":
            for layer, other in zip(model, dense, strict=True):
                layer.load_state_dict(other.state_dict())
        sparsifier.metrics()
        list(train(model, optimizer, range(10)))
        assert_inactive_zero(sparsifier, model, optimizer)
        states.append(copy.deepcopy(model.state_dict()))
    assert_identical(states[0], states[1])
    assert_identical(states[0], states[2])


def test_dense_optimizer_state_loaded_after_attaching_is_masked() -> None:
    dense = convnet()
    teacher = sgd(dense)
    list(train(dense, teacher, range(3)))
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make("static", model, optimizer)
    optimizer.load_state_dict(teacher.state_dict())
    assert_inactive_zero(sparsifier, model, optimizer)
    masks = sparsifier.masks
    for name, weight in sparse.prunable(model).items():
        loaded = teacher.state[sparse.prunable(dense)[name]]["momentum_buffer"]
        assert torch.equal(optimizer.state[weight]["momentum_buffer"], loaded * masks[name])


@pytest.mark.parametrize("order", [*itertools.permutations(("model", "optimizer", "sparse"))])
@pytest.mark.parametrize("method", ["rigl", "snip", "snfs"])
def test_states_are_loaded_in_any_order(method: str, order: tuple[str, ...]) -> None:
    model = convnet()
    optimizer = sgd(model)
    run: dict[str, Any] = {"model": model, "optimizer": optimizer}
    run["sparse"] = make(method, model, optimizer)
    list(train(model, optimizer, range(6)))
    saved = copy.deepcopy({name: part.state_dict() for name, part in run.items()})
    list(train(model, optimizer, range(6, 14)))
    model = convnet(seed=2)
    optimizer = sgd(model)
    other: dict[str, Any] = {"model": model, "optimizer": optimizer}
    other["sparse"] = make(method, model, optimizer, **({} if method == "snip" else {"seed": 5}))
    for name in order:
        other[name].load_state_dict(saved[name])
    list(train(model, optimizer, range(6, 14)))
    assert_identical(model.state_dict(), run["model"].state_dict())
    assert_identical(optimizer.state_dict(), run["optimizer"].state_dict())


def test_a_head_written_between_two_loads_survives() -> None:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make("static", model, optimizer)
    saved = copy.deepcopy((model.state_dict(), sparsifier.state_dict()))
    model.load_state_dict(saved[0])
    with torch.no_grad():
        model[9].weight.fill_(3.0)
    sparsifier.load_state_dict(saved[1])
    assert torch.equal(model[9].weight, sparsifier.masks["9.weight"] * 3.0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "layouts", [("contiguous", "channels_last"), ("channels_last", "contiguous")]
)
def test_state_of_another_layout_is_laid_out_like_its_weight(
    layouts: tuple[str, str], fused: bool
) -> None:
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    ends = []
    for first, second in (layouts, layouts[1:] * 2):
        model = convnet().to(memory_format=formats[first])
        optimizer = sgd(model, fused=fused)
        sparsifier = make("snfs", model, optimizer)
        list(train(model, optimizer, range(6)))
        saved = [part.state_dict() for part in (model, optimizer, sparsifier)]
        model = convnet().to(memory_format=formats[second])
        optimizer = sgd(model, fused=fused)
        sparsifier = make("snfs", model, optimizer)
        for part, state in zip((model, optimizer, sparsifier), saved, strict=True):
            part.load_state_dict(state)
        list(train(model, optimizer, range(6, 14)))
        ends.append((model.state_dict(), optimizer.state_dict()["state"], sparsifier.masks))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)


def test_a_replaced_parameter_is_named() -> None:
    model = convnet()
    sparsifier = make("static", model, sgd(model))
    model.load_state_dict(convnet(seed=1).state_dict(), assign=True)
    with pytest.raises(RuntimeError, match=r"0\.weight was replaced by another tensor"):
        sparsifier.metrics()


@pytest.mark.parametrize("method", ["static", "rigl", "gmp"])
def test_a_replaced_module_is_named(method: str) -> None:
    """A new head would train dense while the old one is reported."""
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make(method, model, optimizer)
    list(train(model, optimizer, range(3)))
    model[9] = nn.Linear(20, 4)
    optimizer.add_param_group({"params": model[9].parameters()})
    for ask in (sparsifier.metrics, sparsifier.state_dict):
        with pytest.raises(RuntimeError, match=r"9\.weight is no longer in the model"):
            ask()
    if method != "static":
        with pytest.raises(RuntimeError, match=r"9\.weight is no longer in the model"):
            list(train(model, optimizer, range(3, 18)))


def test_a_wrapped_module_keeps_its_mask() -> None:
    """As adapters do, which leave the weight in the model under another name."""
    model = nn.Sequential(convnet(), nn.Identity())
    optimizer = sgd(model)
    sparsifier = make("rigl", model, optimizer)
    list(train(model, optimizer, range(3)))
    weight, model[0][9] = model[0][9].weight, nn.Sequential(model[0][9], nn.Identity())
    list(train(model, optimizer, range(3, 14)))
    assert sparsifier.num_updates == 4
    assert not weight.detach()[~sparsifier.masks["0.9.weight"]].any()


class EightBits(torch.optim.Optimizer):
    """Keeps its momentum in codes of 8 bits, of which 128 means 0."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            codes = state.setdefault("exp_avg", torch.full_like(parameter, 128, dtype=torch.uint8))
            momentum = (codes.float() - 128) / 127 * state.setdefault("scale", 1.0) * 0.9
            momentum += parameter.grad
            state["scale"] = momentum.abs().max()
            state["exp_avg"] = (momentum / state["scale"] * 127 + 128).round().to(torch.uint8)
            parameter -= 0.1 * momentum


@pytest.mark.parametrize("method", ["static", "rigl", "set"])
def test_state_in_codes_is_refused(method: str) -> None:
    model = convnet()
    optimizer = EightBits(model.parameters())
    sparsifier = make(method, model, optimizer)

    def train_and_ask() -> None:
        for _ in train(model, optimizer, range(9)):
            sparsifier.metrics()

    with pytest.raises(ValueError, match=r"EightBits keeps its exp_avg in 8 bits \(torch\.uint8\)"):
        train_and_ask()


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p, **kw: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3, **kw),
    "adamw": lambda p, **kw: torch.optim.AdamW(p, 1e-3, **kw),
    "adagrad": lambda p, **kw: torch.optim.Adagrad(p, 1e-3, **kw),
}


@pytest.mark.parametrize("converted", ["before attaching", "before training", "while training"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", ["static", "rigl", "set"])
def test_a_change_of_memory_format_changes_no_result(
    method: str, name: str, converted: str
) -> None:
    """Fused optimizers read weight and state in the order of memory, which the weight changed."""
    ends = []
    for fused in (True, False):
        model = convnet().double()
        optimizer = OPTIMIZERS[name](model.parameters(), fused=fused, foreach=False)

        def convert(now: str, fused: bool = fused, model: nn.Module = model) -> None:
            if fused and now == converted:
                model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

        convert("before attaching")
        sparsifier = make(method, model, optimizer)
        convert("before training")
        for step in range(14):
            if step == 6:
                convert("while training")
            optimizer.zero_grad()
            inputs, labels = images(step)
            nn.functional.cross_entropy(model(inputs.double()), labels).backward()
            optimizer.step()
            assert_inactive_zero(sparsifier, model, optimizer)
        ends.append((list(model.parameters()), sparsifier.masks))
    torch.testing.assert_close(ends[0], ends[1])


def test_questions_change_nothing() -> None:
    model = convnet()
    optimizer = sgd(model)
    sparsifier = make("snfs", model, optimizer)
    list(train(model, optimizer, range(5)))
    before: tuple[Tensor, ...] = tuple(p.clone() for p in model.parameters())
    state = sparsifier.state_dict()
    assert sparsifier.step == 5
    sparsifier.metrics()
    assert_identical(sparsifier.state_dict(), state)
    assert all(torch.equal(x, y) for x, y in zip(before, model.parameters(), strict=True))
