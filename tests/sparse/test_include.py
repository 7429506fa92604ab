"""Weights that are prunable because `include` names them: attention, recurrent layers, others."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel
from torchvision.models import VisionTransformer

import sparse
from sparse import costs
from tests.sparse.nets import METHODS, assert_inactive_zero, make, sgd
from tests.sparse.ranks import run

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    # cuDNN says so of weights that functional_call puts in their places.
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous"),
    pytest.mark.filterwarnings("ignore:.* of the parameters stay dense"),
]


class Tagger(nn.Module):
    """Tokens -> classes, by a recurrent network of two layers and directions."""

    include = ("lstm.weight_*", "embed")

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.lstm = nn.LSTM(6, 8, num_layers=2, bidirectional=True, proj_size=5, batch_first=True)
        self.head = nn.Linear(10, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.embed(tokens))[0].mean(1))
        return logits

    @staticmethod
    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 13, (8, 7), generator=generator)
        return tokens, tokens.sum(1) % 3


class Vit(nn.Module):
    """Images -> classes, by patches and attention."""

    include = ("*.in_proj_weight", "position")

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(9, 8))
        self.patches = nn.Conv2d(2, 8, 2, stride=2)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.block(tokens).mean(1))
        return logits

    @staticmethod
    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(8, 2, 6, 6, generator=generator)
        return images, torch.randint(0, 4, (8,), generator=generator)


NETS = [Tagger, Vit]


def build(kind: type, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return kind().to(dtype)


def train(model: Any, optimizer: Any, steps: range, *, share: slice = slice(None)) -> None:
    some = next(model.parameters())
    module = getattr(model, "module", model)
    for step in steps:
        inputs, labels = (part[share].to(some.device) for part in module.batch(step))
        optimizer.zero_grad()
        inputs = inputs.to(some.dtype) if inputs.is_floating_point() else inputs
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def computed(module: nn.Module, name: str) -> nn.Module:
    """Normalize a weight with the hooks that torch had before parametrizations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, name)


class Bare(nn.Module):
    """Parameters of a module of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.mix = nn.Parameter(torch.randn(2, 4, 3))
        self.shift = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsd,hde->bhse", self.gain * x + self.shift, self.mix)


@pytest.mark.parametrize(
    ("module", "include", "expected"),
    [
        (nn.LSTM(3, 4), ["*"], ["weight_ih_l0", "weight_hh_l0"]),
        (nn.LSTM(3, 4), ["weight_hh_*"], ["weight_hh_l0"]),
        (nn.LSTM(3, 4, proj_size=2), ["*_h[hr]_*"], ["weight_hh_l0", "weight_hr_l0"]),
        (
            nn.GRU(3, 4, num_layers=2, bidirectional=True),
            ["*reverse", "*_ih_l1"],
            [f"weight_{name}" for name in "ih_l0_reverse hh_l0_reverse ih_l1".split()]
            + ["weight_ih_l1_reverse", "weight_hh_l1_reverse"],
        ),
        (nn.RNNCell(3, 4), ["weight_*"], ["weight_ih", "weight_hh"]),
        (nn.MultiheadAttention(4, 2), ["*"], ["in_proj_weight", "out_proj.weight"]),
        (
            nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            ["[qkv]_proj_weight"],
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
        ),
        (nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), ["0"], ["0.weight", "1.weight"]),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.PReLU(4)), ["0.weight"], ["0.weight"]),
        (nn.Sequential(nn.Linear(3, 2)), ["0"], ["0.weight"]),  # it is prunable anyway
        (nn.LayerNorm((3, 4)), ["*"], ["weight", "bias"]),
        (Bare(), ["mix", "sh*"], ["mix", "shift"]),
        (AveragedModel(nn.GRUCell(3, 4)), ["weight_?h"], ["weight_ih", "weight_hh"]),
    ],
)
def test_globs_name_parameters_of_two_or_more_dimensions(
    module: nn.Module, include: list[str], expected: list[str]
) -> None:
    found = sparse.prunable(module, include=include)
    assert list(found) == expected
    inner = module.module if isinstance(module, AveragedModel) else module
    assert all(found[name] is inner.get_parameter(name) for name in expected)


def refused(model: nn.Module, *include: str) -> str:
    """Return the line with which a model's `include` is refused."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        sparse.prunable(model, include=include)
    return str(caught.value)


