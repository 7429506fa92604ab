"""What the documents show is what works."""

import contextlib
import csv
import io
import json
import math
import os
import pkgutil
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch.distributed import run as torchrun
from torch.nn.parallel import DistributedDataParallel

import classify
import costs
import export
import main
import multiproc
import sparse
from cli import combine, convert, networks
from cli.metrics import FORMATS
from cli.program import Program
from image_classification.log.records import default_metadata
from image_classification.models import create_model
from scripts import derive
from sparse.native import __main__ as native
from sparse.native import library
from tests.documents import DOCUMENTS, ROOT, Command, anchors, blocks, commands, links, names
from tests.sparse.runtime import plans

README = ROOT / "README.md"
TABLE = ROOT / "results/table.csv"
SHOWN = list(dict.fromkeys(command for path in DOCUMENTS for command in commands(path)))


# Commands. Each is held by the first of RULES that it matches: a function that runs or parses it,
# or the file whose tests run it for real.


ROW = r"bash scripts/(((rigl|acdc|gap|granet|srigl)/)?(rn50|mbv1)_|compare/)\S+\.sh"
LAUNCHERS = r"torchrun|python multiproc\.py|python -m image_classification\.launch"


def plan(argv: list[str]) -> None:
    """Let main.py resolve a command line, which it does without data and GPU."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        if "--help" in argv:
            with pytest.raises(SystemExit, match="0"):
                main.main(argv)
            return
        assert main.main(argv if "--version" in argv else [*argv, "--dry-run"]) == 0
    if "--version" not in argv:
        assert json.loads(output.getvalue())["total_steps"] > 0


def plan_main(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan `[LAUNCHER] main.py DATA ...`, on as many processes as the launcher is to start."""
    before, _, after = command.line.partition("main.py")
    if flags := re.sub(f"({LAUNCHERS}|python) ?", "", before, count=1).split():
        Path("main.py").touch()
        if "multiproc.py" in before:
            multiproc.torchrun_arguments([*flags, "main.py"])
        else:
            torchrun.get_args_parser().parse_args([*flags, "main.py"])
        counts = re.findall(r"--(?:nnodes|nproc[-_]per[-_]node)[ =](\d+)", before)
        monkeypatch.setenv("WORLD_SIZE", str(math.prod(map(int, counts))))
    plan(after.split())


