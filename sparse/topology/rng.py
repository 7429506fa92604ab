"""Random numbers that depend on a key and on nothing else.

The generator is counter-based: element i of a draw is a hash of (key, i). The generator has no
state, so a resumed run and all ranks draw the same numbers. All devices draw the same numbers, too,
because the hash is integer arithmetic. Keys consist of (seed, step, layer index, purpose).
"""

import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

# Purposes keep the draws of one layer at one step independent of each other.
INITIAL_MASK, GROW_SCORE, GROW_WEIGHT, DROP_NOISE = range(4)

_LIMIT = 1 << 31
CHUNK = 1 << 16  # elements that a CPU works on at a time: all passes over them stay in its cache

_Array = TypeVar("_Array", bound=Any)  # an int32 tensor or NumPy array; both have the operators


@dataclass(frozen=True)
class Draw:
    """A tensor of random integers uniform on [0, 2^31). Only elements that are read are computed.

    The hash is murmur3's 32-bit finalizer, with a part of the key mixed in before each
    multiplication. Its last round is left out, because it only improves low bits. The hash is a
    bijection of the element's index, except that the sign bit is cleared. No value thus occurs more
    than twice.

    Attributes:
        shape: Shape of the tensor; elements are counted in row-major order.
        key: Integers in [0, 2^63) that select the stream.
    """

    shape: tuple[int, ...]
    key: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.numel > _LIMIT:
            raise ValueError(f"a layer may have at most {_LIMIT} weights, got {self.shape}")

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """Draw all elements: int32 tensor of `shape`."""
        device = torch.device(device)
        flat = torch.arange(self.numel, dtype=torch.int32, device=device)
        if device.type != "cpu" or is_fake(flat):
            return drawn_at(flat, self.key).view(self.shape)
        read = self.reader()
        array = flat.numpy()
        for start in range(0, self.numel, CHUNK):
            chunk = array[start : start + CHUNK]
            chunk[:] = read(start, start + len(chunk), 1)
        return flat.view(self.shape)

    def reader(self) -> Callable[[int, int, int], Any]:
        """Give a function that draws elements start, start + step, ... < stop of the flat tensor.

        The function returns NumPy arrays. It is fast for contiguous ranges of at most `CHUNK`
        elements that start at a multiple of `CHUNK`.
        """
        first, second = words(self.key)
        places = torch.arange(min(CHUNK, self.numel), dtype=torch.int32).numpy()

        def read(start: int, stop: int, step: int) -> Any:
            if step == 1 and start % CHUNK == 0 and stop - start <= len(places):
                # The start and the places have no bit in common, so XOR adds them.
                return _mix(places[: stop - start] ^ (start ^ first), second)
            index = torch.arange(start, stop, step, dtype=torch.int32).numpy()
            return _mix(index ^ first, second)

        return read


def drawn_at(index: Tensor, key: tuple[int, ...]) -> Tensor:
    """Draw the elements at some places: int32 tensor, in place."""
    first, second = words(key)
    return _mix(index.bitwise_xor_(first), second)


def is_fake(tensor: Tensor) -> bool:
    """Say whether a tensor is fake (while tracing), without data that NumPy could read."""
    return type(tensor) not in (Tensor, nn.Parameter)


def uniform(shape: Sequence[int], key: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Draw float32 numbers uniform on [0, 1), multiples of 2^-24."""
    return fractions(Draw(tuple(shape), tuple(key)).tensor(device))


def normal(shape: Sequence[int], key: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Draw float32 standard normal numbers, less than 5.8 in magnitude (Box-Muller)."""
    return box_muller(lambda half: uniform(shape, (*key, half), device))


def fractions(bits: Tensor) -> Tensor:
    """Make of the integers of a draw float32 numbers on [0, 1)."""
    return (bits >> 7).to(torch.float32).mul_(2.0**-24)


def box_muller(draw: Callable[[int], Tensor]) -> Tensor:
    """Make standard normal numbers of two streams of uniform ones, which `draw` gives by number."""
    radius = draw(0).neg_().add_(1.0).log_().mul_(-2.0).sqrt_()
    return radius.mul_(draw(1).mul_(2.0 * math.pi).cos_())


def words(key: tuple[int, ...]) -> tuple[int, int]:
    """Condense a key to two int32."""
    try:
        content = struct.pack(f"<{len(key)}q", *key)
    except struct.error:
        raise ValueError(f"a seed must be an integer of 64 bits, got {key[0]!r}") from None
    digest = hashlib.blake2b(content, digest_size=8).digest()
    first, second = struct.unpack("<ii", digest)
    return first, second


def _mix(x: _Array, second: int) -> _Array:
    """Hash indices in place. The first word of the key was combined with them before."""
    x = first_half(x)
    x ^= second
    return second_half(x)


def first_half(x: _Array) -> _Array:
    """Do what comes before the second word of the key, in place."""
    high = x >> 16
    high &= 0xFFFF  # int32 shifts are arithmetic; the mask makes them logical
    x ^= high
    x *= 0x85EBCA6B - (1 << 32)
    return x


def second_half(x: _Array) -> _Array:
    """Do what comes after the second word of the key, in place."""
    high = x >> 13
    high &= 0x7FFFF
    x ^= high
    x *= 0xC2B2AE35 - (1 << 32)
    x &= 0x7FFFFFFF
    return x
