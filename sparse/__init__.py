"""Sparse training for PyTorch: RigL and its relatives on ordinary dense parameters."""

from . import factories
from .errors import SparsityError
from .factories import *  # noqa: F403, a function per method
from .layer_table import Summary, summary
from .methods import METHODS, Allocated, DropAndGrow, Method
from .methods.gmp import cubic_sparsity
from .methods.layers import prunable
from .methods.settings import setting
from .topology.bits import pack, unpack
from .topology.distributions import allocate, layer_sparsities
from .topology.masks import drop_and_grow, drop_and_grow_layers, random_mask, topk_mask
from .topology.schedules import (
    DropFraction,
    Window,
    num_updates,
    update_steps,
)
from .training.compression import compress_gradients
from .training.connections import NewConnections
from .training.resumption import resume
from .training.sparsifier import Sparsifier
from .version import __version__

__all__ = [
    "METHODS",
    "Allocated",
    "DropAndGrow",
    "DropFraction",
    "Method",
    "NewConnections",
    "Sparsifier",
    "SparsityError",
    "Summary",
    "Window",
    "__version__",
    "allocate",
    "compress_gradients",
    "cubic_sparsity",
    "drop_and_grow",
    "drop_and_grow_layers",
    "layer_sparsities",
    "num_updates",
    "pack",
    "prunable",
    "random_mask",
    "resume",
    "setting",
    "summary",
    "topk_mask",
    "unpack",
    "update_steps",
]
__all__ += factories.__all__
