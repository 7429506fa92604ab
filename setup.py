"""The build: the checkout's packages under the names that they have in the distribution.

An installed distribution shares the names of its packages with all others, and `sparse` is that of
PyData's sparse arrays, `cli` that of anybody. So `sparse/` becomes `sparsetrain`, and everything
else becomes `sparsetrain_programs`. The files are copied line by line, with the packages renamed in
import statements and the programs in texts, such as the remedy of an error.
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
LIBRARY = "sparsetrain"
PROGRAMS = "sparsetrain_programs"
FOLDERS = {
    LIBRARY: "sparse",
    PROGRAMS: "entry_points",
    f"{PROGRAMS}.cli": "cli",
    f"{PROGRAMS}.image_classification": "image_classification",
    f"{PROGRAMS}.results": "results",
}
"""Package of the distribution -> its folder."""
FILES = ("main", "costs", "export", "classify")
"""Files beside these folders that become modules of the programs."""

RENAMED = {
    r"^( *)from sparse\b": rf"\1from {LIBRARY}",
    r"^( *)import sparse$": rf"\1import {LIBRARY} as sparse",
    rf"^( *)from (cli|image_classification|results|{'|'.join(FILES)})\b": rf"\1from {PROGRAMS}.\2",
    r"\bsparse\.native\b": f"{LIBRARY}.native",
    r"(python )?(?<![\w/])main\.py\b": LIBRARY,
    r"(python )?(?<![\w/])(costs|export|classify)\.py\b": rf"{LIBRARY}-\2",
    r"python -m cli\.(combine|convert|report)\b": rf"{LIBRARY}-\1",
    r"python -m image_classification\.launch\b|\bmultiproc\.py\b": f"{LIBRARY}-launch",
    # without --upgrade, which could bring a stranger's package of this name
    r"--upgrade -r requirements\.txt \(bash scripts/test\.sh makes \.venv\)": f"'{LIBRARY}[train]'",
}
"""What the checkout says -> what the distribution says."""


class Build(build_py):
    """Copies the packages, renamed."""

    def run(self) -> None:
        """Build into an empty folder: what an earlier build left there would be installed, too."""
        if self.editable_mode:
            raise SystemExit(
                "an editable installation is not supported, because the build renames packages: "
                f"put {ROOT} on PYTHONPATH instead, where the library is called `sparse`"
            )
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Return (package, module, file) of the modules of a package."""
        found = super().find_package_modules(package, package_dir)
        files = FILES if package == PROGRAMS else ()
        return [*found, *((package, name, f"{name}.py") for name in files)]

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        """Copy a file and rename what it imports and mentions."""
        made, copied = super().build_module(module, module_file, package)
        text = Path(made).read_text(encoding="utf-8")
        for pattern, replacement in RENAMED.items():
            text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
        Path(made).write_text(text, encoding="utf-8")
        return made, copied


def requirements(name: str) -> dict[str, list[str]]:
    """Return the requirements of a file by extra; those above the first extra are under ""."""
    found: dict[str, list[str]] = {"": []}
    extra = ""
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = re.match(r"# \[([a-z]+)\]", line)
            extra = heading[1] if heading else extra
        elif line and not line.startswith("-r"):
            found.setdefault(extra, []).append(line)
    return found


required = requirements("requirements.txt")
extras = required | requirements("requirements-dev.txt")
del extras[""]  # the tools of the developers

setup(
    packages=[
        ".".join(filter(None, [package, inner]))
        for package, folder in FOLDERS.items()
        for inner in ["", *find_packages(folder)]
    ],
    package_dir=FOLDERS,
    package_data={
        "": ["py.typed", "*.pyi", "cpp/*", "cpp/include/*"],
        f"{PROGRAMS}.results": ["table.csv"],
    },
    include_package_data=False,
    install_requires=required[""],
    extras_require=extras,
    cmdclass={"build_py": Build},
)
