"""Checkpoints: files that are whole or absent, and the state that goes in and out of them."""

from image_classification.checkpoint.files import (
    BEST,
    FORMAT,
    Found,
    check_names,
    find,
    load,
    newest,
    save,
    verify,
    write,
)
from image_classification.checkpoint.state import check, entry, restore, rng_state, set_rng_state

__all__ = [
    "BEST",
    "FORMAT",
    "Found",
    "check",
    "check_names",
    "entry",
    "find",
    "load",
    "newest",
    "restore",
    "rng_state",
    "save",
    "set_rng_state",
    "verify",
    "write",
]
