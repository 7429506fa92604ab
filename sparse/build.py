"""Compile the libraries into the installation: `python -m sparse.build [LEVEL ...]`."""

import platform
import sys
from collections.abc import Sequence

from sparse import compiled, gates
from sparse.runtime import native


def main(levels: Sequence[str]) -> int:
    """Build the given levels, by default all of this processor's family; print the libraries.

    Returns:
        0, or 2 for an unknown level or a compiler that is missing or fails.
    """
    family = compiled.LEVELS if platform.machine() in ("x86_64", "AMD64") else ("portable",)
    try:
        for level in levels or family:
            compiled.check_level(level)
            for library in (gates.LIBRARY, native.LIBRARY):
                print(library.build(level, compiled.PREBUILT))
    except (ValueError, compiled.BuildError) as error:
        print(f"sparse.build: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
