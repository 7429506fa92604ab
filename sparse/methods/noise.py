"""Noise that breaks ties when connections are dropped."""

from dataclasses import dataclass

from torch import Tensor

from ..topology import rng
from ..topology.shards import part_like
from .base import Dropping, Tensors
from .settings import setting


@dataclass(frozen=True, kw_only=True)
class DropNoise(Dropping):
    """Dropping by magnitude with noise; the RigL repository breaks ties with one of 1e-5."""

    drop_noise: float = setting(0.0, "standard deviation of noise on |w| when dropping")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop_noise < 0.0:
            raise ValueError(f"drop_noise must not be negative, got {self.drop_noise}")

    def drop_scores(self, name: str, weight: Tensor, grads: Tensors, step: int) -> Tensor:
        if self.drop_noise == 0.0:
            return weight
        key = self.key(name, step, rng.DROP_NOISE)
        # Noise never exceeds six deviations: the offset makes scores non-negative, so that ranking
        # them by magnitude is ranking them by value.
        noise = rng.normal(weight.shape, key, weight.device).add_(6.0).mul_(self.drop_noise)
        return part_like(noise, weight).add_(weight.abs())
