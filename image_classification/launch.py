"""torchrun that tells a stop from a failure: `python -m image_classification.launch ... main.py`.

Takes torchrun's flags and starts its workers. torchrun itself ends with status 1 whatever status
the workers had, so a run that only has to be started again looks like a failure. This launcher ends
with 75 if a worker did, or if SIGTERM or SIGUSR1 stopped the launcher, which passes these signals
on to the workers.
"""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from image_classification import preemption, versions

# Signals of clusters. torchrun passes on SIGTERM, SIGINT, SIGHUP and SIGQUIT itself, once its
# workers are started.
_SIGNALS = (*preemption.SIGNALS, signal.SIGUSR2)


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun with `arguments` and return the exit status.

    Signals that arrive before the workers are started end the launcher too, and nothing is lost.
    While the launcher tries to reach the store of another node, a signal waits until it has, or has
    given up.
    """
    preemption.listen()  # while torch is imported
    # The workers of every rendezvous get a store of their own. If all attempts shared one store, a
    # node that comes back would find the addresses of processes that are gone.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        # torchrun's own way: it catches the exception and sends the signal to its workers.
        name = signal.Signals(number)
        raise SignalException(f"process {os.getpid()} got {name.name}", sigval=name)

    try:
        for number in _SIGNALS:
            signal.signal(number, stop)
        if preemption.requested():
            return preemption.EXIT_STATUS
        run.main(list(arguments))
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
    versions.require()
    sys.exit(launch(sys.argv[1:]))
