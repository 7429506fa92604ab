"""Run trained sparse networks: compact files, and CPU kernels that skip the zeros.

    network = sparse.runtime.load("network.safetensors")
    logits = network(images)

`save` (or `export.py`) writes a file. `trace` returns the graph that `save` needs.
`hybrid` runs a model of which the kernels know a part; torch computes the rest.
`compact_channels` makes a smaller dense network without the channels that are not needed.
"""

from ..native.library import BuildError
from .channels import compact_channels
from .format import Compact, read, save
from .graph import Node
from .header import DTYPES, Header
from .hybrid import Hybrid, hybrid
from .network import Network, load
from .plan_file import save_plan
from .quantize import METHODS, calibrate
from .tracing import trace

__all__ = [
    "DTYPES",
    "METHODS",
    "BuildError",
    "Compact",
    "Header",
    "Hybrid",
    "Network",
    "Node",
    "calibrate",
    "compact_channels",
    "hybrid",
    "load",
    "read",
    "save",
    "save_plan",
    "trace",
]
