"""torchrun that tells a stop from a failure: `python -m image_classification.launch ... main.py`.

Takes torchrun's flags and starts its workers. torchrun ends with status 1 whatever status they had,
so that nobody could tell a run that only wants to be started again; this one ends with 75 if a
worker did, or if it was itself stopped by SIGTERM or SIGUSR1, which it passes on to the workers.
"""

import os
import sys
from collections.abc import Sequence

from image_classification import preemption

_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"  # torchrun's, and those of clusters


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun with `arguments` and return the exit status.

    Signals that arrive before the workers are started end it as well, with nothing lost.
    """
    preemption.listen()  # until torchrun's own handlers are in place
    # A store of their own for the workers of every rendezvous: with one store for all, a node that
    # comes back finds the addresses of processes that are gone.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if preemption.requested():
        return preemption.EXIT_STATUS
    try:
        run.main(["--signals-to-handle", _SIGNALS, *arguments])
    except ChildFailedError as error:
        statuses = [failure.exitcode for failure in error.failures.values()]
        if preemption.EXIT_STATUS in statuses:
            return preemption.EXIT_STATUS
        print(error, file=sys.stderr)
        return 1
    except SignalException as error:
        stopped = error.sigval in preemption.SIGNALS
        return preemption.EXIT_STATUS if stopped else 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
