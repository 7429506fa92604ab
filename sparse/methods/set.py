"""Sparse Evolutionary Training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..topology import rng
from ..topology.rng import Draw
from ..topology.selection import Scores
from .base import DropAndGrow, DropNoise, Tensors


@dataclass(frozen=True, kw_only=True)
class Set(DropNoise, DropAndGrow):
    """Sparse Evolutionary Training: drop by magnitude, grow at random (Mocanu et al. 2018).

    Attributes:
        draw: Where the random scores come from: a function of shape and key.
    """

    name: ClassVar[str] = "set"
    title: ClassVar[str] = "SET"
    paper: ClassVar[str] = "[Mocanu et al., 2018](https://arxiv.org/abs/1707.04780)"

    draw: Callable[[tuple[int, ...], tuple[int, ...]], Scores] = Draw

    def grow_scores(self, name: str, mask: Tensor, grads: Tensors, step: int) -> Scores:
        return self.draw(tuple(mask.shape), self.key(name, step, rng.GROW_SCORE))
