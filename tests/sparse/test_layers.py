"""Which weights are prunable, and under which names."""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

import sparse
from sparse.methods.layers import named_parameters


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def hooked_weight_norm(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


def pruned(module: nn.Module) -> nn.Module:
    return prune.random_unstructured(module, "weight", 0.5)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(8, 4))


def test_convolutions_and_linear_layers_only() -> None:
    model = nn.ModuleDict(
        {
            "conv1d": nn.Conv1d(4, 8, 3),
            "transposed": nn.ConvTranspose2d(4, 8, 3),
            "grouped": nn.Conv2d(8, 8, 3, groups=2),
            "depthwise": nn.Conv2d(8, 16, 3, groups=8),
            "one_channel": nn.Conv2d(1, 8, 3),
            "norm": nn.LayerNorm(8),
            "embedding": nn.Embedding(10, 8),
            "linear": nn.Linear(8, 2),
        }
    )
    names = ["conv1d", "transposed", "grouped", "one_channel", "linear"]
    assert list(sparse.prunable(model)) == [f"{name}.weight" for name in names]


def test_networks_of_torchvision_on_the_meta_device() -> None:
    with torch.device("meta"):
        resnet = sparse.prunable(torchvision.models.resnet50())
        vit = sparse.prunable(torchvision.models.vit_b_32())
        mobile = sparse.prunable(torchvision.models.mobilenet_v2())
    assert (len(resnet), sum(w.numel() for w in resnet.values())) == (54, 25_502_912)
    assert {name.rsplit(".", 2)[-2] for name in vit} == {"conv_proj", "out_proj", "0", "3", "head"}
    assert all(weight.shape[1] > 1 for weight in mobile.values())


@pytest.mark.usefixtures("one_process")
def test_wrappers_leave_no_trace_in_names() -> None:
    expected = ["0.weight", "3.weight"]
    wrapped = torch.nn.parallel.DistributedDataParallel(small())
    compiled = torch.compile(small(), backend="eager")
    inner = small()
    inner[0] = torch.compile(inner[0], backend="eager")
    for model in (wrapped, compiled, inner, AveragedModel(small())):
        assert list(sparse.prunable(model)) == expected
        assert set(expected) < named_parameters(model).keys()


def test_a_shared_weight_is_one_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert list(sparse.prunable(model)) == ["0.weight"]
    module = nn.Linear(4, 4)
    assert list(sparse.prunable(nn.Sequential(module, module))) == ["0.weight"]


def test_a_weight_tied_to_an_embedding_stays_dense() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9), "x": nn.Linear(4, 4)}
    )
    model["head"].weight = model["embed"].weight
    assert list(sparse.prunable(model)) == ["x.weight"]


def test_models_that_cannot_be_masked_are_refused() -> None:
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        sparse.prunable(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match=r"^0.weight is computed from other parameters"):
        sparse.prunable(nn.Sequential(weight_norm(nn.Linear(3, 3))))
    with pytest.raises(ValueError, match="run the lazy model once"):
        sparse.prunable(nn.LazyLinear(3))

    with pytest.raises(ValueError, match=r"weight has dtype torch\.complex64"):
        sparse.prunable(nn.Linear(3, 3, dtype=torch.complex64))


@pytest.mark.parametrize(
    "parametrize", [weight_norm, spectral_norm, nn.utils.spectral_norm, hooked_weight_norm, pruned]
)
@pytest.mark.parametrize("layer", [nn.Linear(8, 6), nn.ConvTranspose2d(8, 6, 3, groups=2)])
def test_a_computed_weight_stays_dense_where_that_is_asked_for(
    parametrize: Callable[[nn.Module], nn.Module], layer: nn.Module
) -> None:
    model = nn.Sequential(parametrize(copy.deepcopy(layer)), nn.Linear(8, 4))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"^0\.weight is computed.*dense_layers$"):
        sparse.rigl(model, optimizer, sparsity=0.5, t_end=9)
    sparsifier = sparse.rigl(model, optimizer, sparsity=0.5, t_end=9, dense_layers=["0"])
    assert sparsifier.num_active == {"0.weight": layer.weight.numel(), "1.weight": 16}
    assert sparsifier.masks["0.weight"].shape == layer.weight.shape
    assert sparsifier.masks["0.weight"].all()
    assert sparsifier.metrics()["sparsity.0"] == 0.0
    for name, value in model.state_dict().items():  # to look at the weight would change some
        assert torch.equal(value, before[name]) or name == "1.weight"


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 8)
        self.lstm = nn.LSTM(8, 16)
        self.head = nn.Linear(16, 4)


def test_large_weights_that_stay_dense_are_named_once() -> None:
    model = Recurrent()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"16% of the parameters stay dense: lstm\.weight_hh_l0"):
        sparse.static(model, optimizer, sparsity=0.5)
    attention = nn.TransformerEncoderLayer(8, 2, 16)
    optimizer = torch.optim.SGD(attention.parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"32% .*: self_attn\.in_proj_weight belong"):
        sparse.static(attention, optimizer, sparsity=0.5)


@pytest.mark.usefixtures("one_process")
def test_sharded_weights_are_listed_and_those_without_values_are_refused() -> None:
    mesh = init_device_mesh("cpu", (1,))
    model = fully_shard(small(), mesh=mesh)
    assert list(sparse.prunable(model)) == list(sparse.prunable(small()))
    with torch.device("meta"):
        empty = small()
    with pytest.raises(ValueError, match=r"^0.weight has no values yet; .* after to_empty"):
        sparse.prunable(fully_shard(empty, mesh=mesh))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of being alone
        flat = FullyShardedDataParallel(small(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^the model is sharded by FullySharded.*use fully_shard"):
        sparse.prunable(flat)
