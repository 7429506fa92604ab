"""Parameter groups, optimizers, learning-rate schedules, averaged weights, MixUp, loss."""

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from image_classification.models import create_model
from image_classification.optim import LrSchedule, create_ema, create_loss, mixup
from image_classification.optimizers import create_optimizer, parameter_groups

CPU = torch.device("cpu")


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, seed: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        images = torch.randn(8, 3, 6, 6, generator=generator)
        labels = torch.randint(5, (8,), generator=generator)
        create_loss()(model(images), labels).backward()
        optimizer.step()


class TestParameterGroups:
    def test_resnet50_decays_kernels_only(self) -> None:
        with torch.device("meta"):
            model = create_model("resnet50")
        decayed, undecayed = parameter_groups(model, weight_decay=1e-4, bn_weight_decay=False)
        assert decayed["weight_decay"] == 1e-4
        assert undecayed["weight_decay"] == 0
        assert len(decayed["params"]) == 54
        assert len(undecayed["params"]) == 107
        assert sum(p.numel() for p in decayed["params"]) == 25_502_912
        names = {parameter: name for name, parameter in model.named_parameters()}
        spared = {names[p] for p in undecayed["params"]}
        assert {"fc.bias", "bn1.weight", "layer1.0.downsample.1.weight"} <= spared
        assert all(p.ndim == 1 for p in undecayed["params"])

    def test_flag_adds_normalization_but_not_biases(self) -> None:
        with torch.device("meta"):
            model = create_model("resnet50")
        decayed, undecayed = parameter_groups(model, weight_decay=1e-4, bn_weight_decay=True)
        assert len(decayed["params"]) == 54 + 106
        assert [id(p) for p in undecayed["params"]] == [id(model.fc.bias)]

    def test_attention_biases_and_layer_norms_do_not_decay(self) -> None:
        with torch.device("meta"):
            model = create_model("vit_b_32")
        decayed, undecayed = parameter_groups(model, weight_decay=0.1, bn_weight_decay=False)
        assert all(p.ndim >= 2 for p in decayed["params"])
        assert all(p.ndim == 1 for p in undecayed["params"])

    def test_shared_once_frozen_never_empty_group_absent(self) -> None:
        first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        second.weight = first.weight
        frozen = nn.Linear(3, 3, bias=False)
        frozen.weight.requires_grad_(False)
        model = nn.Sequential(first, second, frozen)
        (group,) = parameter_groups(model, weight_decay=0.5, bn_weight_decay=False)
        assert [id(p) for p in group["params"]] == [id(first.weight)]

    def test_negative_decay_is_refused(self) -> None:
        with pytest.raises(ValueError, match="weight_decay must be at least 0, got -1"):
            parameter_groups(small_net(), weight_decay=-1, bn_weight_decay=False)


