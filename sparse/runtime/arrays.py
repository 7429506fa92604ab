"""The type of the arrays of the runtime."""

from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
