"""Run trained sparse networks: compact files, and CPU kernels that skip the zeros.

    network = sparse.runtime.load("network.safetensors")
    logits = network(images)

`save` (or `export.py`) writes a file. `trace` returns the graph that `save` needs.
"""

from ..native.library import BuildError
from .format import Compact, read, save
from .graph import Node
from .header import DTYPES, Header
from .network import Network, load
from .tracing import trace

__all__ = [
    "DTYPES",
    "BuildError",
    "Compact",
    "Header",
    "Network",
    "Node",
    "load",
    "read",
    "save",
    "trace",
]
