"""Which images make up a batch, and the random numbers of each image.

Everything is a pure function of (seed, epoch, index of the image): no generator is carried from
batch to batch, so an epoch can be entered anywhere, by any number of workers, threads or ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_BLOCKS_PER_IMAGE = 16  # blocks of four 64-bit numbers set aside for each image
_DRAWS_PER_BLOCK = 4


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Deal the images of an epoch out to ranks and batches.

    The order is one sequence for all ranks, cut into global batches of `batch_size * world_size`
    images; within each, the ranks take every `world_size`-th image. The images handed out after a
    number of batches are thus a prefix of the order, whatever the number of ranks, and a position
    in an epoch is the length of that prefix.

    Attributes:
        num_samples: Images in the split.
        batch_size: Images per batch and rank.
        rank: This rank.
        world_size: Number of ranks.
        seed: Seed of the order.
        training: Reshuffle each epoch and drop the images that do not fill a global batch; else
            keep the order and every image: the last batch may be short, a rank may have none.
    """

    num_samples: int
    batch_size: int
    rank: int
    world_size: int
    seed: int
    training: bool

    @property
    def global_batch(self) -> int:
        """Return the number of images of a batch over all ranks."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch on this rank."""
        if self.training:
            return self.num_samples // self.global_batch
        on_rank = len(range(self.rank, self.num_samples, self.world_size))
        return -(-on_rank // self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> list[IntArray]:
        """Return the indices of each batch of this rank, from position `start` of the order."""
        if self.training:
            order = shuffled(self.seed, epoch, self.num_samples)[start:]
            order = order[: len(order) // self.global_batch * self.global_batch]
        else:
            order = np.arange(start, self.num_samples)
        shard = order[self.rank :: self.world_size]
        return [shard[i : i + self.batch_size] for i in range(0, len(shard), self.batch_size)]


def shuffled(seed: int, epoch: int, num_samples: int) -> IntArray:
    """Return the order of an epoch: a permutation of `range(num_samples)`."""
    # The draws of images stay far below this counter.
    bits = np.random.Philox(key=_key(seed, epoch), counter=np.array([0, 0, 0, 1], np.uint64))
    return np.random.Generator(bits).permutation(num_samples)


def draws(seed: int, epoch: int, indices: IntArray, count: int) -> FloatArray:
    """Return `count` numbers uniform in [0, 1) for each image, [len(indices), count].

    A counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)
    is moved to the numbers of an image, which therefore do not depend on its neighbors.
    """
    used_blocks = -(-count // _DRAWS_PER_BLOCK)
    assert used_blocks <= _BLOCKS_PER_IMAGE
    bits = np.random.Philox(key=_key(seed, epoch))
    generator = np.random.Generator(bits)
    numbers = np.empty((len(indices), count))
    position = 0
    for row, index in zip(numbers, indices.tolist(), strict=True):
        target = index * _BLOCKS_PER_IMAGE
        bits.advance(target - position)
        generator.random(out=row)
        position = target + used_blocks
    return numbers


def _key(seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    return np.array([seed % 2**64, epoch], dtype=np.uint64)
