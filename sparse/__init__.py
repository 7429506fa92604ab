"""Sparse training for PyTorch: RigL and its relatives on ordinary dense parameters."""

from sparse.compression import compress_gradients
from sparse.connections import NewConnections
from sparse.distributions import allocate, layer_sparsities
from sparse.factories import gmp, rigl, rigl_reset, snfs, snip, static
from sparse.factories import set_ as set
from sparse.invariant import SparsityError
from sparse.layers import prunable
from sparse.masks import drop_and_grow, pack, random_mask, topk_mask, unpack
from sparse.methods import Method
from sparse.schedules import DropFraction, Window, cubic_sparsity, num_updates, update_steps
from sparse.sparsifier import Sparsifier

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
