"""Open and run plans that were changed at random and signed again: fuzzed_plans LIBRARY COUNT.

Not a test by itself: test_plans.py and test_sanitizers.py start it, because what they look for ends
the process. The kernels may compute anything from a changed plan, but only with its own memory.
"""

import random
import resource
import sys
from pathlib import Path

import torch

from sparse.runtime import bindings
from tests.sparse.runtime.plans import HEADER, Api, Network, draw_for, number_at, operations, signed

NUMBERS = (0, 1, 2, 3, 4, 5, 7, 8, 16, 64, 100, 1000, 2**15, 2**20, 2**31 - 1, 2**31, 2**32)
NUMBERS += (2**40, 2**60, 2**62, 2**63 - 1)
SEEDS = 24
MOST = 2**25
"""Floats of an image or output that is run."""


def changed(rng: random.Random, plan: bytes) -> bytes:
    """Return a plan with some bytes or numbers changed, and its digest."""
    data = bytearray(plan)
    ops = number_at(plan, HEADER["num_ops"]) * number_at(plan, HEADER["op_bytes"])
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if rng.random() < 0.3:
            data[rng.randrange(40, len(data))] ^= 1 << rng.randrange(8)
            continue
        size = rng.choice([4, 8, 8])
        # Half of the changes are in the header and in the operations.
        end = operations(plan) + ops if rng.random() < 0.5 else len(data)
        at = rng.randrange(40, end - size) // size * size
        value = int.from_bytes(data[at : at + size], "little", signed=True)
        value = rng.choice([rng.choice(NUMBERS), -rng.choice(NUMBERS), value + rng.choice(NUMBERS)])
        data[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
    return signed(bytes(data))


def main(library: str, count: int) -> None:
    """Print how many of the changed plans were opened, refused, and too large to be run."""
    kernels, api = bindings.Kernels(Path(library)), Api(Path(library))
    plans = [draw_for(seed, kernels).data for seed in range(SEEDS)]
    if "--limit" in sys.argv:  # an address sanitizer needs more than the system has
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
    opened = refused = large = 0
    for seed in range(count):
        print(seed, flush=True)  # the last one is to blame
        rng = random.Random(seed)
        network = api.open(changed(rng, rng.choice(plans)), rng.choice([1, 2]))
        if not isinstance(network, Network):
            assert network.startswith("SPARSE_")
            assert "\n" not in network
            refused += 1
            continue
        if max(torch.Size(s).numel() for s in (network.in_shape, network.out_shape)) > MOST:
            large += 1
            continue
        opened += 1
        network.run(torch.zeros(2, *network.in_shape))
        if rng.random() < 0.2:
            assert api.call("retune", network.handle) == "SPARSE_OK", api.error()
    print(f"opened {opened}, refused {refused}, large {large}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
