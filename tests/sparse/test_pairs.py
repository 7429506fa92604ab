"""Features in combination: every three of them, with every method, on one process and on two.

None of the features changes what a run computes, so that every combination must end where the plain
run ends: with the same masks, and with the same weights up to the rounding of float64.

Left out: `closure` with `overflow`, because torch's GradScaler refuses closures; `layout` without
`resume`, because a run changes its layout by being resumed; `compression` on one process, which
sends nothing.
"""

import copy
import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparse
from tests.sparse.nets import assert_inactive_zero, images, make, sgd
from tests.sparse.ranks import run

FEATURES = (
    "question",  # state_dict and metrics on one rank alone
    "resume",  # saved by rank 0 after step 5, loaded into new objects
    "layout",  # ... in the other memory format
    "overflow",  # a step that a GradScaler skips, at an update and elsewhere
    "compression",  # only gradients of active weights are sent
    "accumulation",  # two micro-batches per step
    "average",  # an EMA of the weights
    "compile",  # the model is compiled
    "closure",  # gradients are computed inside of optimizer.step
    "frozen",  # one layer is frozen from step 2 to step 7
)
METHODS = ("rigl", "set", "snfs", "snip", "gmp", "acdc", "granet", "srigl", "gap")
STEPS = 12


@dataclass(frozen=True)
class Case:
    """A combination."""

    method: str
    num_ranks: int
    features: frozenset[str]

    @property
    def settings(self) -> set[tuple[str, object]]:
        """Name every choice that was made, also the choice to leave a feature out."""
        chosen = {(feature, feature in self.features) for feature in FEATURES}
        return chosen | {("method", self.method), ("num_ranks", self.num_ranks)}

    @property
    def is_possible(self) -> bool:
        """Say whether the combination exists."""
        return not (
            {"closure", "overflow"} <= self.features
            or ("layout" in self.features and "resume" not in self.features)
            or ("compression" in self.features and self.num_ranks == 1)
        )


def covering_cases() -> list[Case]:
    """Choose cases such that every possible combination of three choices is in one of them."""
    generator = random.Random(0)

    def draw() -> Case:
        features = frozenset(name for name in FEATURES if generator.random() < 0.5)
        return Case(generator.choice(METHODS), generator.choice((1, 2)), features)

    candidates = [case for case in (draw() for _ in range(4000)) if case.is_possible]
    covered = {
        case: set(itertools.combinations(sorted(case.settings, key=str), 3)) for case in candidates
    }
    missing = set().union(*covered.values())
    chosen = []
    while missing:
        best = max(generator.sample(candidates, 200), key=lambda case: len(covered[case] & missing))
        if covered[best] & missing:
            chosen.append(best)
            missing -= covered[best]
    return chosen


CASES = covering_cases()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(216, 10),
        nn.Tanh(),
        nn.Linear(10, 4),
    ).double()


