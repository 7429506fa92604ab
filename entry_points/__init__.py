"""The programs of the installed distribution: pyproject.toml has a command for each function.

The build installs this package as `sparsetrain_programs`, with the programs as its modules
(setup.py). In a checkout a program is started by its file: `python main.py`. Importing this package
loads neither torch nor anything else that has to be checked first.
"""

import sys

from image_classification import preemption, versions


def train() -> int:
    """Train a network, dense or sparse."""
    preemption.listen()  # before torch: importing it takes seconds, and a signal would kill
    versions.require()
    from main import main

    return main(sys.argv[1:])


def costs() -> int:
    """Print the cost of a sparse network."""
    versions.require()
    from costs import main

    return main(sys.argv[1:])


def export() -> int:
    """Convert a trained network to a compact file or to ONNX."""
    versions.require()
    from export import main

    return main(sys.argv[1:])


def classify() -> int:
    """Classify images."""
    versions.require()
    from classify import main

    return main(sys.argv[1:])


def convert() -> int:
    """Bring weights in and out."""
    versions.require()
    from cli.convert import main

    return main(sys.argv[1:])


def combine() -> int:
    """Put a network together from runs that trained a partition each."""
    versions.require()
    from cli.combine import main

    return main(sys.argv[1:])


def report() -> int:
    """Turn finished runs into a table."""
    versions.require()
    from cli.report import main

    return main(sys.argv[1:])


def launch() -> int:
    """Start the processes of a run as torchrun does, and end with the status of a stopped run."""
    versions.require()
    from image_classification.launch import launch

    return launch(sys.argv[1:])