def plan_row(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the script of a row write down what it starts, and plan that."""
    recorder = Path("python").resolve()
    recorder.write_text(
        '#!/bin/sh\nprintf "%s\\0" "WORLD_SIZE=${WORLD_SIZE:-1}"\nprintf "%s\\0" "$@"\n'
    )
    recorder.chmod(0o755)
    _, script, *flags = command.words
    environment = {"NPROC": "1", **command.environment, "PYTHON": str(recorder)}
    done = subprocess.run(
        ["bash", str(ROOT / script), *flags, "--dry-run"],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    world, program, *argv = done.stdout.split("\0")[:-1]
    assert program.endswith("/main.py")
    monkeypatch.setenv(*world.split("=", 1))
    plan(argv)


def run_costs(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run costs.py."""
    Path("results").mkdir()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        if "--help" in command.words:
            with pytest.raises(SystemExit, match="0"):
                costs.main(command.words[2:])
        else:
            assert costs.main(command.words[2:]) == 0
    assert output.getvalue() or "--plot" in command.words


def parse(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program parse its command line; its own tests do what the command does."""
    program = command.words[2 if command.words[1] == "-m" else 1]
    programs: dict[str, Program[Any]] = {
        "classify.py": classify.PROGRAM,
        "export.py": export.PROGRAM,
        "cli.combine": combine.PROGRAM,
        "cli.convert": convert.PROGRAM,
    }
    arguments = command.words[command.words.index(program) + 1 :]
    if arguments:
        assert programs[program].parse(arguments)


def helped(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for the command's flags in the program's help: what it does takes minutes, or files."""
    program = command.words[1]
    if program == "-m":
        program = command.words[2].replace(".", "/") + ".py"
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    monkeypatch.setattr(sys, "path", [*sys.path])  # benchmarks add to it
    with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert {*command.flags} <= {*re.findall(r"--[\w-]+", text.getvalue())}


def build_kernels(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile the kernels of one level to the user's cache, unless they are there."""
    monkeypatch.setattr(library, "PREBUILT", library.default_cache())
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert native.main(command.words[3:] or ["portable"]) == 0
    assert all(Path(line).is_file() for line in printed.getvalue().splitlines())


def embed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configure the library, or compile an example with the library that the tests have built.

    tests/sparse/runtime/test_embedding.py does what the other commands do.
    """
    program, *arguments = command.words
    if arguments[0] == "-S":
        for compiler in re.findall(r"COMPILER=(\S+)", command.line):
            plans.needed(compiler)
        plans.run(plans.needed(program), "-S", ROOT / arguments[1], *arguments[2:])
    elif program in ("cc", "c++"):
        prefix = plans.install(plans.Target(library.family()[-1]))
        Path("prefix").symlink_to(prefix)
        Path("examples").symlink_to(ROOT / "examples")
        plans.run(plans.needed(program), *arguments)


def launcher_flags(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for the command's flags in the help of torchrun."""
    assert {*command.flags} <= {*re.findall(r"--[\w-]+", torchrun.get_args_parser().format_help())}


def write_derived(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the derived files to another place."""
    contents = {Path(path.name): text for path, text in derive.derived().items()}
    monkeypatch.setattr(derive, "derived", lambda: contents)
    derive.main()
    assert Path("options.md").read_text().startswith("# ")


def not_ours(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust a command that is another project's."""


def paths_exist(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for the files that the command names."""
    assert all((ROOT / word).exists() for word in command.words[1:] if "/" in word)


Rule = Callable[[Command, pytest.MonkeyPatch], None] | str
RULES: dict[str, Rule] = {
    r"python main\.py .*sensitivity:Sensitivity": "tests/sparse/test_adding_a_method.py",
    rf"(python|({LAUNCHERS}) .*) main\.py": plan_main,
    ROW: plan_row,
    r"python costs\.py": run_costs,
    r"python (export\.py|classify\.py|-m cli\.(convert|combine))": parse,
    r"python (benchmarks/\w+\.py|-m cli\.report)": helped,
    r"python -m sparse(train)?\.native": build_kernels,
    r"python scripts/derive\.py": write_derived,
    r"python scripts/rows\.py": "tests/test_rows.py",
    r"python -m tests\.golden tests/golden": "tests/sparse/test_golden.py",
    r"bash scripts/demo\.sh": "tests/test_demo.py",
    r"bash scripts/gpu_check\.sh": "tests/test_gpu_kit.py",
    r"bash scripts/prepare_imagenet\.sh \S+ \S+$": "tests/test_prepare_imagenet.py",
    r"bash docker/\w+\.sh": "tests/docker/test_scripts.py",
    r"bash tests/docker/engine\.sh bash scripts/test\.sh -m docker tests/docker": ".ci/run",
    r"bash scripts/test\.sh": ".ci/run",
    r"bash scripts/constraints\.sh": "tests/test_requirements.py",
    r"bash \.ci/run": ".github/workflows/ci.yml",
    r"sbatch .*scripts/slurm/train\.sbatch scripts/\S+\.sh": "tests/test_slurm.py",
    r"python -m build": "tests/test_distribution.py",
    r"pytest": paths_exist,
    LAUNCHERS: launcher_flags,
    r"cmake|cc|c\+\+|\./classify": embed,
    r"docker (run|load|build|stop)|enroot import|kill|scancel|scontrol|pip install": not_ours,
}
"""Beginning of a command -> what holds it."""

NEEDS = rf"main\.py|{ROW}|bash docker/|docker run|sbatch|enroot"
"""Commands that do not run just anywhere: in a block their comment says what they need."""


def identify(command: Command) -> str:
    """Return a name for the command's test."""
    return f"{command.document}: {command.line}"[:90]


@pytest.mark.parametrize("command", SHOWN, ids=identify)
def test_a_command_works_or_says_what_it_needs(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = next((r for pattern, r in RULES.items() if re.match(pattern, command.line)), None)
    assert rule, f"no test holds this command: add a rule to {Path(__file__).name}, or a test"
    if re.search(NEEDS, command.line) and not command.in_text and "--dry-run" not in command.words:
        assert re.search(r"\bneeds\b", command.comment), 'say what it needs: "# needs a GPU"'
    if isinstance(rule, str):
        (script,) = re.findall(r"[\w.]+$", next(w for w in command.words[1:] if w[0] != "-"))
        assert script in (ROOT / rule).read_text(), f"{rule} does not run {script}"
        return
    monkeypatch.chdir(tmp_path)
    rule(command, monkeypatch)


def test_an_unknown_command_or_flag_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in ("python main.py DATA --sparsty 0.9", "bash scripts/rn50_rigl_erk_0.7.sh"):
        with pytest.raises(AssertionError):
            test_a_command_works_or_says_what_it_needs(
                Command("x.md", tuple(line.split()), comment="needs"), tmp_path, monkeypatch
            )
    with pytest.raises(AssertionError, match="no test holds"):
        test_a_command_works_or_says_what_it_needs(
            Command("x.md", ("bash", "scripts/new.sh")), tmp_path, monkeypatch
        )


def test_the_commands_of_the_documents_are_found() -> None:
    lines = [command.line for command in SHOWN]
    assert len(lines) > 60
    assert "bash scripts/rn50_rigl_erk_0.9.sh --seed 1" in lines  # in a loop
    assert "python -m tests.golden tests/golden" in lines  # in a sentence


# Code.


def run_block(document: str, **names: object) -> dict[str, Any]:
    """Run the Python of a document with some names defined; return all that it defines."""
    (code,) = blocks((ROOT / document).read_text(), "python")
    return run_code(code, **names)


def run_code(code: str, **names: object) -> dict[str, Any]:
    namespace = {"__name__": "block", **names}
    exec(code, namespace)
    return namespace


def test_the_library_snippet_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run_block("README.md")
    assert capsys.readouterr().out == "90.0% of the weights are zero\n"


def test_a_trained_network_is_loaded_as_getting_started_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = torchvision.models.resnet50().state_dict()
    torch.save({"state_dict": trained}, "model_best.pth.tar")
    model = run_block("docs/getting_started.md")["model"]
    assert torch.equal(model.fc.weight, trained["fc.weight"])


def test_an_exported_network_is_run_as_runtime_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = networks.Trained(
        arch="small_cnn",
        options={"num_classes": 3},
        image_size=16,
        interpolation="bilinear",
        state=create_model("small_cnn", num_classes=3).state_dict(),
        masks={},
    )
    networks.write_compact(trained, Path("network.safetensors"), dtype="float32", fold=True)
    loaded, mixed = blocks((ROOT / "docs/runtime.md").read_text(), "python")
    logits = run_code(loaded, images=torch.randn(2, 3, 16, 16))["logits"]
    assert tuple(logits.shape) == (2, 3)
    convolution = torch.nn.Conv2d(3, 4, 8, stride=32)
    model = torch.nn.Sequential(convolution, torch.nn.Mish(), torch.nn.Flatten())
    logits = run_code(mixed, sparse=sparse, model=model, images=torch.randn(2, 3, 224, 224))[
        "logits"
    ]
    assert tuple(logits.shape) == (2, 4 * 7 * 7)


def test_gradients_are_compressed_as_training_says() -> None:
    model = torch.nn.Linear(40, 30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparse.static(model, optimizer, sparsity=0.9)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        names = {"sparse": sparse, "DistributedDataParallel": DistributedDataParallel}
        found = run_block("docs/training.md", model=model, sparsifier=sparsifier, **names)
        found["ddp_model"](torch.randn(2, 40)).sum().backward()
        assert not model.weight.grad[~sparsifier.masks["weight"]].any()
    finally:
        dist.destroy_process_group()


def test_sharded_training_is_saved_and_goes_on_as_scaling_says(tmp_path: Path) -> None:
    begin, go_on, bare = blocks((ROOT / "docs/scaling.md").read_text(), "python")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        batches = [(torch.randn(4, 20), torch.randint(0, 5, (4,))) for _ in range(3)]
        model = torch.nn.Sequential(torch.nn.Linear(20, 9), torch.nn.Linear(9, 5))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of being alone
            found = run_code(begin, model=model, batches=batches, folder=tmp_path / "saved")
            assert found["sparsifier"].step == 3
            found["folder"] = tmp_path / "saved"
            run_code(go_on, **found)
        model = torch.nn.Linear(20, 9)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        names = {"model": model, "optimizer": optimizer, "sparse": sparse, "torch": torch}
        assert run_code(bare, **names)["sparsifier"].step == 0
    finally:
        dist.destroy_process_group()


def test_other_weights_are_sparse_and_counted_as_methods_says() -> None:
    found = run_block("docs/methods.md")
    counts = found["sparsifier"].num_active
    assert [name for name in counts if name.startswith("lstm")] == [
        f"lstm.weight_{kind}_l{layer}" for layer in (0, 1) for kind in ("ih", "hh")
    ]
    sizes = {name: weight.numel() for name, weight in found["sparsifier"].maskable.items()}
    assert 1 - sum(counts.values()) / sum(sizes.values()) == pytest.approx(0.9, abs=1e-3)
    assert {layer.name: layer.macs for layer in found["layers"]} == {
        "lstm.weight_ih_l0": 20 * 512 * 64,
        **{f"lstm.weight_{name}": 20 * 512 * 128 for name in ("hh_l0", "ih_l1", "hh_l1")},
        "head.weight": 20 * 10 * 128,
        "embed.weight": 0,
    }


def test_all_code_of_the_documents_is_run() -> None:
    """The tests above, tests/sparse/test_adding_a_method.py and tests/test_integrations.py."""
    found = {str(d.relative_to(ROOT)) for d in DOCUMENTS if blocks(d.read_text(), "python")}
    pages = "adding_a_method getting_started integrations methods runtime scaling training".split()
    assert found == {"README.md", *(f"docs/{page}.md" for page in pages)}


# Figures, options, links.


def test_the_tables_of_the_readme_are_those_of_the_results() -> None:
    with TABLE.open(newline="") as file:
        rows = {row["script"]: row for row in csv.DictReader(file)}
    cell = re.compile(r"\[([\d.]+)\]\((scripts/\S+\.sh)\) · ([\d.]*\d)")
    linked = []
    for line in README.read_text().splitlines():
        for top1, script, training in cell.findall(line):
            row = rows[script]
            linked.append(script)
            assert top1 == row["published_top1"], script
            if row["method"] == "dense":
                assert training == "1.00"
                continue
            assert training == f"{float(row['train']):.2f}", script
            sparsity, inference, size = (text.strip() for text in line.split("|")[1:4])
            assert sparsity.lower() == f"{row['distribution']} {row['sparsity']}", script
            assert inference == f"{float(row['inference']):.3f}", script
            assert size == f"{float(row['size']):.2f}", script
    assert len(linked) == len(set(linked)) >= 20
    assert f"all {len(rows)} rows" in README.read_text()


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) < 250


@pytest.mark.parametrize("path", derive.derived(), ids=lambda path: path.name)
def test_what_is_derived_is_current(path: Path) -> None:
    assert path.read_text() == derive.derived()[path], "run python scripts/derive.py"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in links(document.read_text()):
        if target.startswith("http"):
            assert re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(/\S*)?", target), target
            continue
        file, _, anchor = target.partition("#")
        path = document.parent / file if file else document
        assert path.exists(), f"{document.name} links to {target}"
        assert not anchor or anchor in anchors(path.read_text()), f"{target} has no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_functions_that_are_named_exist(document: Path) -> None:
    for span in names(document.read_text()):
        if "/" in span and re.fullmatch(r"[\w./-]+\.(py|sh|csv|md|png|sbatch|json|yml)", span):
            assert (ROOT / span).exists() or span in NOT_HERE, f"there is no {span}"
        name = re.match(r"(sparse|image_classification|cli)(\.\w+)+(?=$|\()", span)
        if (
            name and not default_metadata(name[0], FORMATS) and span not in NOT_HERE
        ):  # or a key of the log
            assert pkgutil.resolve_name(name[0]) is not None


NOT_HERE = {"demo/report.png", "demo/demo.log", "scripts/rn50_partial.sh"}
"""What the demo writes, and a script of NVIDIA's."""


def test_every_document_is_linked_from_the_readme() -> None:
    linked = {(ROOT / target).resolve() for target in links(README.read_text())}
    missing = {path.name for path in DOCUMENTS} - {path.name for path in linked}
    assert missing <= {"README.md", "CHANGELOG.md"}


def test_the_reading_path_of_rigl_is_short() -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    listed = re.findall(r"^\d\. \[(sparse/\S+\.py)\]", page.partition("\n## ")[0], re.MULTILINE)
    assert 1 < len(listed) <= 5
    assert sum(len((ROOT / name).read_text().splitlines()) for name in listed) <= 900

    model = torch.nn.Linear(20, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse.rigl(model, optimizer, sparsity=0.5, t_end=10)
    model(torch.randn(4, 20)).sum().backward()
    ran: set[str] = set()
    sys.setprofile(lambda frame, *_: ran.add(frame.f_code.co_filename))
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    # What decides an update is on the path. How weights are found and entries ranked is not RigL.
    rooms = [ROOT / "sparse" / room for room in ("methods", "topology")]
    decides = {str(path.relative_to(ROOT)) for path in map(Path, ran) if path.parent in rooms}
    assert {"sparse/methods/base.py", "sparse/topology/masks.py"} < decides
    topology = {f"sparse/topology/{name}.py" for name in ("flat", "rng", "selection", "shards")}
    aside = {"sparse/methods/layers.py", *topology}
    assert decides - aside <= set(listed)