class Training:
    """One run of a case, on one of its ranks."""

    def __init__(self, case: Case, rank: int) -> None:
        self.case, self.rank, self.step = case, rank, 0
        self.generator = random.Random(f"{case.method} {sorted(case.features)} {rank}")
        self.build(torch.contiguous_format)

    def has(self, feature: str) -> bool:
        return feature in self.case.features

    def build(self, layout: torch.memory_format) -> None:
        self.model = network().to(memory_format=layout)
        self.optimizer = sgd(self.model, fused=True)
        self.sparsifier = make(self.case.method, self.model, self.optimizer)
        self.forward: Any = self.model
        if self.case.num_ranks > 1:
            frozen = self.has("frozen")  # after the wrapper was made, which has to be told
            self.forward = DistributedDataParallel(self.model, find_unused_parameters=frozen)
        if self.has("compression"):
            sparse.compress_gradients(self.forward, self.sparsifier)
        if self.has("compile"):
            self.forward = torch.compile(self.forward, backend="eager")
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=1024.0, growth_interval=1000, enabled=self.has("overflow")
        )
        decay = get_ema_multi_avg_fn(0.5)
        self.average = AveragedModel(self.model, multi_avg_fn=decay)

    @property
    def parts(self) -> dict[str, Any]:
        names = ("model", "optimizer", "sparsifier", "scaler", "average")
        return {name: getattr(self, name) for name in names}

    def backward(self, factor: float = 1.0) -> Tensor:
        self.optimizer.zero_grad()
        inputs, labels = images(self.step)
        micro_batches = 2 if self.has("accumulation") else 1
        ranks = self.case.num_ranks
        total = torch.zeros((), dtype=torch.float64)
        for x, y in zip(inputs.chunk(micro_batches), labels.chunk(micro_batches), strict=True):
            share = x[self.rank :: ranks].double() * factor, y[self.rank :: ranks]
            # 3 or 6 images of 2 ranks do not always divide evenly: weigh them by their number.
            loss = F.cross_entropy(self.forward(share[0]), share[1], reduction="sum")
            loss = loss * ranks / len(inputs)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def advance(self) -> None:
        if self.has("frozen") and self.step in (2, 7):
            self.model[2].weight.requires_grad_(self.step == 7)
        if self.has("closure"):
            self.optimizer.step(self.backward)
        else:
            if self.has("overflow") and self.step in (3, 4, 8):
                self.backward(float("inf"))
                self.scaler.step(self.optimizer)
                self.scaler.update()
            self.backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.step += 1
        if self.has("average"):
            self.average.update_parameters(self.model)
            self.sparsifier.apply_to(self.average)
        if self.has("question") and self.generator.random() < 0.5:
            self.sparsifier.metrics()
            self.sparsifier.state_dict()
        assert_inactive_zero(self.sparsifier, self.model, self.optimizer)

    def resume(self) -> None:
        states = [
            {n: part.state_dict() for n, part in self.parts.items()} if self.rank == 0 else {}
        ]
        states = copy.deepcopy(states)
        if self.case.num_ranks > 1:
            distributed.broadcast_object_list(states)
        self.build(torch.channels_last if self.has("layout") else torch.contiguous_format)
        names = list(self.parts)
        self.generator.shuffle(names)
        for name in names:
            self.parts[name].load_state_dict(states[0][name])
        self.model[2].weight.requires_grad_(not (self.has("frozen") and 2 < self.step < 7))

    def run(self) -> dict[str, Tensor]:
        while self.step < STEPS:
            self.advance()
            if self.step == 5 and self.has("resume"):
                self.resume()
        if self.has("average"):
            assert_inactive_zero(self.sparsifier, self.average.module, self.optimizer)
        weights = {name: value.detach() for name, value in self.model.named_parameters()}
        return weights | {f"mask of {name}": mask for name, mask in self.sparsifier.masks.items()}


def check(case: Case, found: dict[str, Tensor]) -> None:
    """Compare with the run without any feature but that a layer is frozen, which changes it."""
    plain = Training(Case(case.method, 1, case.features & {"frozen"}), 0).run()
    for name, value in plain.items():
        if name.startswith("mask"):
            assert torch.equal(value, found[name]), (case, name)
        else:
            torch.testing.assert_close(
                value, found[name], rtol=1e-9, atol=1e-12, msg=f"{case} {name}"
            )


def test_every_three_choices_meet() -> None:
    """Count again, the slow way, that nothing possible was left out."""
    seen = [case.settings for case in CASES]
    for first, second in itertools.combinations(FEATURES, 2):
        for method in METHODS:
            wanted = {(first, True), (second, True), ("method", method)}
            possible = {first, second} != {"closure", "overflow"}
            assert possible == any(wanted <= settings for settings in seen), wanted


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.num_ranks == 1],
    ids=lambda case: "-".join([case.method, *sorted(case.features)]),
)
def test_one_process(case: Case) -> None:
    check(case, Training(case, 0).run())


@pytest.mark.slow
@given(method=st.sampled_from(METHODS), features=st.frozensets(st.sampled_from(FEATURES)))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_combination_in_one_process(method: str, features: frozenset[str]) -> None:
    case = Case(method, 1, features)
    assume(case.is_possible)
    check(case, Training(case, 0).run())


def run_cases(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    return [Training(case, rank).run() for case in CASES if case.num_ranks == world_size]


@pytest.mark.distributed
def test_two_processes(tmp_path: Path) -> None:
    cases = [case for case in CASES if case.num_ranks == 2]
    for results in run(2, run_cases, tmp_path):
        for case, found in zip(cases, results, strict=True):
            check(case, found)