class TestOptimizer:
    def test_sgd_with_nesterov_by_hand(self) -> None:
        # d = g + 0.1 p; buffer = 0.5 buffer + d; p -= 0.1 (d + 0.5 buffer)
        p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        optimizer = create_optimizer(
            "sgd",
            [{"params": [p]}],
            lr=0.1,
            momentum=0.5,
            nesterov=True,
            weight_decay=0.1,
            device=CPU,
        )
        p.grad = torch.tensor([2.0], dtype=torch.float64)
        optimizer.step()  # d = 2.1, buffer = 2.1
        assert p.item() == pytest.approx(1 - 0.1 * (2.1 + 1.05), abs=1e-12)
        optimizer.step()  # p = 0.685, d = 2.0685, buffer = 3.1185
        assert p.item() == pytest.approx(0.685 - 0.1 * (2.0685 + 1.55925), abs=1e-12)

    @pytest.mark.parametrize("nesterov", [False, True])
    def test_sgd_equals_the_plain_implementation(self, nesterov: bool) -> None:
        torch.manual_seed(0)
        ours, plain = small_net(), small_net()
        plain.load_state_dict(ours.state_dict())
        groups = parameter_groups(ours, weight_decay=0.01, bn_weight_decay=False)
        optimizer = create_optimizer(
            "sgd", groups, lr=0.1, momentum=0.9, nesterov=nesterov, device=CPU
        )
        reference = torch.optim.SGD(
            parameter_groups(plain, weight_decay=0.01, bn_weight_decay=False),
            lr=0.1,
            momentum=0.9,
            nesterov=nesterov,
            foreach=False,
        )
        train(ours, optimizer, seed=1, steps=5)
        train(plain, reference, seed=1, steps=5)
        torch.testing.assert_close(ours.state_dict(), plain.state_dict())

    def test_overflow_of_the_first_step_leaves_no_trace(self) -> None:
        parameter = nn.Parameter(torch.ones(100_000))
        optimizer = create_optimizer(
            "sgd", [{"params": [parameter]}], lr=0.1, momentum=0.9, device=CPU
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for gradient in (math.inf, 1.0):
            scaler.scale(torch.zeros(()))
            parameter.grad = torch.full_like(parameter, gradient * scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2
        assert torch.equal(parameter, torch.full_like(parameter, 0.9))
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert torch.equal(momentum, torch.ones_like(parameter))

    def test_adamw_and_rmsprop_first_step_by_hand(self) -> None:
        p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        p.grad = torch.tensor([4.0], dtype=torch.float64)
        group = {"params": [p], "weight_decay": 0.1}
        create_optimizer("adamw", [group], lr=0.01, device=CPU).step()
        # decoupled decay 1 - 0.01 * 0.1, then a step of lr * g / (|g| + 1e-8)
        assert p.item() == pytest.approx(0.999 - 0.01, abs=1e-9)

        p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        p.grad = torch.tensor([4.0], dtype=torch.float64)
        create_optimizer(
            "rmsprop",
            [{"params": [p]}],
            lr=0.01,
            momentum=0.9,
            rmsprop_alpha=0.75,
            rmsprop_eps=1.0,
            device=CPU,
        ).step()
        # square average 0.25 * 16 = 4, step lr * 4 / (2 + 1)
        assert p.item() == pytest.approx(1 - 0.01 * 4 / 3, abs=1e-12)

    @pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
    def test_state_round_trip_continues_exactly(self, name: str, tmp_path: Path) -> None:
        def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
            groups = parameter_groups(model, weight_decay=0.01, bn_weight_decay=False)
            return create_optimizer(name, groups, lr=0.01, device=CPU)

        torch.manual_seed(0)
        straight = small_net()
        optimizer = optimizer_of(straight)
        train(straight, optimizer, seed=1, steps=3)
        torch.save((straight.state_dict(), optimizer.state_dict()), tmp_path / "state")
        train(straight, optimizer, seed=2, steps=3)

        resumed = small_net()
        restored = optimizer_of(resumed)
        weights, state = torch.load(tmp_path / "state", weights_only=True)
        resumed.load_state_dict(weights)
        restored.load_state_dict(state)
        train(resumed, restored, seed=2, steps=3)
        for key, value in straight.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), key

    def test_channels_last_and_meta_parameters(self) -> None:
        model = small_net().to(memory_format=torch.channels_last)
        groups = parameter_groups(model, weight_decay=0, bn_weight_decay=False)
        optimizer = create_optimizer("sgd", groups, lr=0.1, device=CPU)
        assert optimizer.state[model[0].weight]["momentum_buffer"].is_contiguous(
            memory_format=torch.channels_last
        )
        train(model, optimizer, seed=0, steps=1)

        with torch.device("meta"):
            model = small_net()
        groups = parameter_groups(model, weight_decay=0, bn_weight_decay=False)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        for name in ("sgd", "adamw", "rmsprop"):
            create_optimizer(name, groups, lr=0.1, device=torch.device("meta")).step()

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("lamb", {}, "unknown optimizer 'lamb'; known are sgd"),
            ("adamw", {"nesterov": True}, "Nesterov momentum has no effect on adamw"),
            ("sgd", {"nesterov": True, "momentum": 0.0}, "needs a momentum above 0"),
        ],
    )
    def test_bad_requests_are_refused(self, name: str, options: dict, message: str) -> None:
        groups = [{"params": [nn.Parameter(torch.ones(1))]}]
        with pytest.raises(ValueError, match=message) as caught:
            create_optimizer(name, groups, lr=0.1, device=CPU, **options)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("package", ["", "name = 'a web framework'\n"])
    def test_apex_sgd_without_nvidia_apex(
        self, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in [m for m in sys.modules if m.partition(".")[0] == "apex"]:
            monkeypatch.delitem(sys.modules, module)
        if package:  # the unrelated package of that name
            (tmp_path / "apex").mkdir()
            (tmp_path / "apex" / "__init__.py").write_text(package)
            monkeypatch.syspath_prepend(tmp_path)
        elif _has_nvidia_apex():
            pytest.skip("NVIDIA apex is installed")
        groups = [{"params": [nn.Parameter(torch.ones(1))]}]
        with pytest.raises(ValueError, match=r"apex-sgd needs NVIDIA apex .*; use sgd") as caught:
            create_optimizer("apex-sgd", groups, lr=0.1, device=CPU)
        assert "\n" not in str(caught.value)
        sys.modules.pop("apex", None)


def _has_nvidia_apex() -> bool:
    try:
        from apex.optimizers import FusedSGD  # noqa: F401
    except ImportError:
        return False
    return True


def schedule(**options: object) -> LrSchedule:
    return LrSchedule(**{"base_lr": 1.0, "epochs": 10, "steps_per_epoch": 4} | options)


class TestLrSchedule:
    """Values by hand; 10 epochs of 4 steps, peak 1 unless a test says otherwise."""

    @pytest.mark.parametrize(
        ("step", "lr"),
        [
            # two epochs of warm-up: (e + 1) / 2
            (0, 0.5),
            (3, 0.5),
            (4, 1.0),
            (7, 1.0),
            # (1 + cos(pi (e - 2) / 8)) / 2
            (8, 1.0),
            (16, 0.85355339),  # e = 4: cos(pi/4)
            (19, 0.85355339),
            (24, 0.5),  # e = 6
            (39, 0.03806023),  # e = 9: cos(7 pi/8)
            (40, 0.0),
            (1000, 0.0),
        ],
    )
    def test_cosine_per_epoch(self, step: int, lr: float) -> None:
        assert schedule(kind="cosine", warmup_epochs=2)(step) == pytest.approx(lr, abs=1e-8)

    @pytest.mark.parametrize(
        ("step", "lr"), [(0, 0.0), (1, 0.125), (4, 0.5), (8, 1.0), (24, 0.6), (40, 0.2), (99, 0.2)]
    )
    def test_cosine_per_step_with_floor(self, step: int, lr: float) -> None:
        lrs = schedule(kind="cosine", warmup_epochs=2, per_step=True, end_lr=0.2)
        assert lrs(step) == pytest.approx(lr, abs=1e-12)

    @pytest.mark.parametrize(
        ("per_step", "step", "lr"),
        [
            (False, 3, 1.0),
            (False, 4, 0.9),
            (False, 7, 0.9),
            (False, 39, 0.1),
            (False, 40, 0.0),
            (True, 1, 0.975),
            (True, 39, 0.025),
            (True, 40, 0.0),
        ],
    )
    def test_linear(self, per_step: bool, step: int, lr: float) -> None:
        assert schedule(kind="linear", per_step=per_step)(step) == pytest.approx(lr, abs=1e-12)

    def test_step_at_default_milestones(self) -> None:
        lrs = schedule(kind="step", base_lr=0.1, epochs=90, warmup_epochs=5)
        epochs = {
            0: 0.02,
            4: 0.1,
            5: 0.1,
            29: 0.1,
            30: 0.01,
            59: 0.01,
            60: 1e-3,
            80: 1e-4,
            90: 1e-4,
        }
        for epoch, lr in epochs.items():
            assert lrs(4 * epoch) == pytest.approx(lr, rel=1e-12)
            assert lrs(4 * epoch + 3) == pytest.approx(lr, rel=1e-12)

    def test_step_with_own_milestones_and_gamma_per_step(self) -> None:
        lrs = schedule(kind="step", milestones=(1.5, 3.0), gamma=0.5, per_step=True)
        assert [lrs(s) for s in (0, 5, 6, 11, 12, 40)] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]

    @pytest.mark.parametrize("kind", ["cosine", "linear", "step"])
    @pytest.mark.parametrize("per_step", [False, True])
    def test_restarts_are_schedules_one_after_the_other(self, kind: str, per_step: bool) -> None:
        options = {"kind": kind, "per_step": per_step, "warmup_epochs": 1, "milestones": (2.0,)}
        lrs = schedule(restarts=(3.0, 7.0), **options)
        parts = [schedule(epochs=epochs, **options) for epochs in (3, 4, 3)]
        expected = [part(step) for part, n in zip(parts, (12, 16, 12), strict=True)
                    for step in range(n)]  # fmt: skip
        assert [lrs(step) for step in range(40)] == pytest.approx(expected, abs=1e-12)
        assert lrs(1000) == pytest.approx(parts[-1](1000), abs=1e-12)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"restarts": (5.0, 5.0)}, r"--lr-restarts must increase, above 0 and below"),
            ({"restarts": (0.0,)}, r"--lr-restarts must increase"),
            ({"restarts": (10.0,)}, r"--lr-restarts must increase"),
            ({"restarts": (9.0,), "warmup_epochs": 1}, "1 epochs between two of --lr-restarts"),
        ],
    )
    def test_restarts_that_cannot_be(self, options: dict[str, object], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            schedule(kind="cosine", **options)

    def test_warmup_of_a_broken_number_of_epochs_never_overshoots(self) -> None:
        lrs = schedule(kind="linear", warmup_epochs=2.5)
        assert [lrs(4 * e) for e in (0, 1, 2)] == [0.4, 0.8, 1.0]
        assert lrs(4 * 3) == pytest.approx(1 - 0.5 / 7.5)

    @given(
        kind=st.sampled_from(["step", "cosine", "linear"]),
        per_step=st.booleans(),
        epochs=st.integers(2, 200),
        steps_per_epoch=st.integers(1, 50),
        warmup=st.floats(0, 1.9),
        data=st.data(),
    )
    def test_rises_to_the_peak_then_never_rises(
        self, kind, per_step, epochs, steps_per_epoch, warmup, data
    ) -> None:
        lrs = LrSchedule(
            kind=kind,
            base_lr=0.4,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            warmup_epochs=warmup,
            per_step=per_step,
        )
        first, second = sorted(
            data.draw(st.tuples(*[st.integers(0, epochs * steps_per_epoch)] * 2))
        )
        assert 0 <= lrs(first) <= 0.4 + 1e-12
        if first >= math.ceil(warmup) * steps_per_epoch:
            assert lrs(second) <= lrs(first) + 1e-12
        elif second < math.floor(warmup) * steps_per_epoch:
            assert lrs(first) <= lrs(second)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"kind": "exponential"}, "step, cosine or linear, got 'exponential'"),
            ({"kind": "cosine", "epochs": 0}, "at least one epoch"),
            ({"kind": "cosine", "warmup_epochs": 10}, "shorter than the 10 epochs .* got 10"),
            ({"kind": "step", "milestones": (30, 30)}, "milestones must increase"),
            ({"kind": "linear", "end_lr": 0.1}, "end_lr 0.1 has no effect on the linear"),
        ],
    )
    def test_bad_values_are_refused(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            schedule(**options)


class TestEma:
    def test_by_hand(self) -> None:
        model = nn.BatchNorm1d(1)
        with torch.no_grad():
            model.weight.fill_(1.0)
        ema = create_ema(model, 0.15)
        values = []
        for update in range(3):
            with torch.no_grad():
                model.weight.fill_(2.0)
            model.running_mean.fill_(10.0)
            model.num_batches_tracked.fill_(update + 5)
            ema.update_parameters(model)
            values.append((ema.module.weight.item(), ema.module.running_mean.item()))
        # mu = 1/10, then min(0.15, 2/11) = 0.15 twice
        expected = [(1.9, 9.0), (1.985, 9.85), (1.99775, 9.9775)]
        assert values == [pytest.approx(pair, rel=1e-6) for pair in expected]
        assert ema.module.num_batches_tracked.item() == 7
        assert model.weight.item() == 2

    def test_state_round_trip_continues_the_decay_warmup(self) -> None:
        torch.manual_seed(0)
        model = small_net()
        ema = create_ema(model, 0.999)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def advance(*averages: nn.Module) -> None:
            train(model, optimizer, seed=3, steps=1)
            for average in averages:
                average.update_parameters(model)

        advance(ema)
        advance(ema)
        restored = create_ema(small_net(), 0.999)
        restored.load_state_dict(ema.state_dict())
        advance(ema, restored)
        for key, value in ema.state_dict().items():
            assert torch.equal(value, restored.state_dict()[key]), key

    def test_keeps_memory_format_and_averages_on_meta(self) -> None:
        model = small_net().to(memory_format=torch.channels_last)
        ema = create_ema(model, 0.9)
        ema.update_parameters(model)
        assert ema.module[0].weight.is_contiguous(memory_format=torch.channels_last)
        meta = small_net().to("meta")
        create_ema(meta, 0.9).update_parameters(meta)

    @pytest.mark.parametrize("decay", [0.0, 1.0, -0.1])
    def test_bad_decay_is_refused(self, decay: float) -> None:
        with pytest.raises(ValueError, match="EMA decay must be above 0 and below 1"):
            create_ema(nn.Linear(1, 1), decay)


class TestMixUpAndLoss:
    def test_images_and_targets_are_mixed_in_one_ratio_with_the_neighbor(self) -> None:
        torch.manual_seed(0)
        images = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 2, 2).contiguous()
        labels = torch.tensor([0, 1, 2, 3])
        mixed, targets = mixup(1.0, 5)(images, labels)
        ratio = targets[1, 1]
        assert 0 < ratio < 1
        expected = torch.zeros(4, 5)
        for i in range(4):
            expected[i, i] += ratio
            expected[i, i - 1 if i else 3] += 1 - ratio
        torch.testing.assert_close(targets, expected)
        # the images hold their own index, so that they tell the ratio as well
        torch.testing.assert_close(mixed[:, 0, 0, 0], expected[:, :4] @ torch.arange(4.0))
        assert mixed.shape == images.shape

    def test_ratio_follows_the_global_generator(self) -> None:
        images, labels = torch.randn(2, 3, 4, 4), torch.tensor([0, 1])
        mix = mixup(0.2, 2)
        torch.manual_seed(5)
        first, second = mix(images, labels), mix(images, labels)
        assert not torch.equal(first[1], second[1])
        torch.manual_seed(5)
        assert torch.equal(mix(images, labels)[0], first[0])

    def test_alpha_zero_is_refused(self) -> None:
        with pytest.raises(ValueError, match="alpha must be above 0, got 0"):
            mixup(0.0, 10)

    def test_label_smoothing_spreads_over_all_classes(self) -> None:
        logits = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
        log_z = math.log(math.exp(2) + 3)
        # targets 0.9 + 0.1 / 4 and 0.1 / 4: the loss is log Z - 2 * 0.925
        hard = create_loss(0.1)(logits, torch.tensor([0]))
        soft = create_loss(0.1)(logits, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        assert hard.item() == pytest.approx(log_z - 2 * 0.925, abs=1e-6)
        assert soft.item() == pytest.approx(hard.item(), abs=1e-6)
        assert create_loss()(logits, torch.tensor([0])).item() == pytest.approx(log_z - 2, abs=1e-6)

    @pytest.mark.parametrize("value", [-0.1, 1.0])
    def test_bad_label_smoothing_is_refused(self, value: float) -> None:
        with pytest.raises(ValueError, match="label_smoothing must be in"):
            create_loss(value)
