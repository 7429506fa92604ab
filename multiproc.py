"""Start one training process per GPU of this node: NVIDIA's launcher flags over torchrun.

    python multiproc.py --nproc_per_node 8 main.py DATA [flags of main.py]

Local rank 0 writes to this terminal; the standard output of the others goes to GPU_<local rank>.log
in the current directory (GPU_node<N>_<local rank>.log with several nodes, which may share a disk).
Ends with the status that image_classification.launch gives: 75 for a run that was asked to stop.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from image_classification import versions
from image_classification.launch import launch

# Run by torchrun in place of the script: sends the output of all but local rank 0 to a file, then
# becomes the script, so that signals reach it under the same process id. $0 is the file's prefix.
_WORKER = '[ "$LOCAL_RANK" = 0 ] || exec >"$0$LOCAL_RANK.log"; exec "$@"'


def torchrun_arguments(arguments: Sequence[str]) -> list[str]:
    """Translate the launcher's arguments into those of torchrun, which does the work.

    Exits with status 2 and one line on standard error when an argument or the script is wrong.
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    if not Path(args.training_script).is_file():
        parser.error(f"no such training script: {args.training_script}")
    if not 0 <= args.node_rank < args.nnodes:
        parser.error(f"--node_rank {args.node_rank} is not in 0..{args.nnodes - 1} (--nnodes)")
    log_prefix = "GPU_" if args.nnodes == 1 else f"GPU_node{args.node_rank}_"
    world = [
        f"--nnodes={args.nnodes}",
        f"--node-rank={args.node_rank}",
        f"--nproc-per-node={args.nproc_per_node}",
        f"--master-addr={args.master_addr}",
        f"--master-port={args.master_port}",
    ]
    script = [sys.executable, "-u", args.training_script, *args.training_script_args]
    return ["--no-python", *world, "sh", "-c", _WORKER, log_prefix, *script]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="multiproc.py", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--nnodes", type=_positive, default=1, help="number of nodes")
    parser.add_argument("--node_rank", "--node-rank", type=int, default=0, help="rank of this node")
    parser.add_argument(
        "--nproc_per_node",
        "--nproc-per-node",
        type=_positive,
        default=1,
        help="processes on this node, normally its number of GPUs",
    )
    parser.add_argument(
        "--master_addr", "--master-addr", default="127.0.0.1", help="address of node 0"
    )
    parser.add_argument(
        "--master_port", "--master-port", type=_positive, default=29500, help="free port of node 0"
    )
    parser.add_argument("training_script", help="script to run, followed by its arguments")
    parser.add_argument("training_script_args", nargs=argparse.REMAINDER, metavar="...")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


if __name__ == "__main__":
    versions.require()
    sys.exit(launch(torchrun_arguments(sys.argv[1:])))
