"""The code of docs/integrations.md, run as it stands."""

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import sparse
from tests.documents import ROOT, blocks
from tests.sparse.test_checkpoints import assert_identical

PAGE = (ROOT / "docs" / "integrations.md").read_text()
SECTIONS = {
    head: blocks(body, "python")
    for head, body in re.findall(r"## (.+)\n((?s:.*?))(?=\n## |\Z)", PAGE)
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    yield
    transformers.logging.set_verbosity(level)


def run(section: str, index: int = 0, **names: object) -> dict[str, Any]:
    namespace = {"__name__": "page", **names}
    exec(SECTIONS[section][index], namespace)
    return namespace


def assert_sparse(model: nn.Module, sparsity: float) -> None:
    assert sparse.summary(model).sparsity == pytest.approx(sparsity, abs=0.01)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_lightning(capfd: pytest.CaptureFixture[str]) -> None:
    page = run("Lightning")
    assert_sparse(page["model"], 0.9)
    assert "sparse/dropped" in Path("logs/lightning_logs/version_0/metrics.csv").read_text()
    saved = torch.load("checkpoints/epoch=1.ckpt", weights_only=True)
    assert saved["callbacks"]["SparseCallback"]["step"] == 100


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")  # on a machine for GPUs
def test_transformers(capfd: pytest.CaptureFixture[str]) -> None:
    page = run("Transformers")
    assert capfd.readouterr().out.endswith("80.0% of the prunable weights are zero\n")
    first = torch.load("bert/checkpoint-40/sparsifier.pt", weights_only=True)
    assert first["step"] == 40
    assert {"sparse/sparsity", "loss"} <= page["trainer"].state.log_history[-2].keys()


def test_accelerate() -> None:
    page = run("Accelerate")
    accelerator, model = page["accelerator"], page["model"]
    assert page["sparsifier"].step == 50
    assert_sparse(model, 0.9)
    accelerator.load_state("state")
    assert page["sparsifier"].step == 25
    assert_sparse(model, 0.9)


def test_timm() -> None:
    page = run("timm")
    assert page["sparsifier"].num_updates == 4
    assert_sparse(page["model"], 0.8)
    for name, weight in sparse.prunable(page["average"].module).items():
        assert not weight[~page["sparsifier"].masks[name]].any()


def test_the_table_of_families_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    run("timm", 1)
    assert capsys.readouterr().out in PAGE


def test_a_plain_loop() -> None:
    page = run("A plain loop")
    assert page["run"]["sparse"].num_updates == 5
    assert_sparse(page["run"]["model"], 0.8)
    assert_identical(page["resumed"]["sparse"].state_dict(), page["run"]["sparse"].state_dict())


def test_several_optimizers() -> None:
    page = run("Several optimizers")
    assert [sparsifier.step for sparsifier in page["sparsifiers"]] == [100, 100]
    assert_sparse(page["model"], 0.9)
    weights = sparse.prunable(page["model"])
    assert all(not weights[name][~mask].any() for name, mask in page["masks"].items())
    assert sum(mask.sum() for mask in page["masks"].values()) == sum(
        num_active
        for sparsifier in page["sparsifiers"]
        for name, num_active in sparsifier.num_active.items()
        if name in sparsifier.maskable
    )


def test_averages_of_weights() -> None:
    page = run("Averages of weights")
    assert page["average"].n_averaged == 25
    assert_sparse(page["average"].module, 0.9)
    _, norm = page["average"].module[:2]
    hidden = torch.cat([images for images, _ in page["batches"]])
    torch.testing.assert_close(norm.running_mean, page["average"].module[0](hidden).mean(0))


def test_steps_in_two_parts() -> None:
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparse.rigl(model, optimizer, sparsity=0.5, t_end=10, distribution="er")
    model(torch.randn(3, 8)).square().sum().backward()
    run("Steps in two parts", sparse=sparse)["mask_gradients"](model, sparsifier)
    assert torch.equal(model.weight.grad != 0, sparsifier.masks["weight"])


def test_all_code_is_run() -> None:
    found = {head: len(code) for head, code in SECTIONS.items() if code}
    assert found == {
        "Lightning": 1, "Transformers": 1, "Accelerate": 1, "timm": 2, "A plain loop": 1,
        "Several optimizers": 1, "Averages of weights": 1, "Steps in two parts": 1,
    }  # fmt: skip


def test_the_library_imports_none_of_them() -> None:
    packages = {"lightning", "accelerate", "transformers", "timm"}
    code = f"import sys, sparse; print(*{packages} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("\n", 0), done.stderr


def test_integrations_are_short() -> None:
    files = list((ROOT / "sparse" / "integrations").glob("*.py"))
    assert len(files) == 4
    assert all(len(path.read_text().splitlines()) <= 80 for path in files)
