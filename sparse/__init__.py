"""Sparse training for PyTorch: RigL and its relatives on ordinary dense parameters."""

from sparse import factories
from sparse.errors import SparsityError
from sparse.factories import *  # noqa: F403, a function per method
from sparse.methods import METHODS, Allocated, DropAndGrow, Method
from sparse.methods.gmp import cubic_sparsity
from sparse.methods.layers import prunable
from sparse.methods.settings import setting
from sparse.topology.bits import pack, unpack
from sparse.topology.distributions import allocate, layer_sparsities
from sparse.topology.masks import drop_and_grow, drop_and_grow_layers, random_mask, topk_mask
from sparse.topology.schedules import (
    DropFraction,
    Window,
    num_updates,
    update_steps,
)
from sparse.training.compression import compress_gradients
from sparse.training.connections import NewConnections
from sparse.training.sparsifier import Sparsifier

__all__ = [
    "METHODS",
    "Allocated",
    "DropAndGrow",
    "DropFraction",
    "Method",
    "NewConnections",
    "Sparsifier",
    "SparsityError",
    "Window",
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
    "setting",
    "topk_mask",
    "unpack",
    "update_steps",
]
__all__ += factories.__all__
