"""Sparse training for PyTorch: RigL and its relatives on ordinary dense parameters."""

from sparse.errors import SparsityError
from sparse.factories import gmp, rigl, rigl_reset, snfs, snip, static
from sparse.factories import set_ as set
from sparse.methods.base import Method
from sparse.methods.layers import prunable
from sparse.topology.distributions import allocate, layer_sparsities
from sparse.topology.masks import drop_and_grow, pack, random_mask, topk_mask, unpack
from sparse.topology.schedules import (
    DropFraction,
    Window,
    cubic_sparsity,
    num_updates,
    update_steps,
)
from sparse.training.compression import compress_gradients
from sparse.training.connections import NewConnections
from sparse.training.sparsifier import Sparsifier

__all__ = [
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
    "gmp",
    "layer_sparsities",
    "num_updates",
    "pack",
    "prunable",
    "random_mask",
    "rigl",
    "rigl_reset",
    "set",
    "snfs",
    "snip",
    "static",
    "topk_mask",
    "unpack",
    "update_steps",
]