def test_a_glob_that_names_nothing_to_mask_is_refused_in_one_line() -> None:
    known = "it could name embed.weight, lstm.weight_ih_l0, lstm.weight_hh_l0"
    for glob in ("lsmt.*", "*.bias_*"):  # a bias is a vector
        assert refused(Tagger(), "embed", glob) == (
            f"include: '{glob}' matches no parameter of two or more dimensions; {known}"
        )
    with pytest.raises(ValueError, match="must be a sequence of globs, got 'embed'"):
        sparse.static(Tagger(), sgd(Tagger()), sparsity=0.5, include="embed")
    assert "sparse gradients" in refused(nn.Embedding(5, 3, sparse=True), "*")
    assert "run the lazy model once" in refused(nn.LazyConv2d(3, 3), "*")
    for normed in (
        weight_norm(nn.LSTM(3, 4), "weight_hh_l0"),
        computed(nn.LSTM(3, 4), "weight_hh_l0"),
    ):
        assert "0.weight_hh_l0 is computed from other" in refused(nn.Sequential(normed), "*_hh_l0")
        assert "matches no parameter" in refused(nn.Sequential(normed), "*original*")
        assert list(sparse.prunable(nn.Sequential(normed), ["*_ih_l0"])) == ["0.weight_ih_l0"]
    with pytest.raises(ValueError, match=r"no convolution or linear layer.*name.*include$"):
        sparse.prunable(nn.LSTM(3, 4))


def tied() -> nn.ModuleDict:
    """Build a language model in miniature: the output layer shares the embedding's weight."""
    torch.manual_seed(0)
    parts = {"embed": nn.Embedding(9, 4), "x": nn.Linear(4, 4), "head": nn.Linear(4, 9)}
    model = nn.ModuleDict(parts)
    model["head"].weight = model["embed"].weight
    return model


@pytest.mark.parametrize("glob", ["embed", "head"])
def test_a_tied_weight_is_listed_once_under_its_first_name(glob: str) -> None:
    model = tied()
    assert list(sparse.prunable(model, [glob])) == ["embed.weight", "x.weight"]
    shared = nn.ModuleDict({"shared": model["embed"], "encoder": model["embed"]})
    assert list(sparse.prunable(shared, ["encoder"])) == ["shared.weight"]


def test_a_tied_weight_that_is_loaded_is_masked() -> None:
    model, dense = tied(), tied()
    sparsifier = sparse.static(model, sgd(model), sparsity=0.5, include=["embed"])
    for part in (model, model["embed"], model["head"]):
        of = {
            id(model): dense,
            id(model["embed"]): dense["embed"],
            id(model["head"]): dense["head"],
        }
        part.load_state_dict(of[id(part)].state_dict())
        sparsifier.metrics()  # checks that inactive weights are 0
        mask = sparsifier.masks["embed.weight"]
        assert torch.equal(model["head"].weight, dense["head"].weight * mask)


def test_all_weights_of_a_module_are_masked_when_it_is_loaded() -> None:
    model, dense = build(Tagger), build(Tagger)
    sparsifier = make("rigl", model, sgd(model), include=Tagger.include)
    model.load_state_dict(dense.state_dict())
    for name, mask in sparsifier.masks.items():
        assert torch.equal(model.get_parameter(name), dense.get_parameter(name) * mask), name


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("method", [name for name in METHODS if "gap" not in name])  # see below
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_method_reaches_the_sparsity_and_keeps_inactive_weights_at_zero(
    method: str, kind: Any, optimizer: str
) -> None:
    model = build(kind)
    make_optimizer: Callable[..., Any] = {"sgd": sgd, "adamw": adamw}[optimizer]
    optim = make_optimizer(model)
    sparsifier = make(method, model, optim, include=kind.include)
    for last in range(3, 19, 3):
        train(model, optim, range(last - 3, last))
        assert_inactive_zero(sparsifier, model, optim)
    weights = sparse.prunable(model, include=kind.include)
    active = {name: int((weight != 0).sum()) for name, weight in weights.items()}
    counted = sparsifier.num_active
    assert all(active[name] <= counted[name] for name in weights)
    total = sum(weight.numel() for weight in weights.values())
    if "srigl" in method:  # rows have whole numbers of weights
        assert 0.12 < sum(counted.values()) / total < 0.21
        return
    assert sum(counted.values()) / total == pytest.approx(0.2, abs=0.02)
    if sparsifier.method.keeps_counts:
        shapes = {name: weight.shape for name, weight in weights.items()}
        block = sparsifier.method.block
        assert counted == sparse.allocate(shapes, sparsity=0.8, block=block)


