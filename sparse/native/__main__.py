"""Compile the libraries into the installation: `python -m sparse.native [LEVEL ...]`."""

import sys
from collections.abc import Sequence

from . import library


def main(levels: Sequence[str]) -> int:
    """Compile the given levels, by default all of this processor's family; print the paths.

    Returns:
        0, or 2 for an unknown or foreign level, or a compiler that is missing or fails.
    """
    try:
        for level in levels or library.family():
            library.check_level(level)
            for sources in (library.GATES, library.KERNELS):
                print(sources.compile(level, library.PREBUILT))
    except (ValueError, library.BuildError) as error:
        print(f"sparse.native: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
