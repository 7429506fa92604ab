"""Run trained sparse networks: compact files, and CPU kernels that skip the zeros.

    network = sparse.runtime.load("network.safetensors")
    logits = network(images)

`save` (or `export.py`) writes a file. `trace` returns the graph that `save` needs.
"""

from sparse.native.library import BuildError
from sparse.runtime.format import Compact, read, save
from sparse.runtime.graph import Node
from sparse.runtime.header import DTYPES, Header
from sparse.runtime.network import Network, load
from sparse.runtime.tracing import trace

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