@pytest.mark.parametrize("kind", NETS)
def test_partitions_may_have_included_weights(kind: Any) -> None:
    model = build(kind)
    names = list(sparse.prunable(model, include=kind.include))
    parts = [",".join(names[: len(names) // 2]), ",".join(names[len(names) // 2 :])]
    optimizer = sgd(model)
    sparsifier = make("gap", model, optimizer, include=kind.include, partitions=parts)
    train(model, optimizer, range(18))
    assert_inactive_zero(sparsifier, model, optimizer)
    assert sparsifier.num_active == sparsifier.method.final_counts


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("method", ["rigl", "snfs", "gmp"])
def test_a_resumed_run_goes_on_bit_for_bit(method: str, kind: Any) -> None:
    def begin() -> tuple[Any, Any, sparse.Sparsifier]:
        model = build(kind)
        optimizer = adamw(model)
        return model, optimizer, make(method, model, optimizer, include=kind.include)

    parts = begin()
    train(*parts[:2], range(9))
    saved = copy.deepcopy([part.state_dict() for part in parts])
    train(*parts[:2], range(9, 17))
    resumed = begin()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    train(*resumed[:2], range(9, 17))
    for name, value in parts[0].state_dict().items():
        assert torch.equal(resumed[0].state_dict()[name], value), name

    model = build(kind)
    other = make(method, model, adamw(model), include=["embed"] if kind is Tagger else None)
    with pytest.raises(ValueError, match=r"sparse state: it has a mask for .*, this run has none"):
        other.load_state_dict(saved[2])


@pytest.mark.parametrize("kind", NETS)
def test_a_masked_network_is_one_whose_weights_are_multiplied_by_masks(
    kind: Any, device: torch.device
) -> None:
    model, reference = (build(kind, torch.float64).to(device) for _ in range(2))
    optimizer, other = sgd(model), sgd(reference)
    masks = make("static", model, optimizer, include=kind.include).masks
    assert any(not mask.all() for name, mask in masks.items() if name.startswith(("lstm", "block")))
    train(model, optimizer, range(5))
    for step in range(5):
        inputs, labels = (part.to(device) for part in reference.batch(step))
        inputs = inputs.double() if inputs.is_floating_point() else inputs
        weights = dict(reference.named_parameters())
        masked = {name: weights[name] * mask for name, mask in masks.items()}
        other.zero_grad()
        F.cross_entropy(functional_call(reference, masked, (inputs,)), labels).backward()
        other.step()
    for name, weight in model.named_parameters():
        expected = reference.get_parameter(name) * masks.get(name, 1)
        torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-12)


def test_given_masks_and_averages_over_training() -> None:
    model = build(Tagger)
    averaged = AveragedModel(model)
    optimizer = sgd(model)
    sizes = {n: w.numel() for n, w in sparse.prunable(model, Tagger.include).items()}
    mask = torch.zeros(32, 5, dtype=torch.bool)
    mask[::2] = True
    counts = sizes | {"lstm.weight_hh_l1": 80}
    method = sparse.METHODS["static"](sparsity=0.5)
    given = {"lstm.weight_hh_l1": mask}
    sparsifier = sparse.Sparsifier(model, optimizer, method, num_active=counts, masks=given)
    assert list(sparsifier.maskable) == ["lstm.weight_hh_l1"]
    assert torch.equal(model.lstm.weight_hh_l1 != 0, mask)
    train(model, optimizer, range(3))
    averaged.update_parameters(model)
    sparsifier.apply_to(averaged)
    inactive = ~sparsifier.masks["lstm.weight_hh_l1"]
    assert not averaged.module.lstm.weight_hh_l1[inactive].any()
    copied = copy.deepcopy(sparsifier)  # with its model and optimizer
    copied.metrics()


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_uniform_keeps_the_first_layer_dense_unless_it_is_named(distribution: Any) -> None:
    model = build(Tagger)
    settings = {"sparsity": 0.5, "distribution": distribution}
    for include, first in ((["embed"], "embed"), (["lstm*_hh_*"], "lstm.weight_hh_l0")):
        sparsifier = sparse.static(model, sgd(model), include=include, **settings)
        assert sparsifier.metrics()[f"sparsity.{first}"] > 0
        sparsifier.remove()
    vit = build(Vit)
    sparsifier = sparse.static(
        vit, sgd(vit), sparsity=0.5, distribution="uniform", include=["*proj*"]
    )
    assert sparsifier.metrics()["sparsity.patches"] == 0.0
    assert sparsifier.metrics()["sparsity.block.self_attn.in_proj_weight"] == 0.5


def test_the_warning_of_dense_weights_names_the_remedy_and_follows_it() -> None:
    model = build(Tagger)
    with pytest.warns(UserWarning, match=r"lstm\.weight_.* sparse, name them in include$"):
        sparse.static(model, sgd(model), sparsity=0.5)
    model = build(Tagger)
    sparse.static(model, sgd(model), sparsity=0.5, include=["lstm.weight*"])  # warns of nothing


def test_a_vision_transformer_of_torchvision_reaches_the_sparsity_that_was_asked_for() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=16,
        patch_size=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=64,
        num_classes=4,
    )
    optimizer = adamw(model)
    rigl = sparse.rigl(
        model, optimizer, sparsity=0.9, delta_t=2, t_end=9, include=["*.in_proj_weight"]
    )
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
        optimizer.step()
    metrics = rigl.metrics()
    assert metrics["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert metrics["sparsity.encoder.layers.encoder_layer_1.self_attention.in_proj_weight"] > 0.8
    masked = sum(mask.numel() for mask in rigl.masks.values())
    vectors = "bias class_token pos_embedding ln".split()
    others = {n: p for n, p in model.named_parameters() if not any(v in n for v in vectors)}
    assert masked == sum(p.numel() for p in others.values())


def by_name(model: nn.Module, *inputs: Tensor, include: Any = ()) -> dict[str, costs.LayerCost]:
    layers = costs.trace_layers(model, inputs=inputs, include=include)
    return {layer.name: layer for layer in layers}


def test_recurrent_weights_are_applied_at_every_time_step() -> None:
    layers = by_name(nn.LSTM(3, 5, num_layers=2, bidirectional=True), torch.zeros(7, 1, 3))
    assert len(layers) == 8
    assert layers["weight_ih_l0"].macs == layers["weight_ih_l0_reverse"].macs == 7 * 20 * 3
    assert layers["weight_hh_l0"].macs == layers["weight_hh_l1_reverse"].macs == 7 * 20 * 5
    assert layers["weight_ih_l1"].macs == 7 * 20 * 10
    assert layers["weight_hh_l0"].flops(0.5, "true") == 7 * 20 * 5 + 7 * 20
    assert layers["weight_hh_l0"].size_bits(0.5, "true") == 32 * (50 + 20) + 100
    gru = by_name(nn.GRU(3, 5), torch.zeros(4, 1, 3))
    assert [layer.macs for layer in gru.values()] == [4 * 15 * 3, 4 * 15 * 5]
    cell = by_name(nn.LSTMCell(3, 5), torch.zeros(1, 3))
    assert [layer.macs for layer in cell.values()] == [20 * 5, 20 * 3]
    projected = by_name(nn.LSTM(3, 5, proj_size=2), torch.zeros(7, 1, 3))
    assert projected["weight_hr_l0"].macs == 7 * 2 * 5
    assert projected["weight_hr_l0"].num_biases == 0


def test_projections_of_attention_are_applied_to_every_token() -> None:
    packed = by_name(nn.MultiheadAttention(4, 2), *[torch.zeros(6, 1, 4)] * 3)
    assert packed["in_proj_weight"].macs == 6 * 12 * 4
    assert packed["in_proj_weight"].num_biases == 12
    # queries of 2 tokens, keys and values of 3
    crossed = by_name(nn.MultiheadAttention(4, 2), torch.zeros(2, 1, 4), *[torch.ones(3, 1, 4)] * 2)
    assert crossed["in_proj_weight"].macs == 2 * 4 * 4 + 3 * 8 * 4
    unlike = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
    apart = by_name(unlike, torch.zeros(2, 1, 4), torch.zeros(3, 1, 3), torch.zeros(3, 1, 5))
    expected = {"q_proj_weight": 2 * 16, "k_proj_weight": 3 * 12, "v_proj_weight": 3 * 20}
    assert {name: layer.macs for name, layer in apart.items()} == expected | {"out_proj.weight": 32}
    assert all(layer.num_biases == 4 for layer in apart.values())


def test_what_enters_no_product_costs_bytes_only() -> None:
    tagger = by_name(Tagger(), torch.zeros(1, 7, dtype=torch.int64), include=["embed"])
    embed = tagger["embed.weight"]
    assert (embed.macs, embed.flops(), embed.flops(0.5, "true")) == (0, 0, 0)
    assert embed.size_bits() == 32 * 13 * 6
    assert embed.size_bits(0.5) == 32 * 39 + 78
    assert "embed.weight" not in by_name(Tagger(), torch.zeros(1, 7, dtype=torch.int64))
    bare = by_name(Bare(), torch.zeros(1, 5, 4), include=["*"])
    assert (bare["mix"].macs, bare["shift"].macs) == (5 * 2 * 4 * 3, 0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = tied()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.parts["head"](self.parts["x"](self.parts["embed"](tokens)))

    found = by_name(Model(), torch.zeros(1, 5, dtype=torch.int64), include=["*embed"])
    assert found["parts.embed.weight"].macs == 5 * 9 * 4


def test_costs_follow_the_densities_of_included_weights() -> None:
    model = build(Tagger)
    optimizer = sgd(model)
    sparsifier = make("rigl", model, optimizer, include=Tagger.include)
    tokens = Tagger.batch(0)[0][:1]
    layers = costs.trace_layers(model, inputs=[tokens], include=Tagger.include)
    densities = {
        name: n / sparsifier.masks[name].numel() for name, n in sparsifier.num_active.items()
    }
    report = costs.report(
        layers, densities, convention="macs", num_active=sparsifier.num_active,
        method=sparsifier.method,
    )  # fmt: skip
    assert report["overall_sparsity"] == sparsifier.metrics()["sparsity"]
    wanted = sum(densities[layer.name] * layer.macs for layer in layers)
    assert report["inference_flops"] == pytest.approx(wanted)
    assert report["dense_flops"] == 10 * 3 + 7 * 2 * (32 * (6 + 5 + 10 + 5) + 2 * 5 * 8)


def train_share(rank: int, world_size: int) -> dict[str, Any]:
    """Train both networks with every rank's share of the batches, under DDP and under FSDP2."""
    found: dict[str, Any] = {}
    for kind in NETS:
        ddp = DistributedDataParallel(build(kind, torch.float64))
        optimizer = sgd(ddp)
        sparsifier = make("rigl", ddp, optimizer, include=kind.include)
        sparse.compress_gradients(ddp, sparsifier)
        train(ddp, optimizer, range(6), share=slice(rank, None, world_size))
        found[f"{kind.__name__} ddp"] = [sparsifier.masks, weights_of(ddp.module)]

        sharded = build(kind, torch.float64)
        for child in sharded.children():
            fully_shard(child)
        fully_shard(sharded)
        optimizer = sgd(sharded)
        sparsifier = make("rigl", sharded, optimizer, include=kind.include)
        train(sharded, optimizer, range(6), share=slice(rank, None, world_size))
        masks = {name: whole(mask) for name, mask in sparsifier.masks.items()}
        found[f"{kind.__name__} fsdp"] = [masks, weights_of(sharded)]
    return found


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.detach()) for name, p in model.named_parameters()}


@pytest.mark.distributed
def test_two_ranks_do_what_one_process_does(tmp_path: Path) -> None:
    ranks = run(2, train_share, tmp_path)
    for kind in NETS:
        model = build(kind, torch.float64)
        optimizer = sgd(model)
        sparsifier = make("rigl", model, optimizer, include=kind.include)
        train(model, optimizer, range(6))
        for masks, weights in (
            rank[f"{kind.__name__} {way}"] for rank in ranks for way in ("ddp", "fsdp")
        ):
            for name, mask in sparsifier.masks.items():
                assert torch.equal(masks[name], mask), name
            torch.testing.assert_close(weights, weights_of(model))


@pytest.mark.filterwarnings("ignore")  # deprecations of the package are not ours
def test_a_language_model_of_transformers_with_tied_weights(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 17, "n_positions": 8}
    config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(ValueError, match="name them in include"):  # it has Conv1D, not Linear
        sparse.prunable(model)
    optimizer = adamw(model)
    rigl = make("rigl", model, optimizer, include=["*.c_*", "lm_head"])
    assert list(rigl.num_active) == [
        "transformer.wte.weight",
        *(f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj")),
        *(f"transformer.h.0.{name}.weight" for name in ("mlp.c_fc", "mlp.c_proj")),
    ]
    for step in range(6):
        tokens = torch.randint(0, 17, (4, 8), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert_inactive_zero(rigl, model, optimizer)
    assert rigl.metrics()["sparsity"] == pytest.approx(0.8, abs=0.01)
    model.save_pretrained(tmp_path)
    read = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    mask = rigl.masks["transformer.wte.weight"]
    assert not read.lm_head.weight[~mask].any()
    layers = by_name(model, tokens[:1], include=["*.wpe"])
    assert layers["transformer.wte.weight"].macs == 8 * 17 * 8  # as the output layer
    assert layers["transformer.h.0.attn.c_attn.weight"].macs == 8 * 24 * 8
    assert layers["transformer.h.0.attn.c_attn.weight"].num_biases == 24
    assert layers["transformer.wpe.weight"].macs == 0
