"""Compile the kernels into the installation: `python -m sparse.runtime.build [LEVEL ...]`."""

import platform
import sys
from collections.abc import Sequence

from sparse.runtime import native


def main(levels: Sequence[str]) -> int:
    """Build the given levels, by default all of this processor's family; print the libraries.

    Returns:
        0, or 2 for an unknown level or a compiler that is missing or fails.
    """
    family = native.LEVELS if platform.machine() in ("x86_64", "AMD64") else ("portable",)
    for level in levels or family:
        try:
            if level not in native.LEVELS:
                raise ValueError(f"level must be one of {', '.join(native.LEVELS)}, got {level!r}")
            print(native.build(level, native.PREBUILT))
        except (ValueError, native.BuildError) as error:
            print(f"sparse.runtime.build: error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
