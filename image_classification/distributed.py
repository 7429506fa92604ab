"""Process start-up and collectives; the only module that reads environment variables."""

import atexit
import os
import platform
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from image_classification import sharding

T = TypeVar("T")

# Recorded with every run: what a reader of a log needs to tell two runs apart, and nothing secret.
_RECORDED_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME",
    "NVIDIA_PYTORCH_VERSION",
    "OMP_NUM_THREADS",
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_NODELIST",
    "SLURM_RESTART_COUNT",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID",
)


@dataclass(frozen=True)
class Launch:
    """What the launcher said about this process; nothing has been started."""

    rank: int
    local_rank: int
    world_size: int
    launcher: Literal["none", "torchrun", "slurm"]


@dataclass(frozen=True)
class World:
    """This process among all processes of the run, and the device it computes on."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that writes logs and checkpoints."""
        return self.rank == 0


def world_from_env() -> Launch:
    """Read the launcher's variables and start nothing.

    torchrun's RANK, LOCAL_RANK and WORLD_SIZE win; SLURM's are used when torchrun's are absent and
    the job step has more than one task; otherwise the run is one process. WORLD_SIZE alone is
    enough here, so that a plan can be made for a world that does not exist yet.

    Raises:
        ValueError: a variable is not an integer or the ranks do not fit the world size.
    """
    env = os.environ
    if "WORLD_SIZE" in env or "RANK" in env:
        world_size = _integer(env, "WORLD_SIZE", 1)
        rank = _integer(env, "RANK", 0)
        launch = Launch(rank, _integer(env, "LOCAL_RANK", 0), world_size, "torchrun")
    elif "SLURM_PROCID" in env and _slurm_tasks(env) > 1:
        rank = _integer(env, "SLURM_PROCID", 0)
        launch = Launch(rank, _integer(env, "SLURM_LOCALID", 0), _slurm_tasks(env), "slurm")
    else:
        launch = Launch(rank=0, local_rank=0, world_size=1, launcher="none")
    if not 0 <= launch.local_rank <= launch.rank < launch.world_size:
        raise ValueError(
            f"rank {launch.rank} and local rank {launch.local_rank} do not fit a world of "
            f"{launch.world_size} processes: check the launcher's variables"
        )
    return launch


def start(*, cpu: bool = False, deterministic: bool = False) -> World:
    """Choose this process's device and join the process group of the run.

    The device is the GPU of the local rank, or the CPU when there is none or `cpu` asks for it. A
    process group (NCCL on GPUs, gloo on CPUs) is made when the world has more than one process or
    a launcher started this one. `deterministic` lets cuBLAS repeat its results, which it asks for
    before CUDA starts; torch has switches for the rest.

    Raises:
        ValueError: the launcher's variables are incomplete or contradict each other, or the local
            rank has no GPU.
    """
    if deterministic:
        _repeat_cublas(os.environ)
    launch = world_from_env()
    if launch.world_size > 1 and launch.launcher == "torchrun":
        _require_variables("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    device = _device(launch, cpu=cpu)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.world_size > 1 or (launch.launcher == "torchrun" and "MASTER_ADDR" in os.environ):
        address = _slurm_address(os.environ) if launch.launcher == "slurm" else "env://"
        store, *_ = next(rendezvous(address, launch.rank, launch.world_size))
        # When torchrun restarts the workers it may keep its store, which then has addresses of
        # processes that are gone. A prefix per attempt separates the addresses.
        attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{launch.world_size}"
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            # Binding the device lets NCCL connect at once and lets barriers know their GPU.
            device_id=device if device.type == "cuda" else None,
            store=dist.PrefixStore(attempt, store),  # type: ignore[attr-defined]
            rank=launch.rank,
            world_size=launch.world_size,
        )
    return World(launch.rank, launch.local_rank, launch.world_size, device)


def stop() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        # Dropping the last reference to the group ends its threads. DDP would drop it while it
        # holds Python's lock, for which the threads may be waiting, and torch 2.9 would hang. The
        # reference kept here outlives DDP's. It ends before the interpreter does, or torch 2.9
        # would abort.
        atexit.register([dist.group.WORLD].clear)
        dist.destroy_process_group()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum of `tensor` over all ranks, on every rank; the argument is not changed.

    The tensor must lie on the device of the world (NCCL sums GPU tensors only).
    """
    result = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(result)
    return result


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Return the largest of each element over all ranks, as `all_reduce_sum` returns sums."""
    result = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(result, op=dist.ReduceOp.MAX)
    return result


def broadcast_object(obj: T, src: int = 0) -> T:
    """Return rank `src`'s object on every rank. It is pickled: small host objects only."""
    if not dist.is_initialized():
        return obj
    holder = [obj]
    dist.broadcast_object_list(holder, src=src)
    return holder[0]


def all_gather_object(obj: T) -> list[T]:
    """Return every rank's object, in rank order, on every rank. Small host objects only."""
    if not dist.is_initialized():
        return [obj]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def broadcast_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of rank 0, such as the running statistics of BatchNorm.

    DDP leaves each rank with the statistics of its own batches; a validation that is split over
    the ranks must see one network.
    """
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def replicas(model: nn.Module) -> "dist.ProcessGroup | None":
    """Return the processes that have a copy of the model each; None if this is the only one."""
    if not dist.is_initialized() or sharding.is_sharded(model):
        return None
    return dist.group.WORLD


def barrier() -> None:
    """Wait until every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


class Ballot:
    """Lets any rank stop all ranks at the same step, without making them wait.

    `cast` starts to sum the votes in the background, on the host, and returns the outcome of the
    previous call. All ranks see the same outcomes in the same order and therefore act after the
    same call. The devices take no part. Every rank must call `cast` equally often.
    """

    def __init__(self) -> None:
        self._group: Any = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        self._sum = torch.zeros((), dtype=torch.int32)
        self._under_way: dist.Work | None = None

    def cast(self, vote: bool) -> bool:
        """Vote; tell whether any rank voted yes in the previous call (alone: in this call)."""
        if self._group is None:
            return vote
        outcome = self._count()
        self._sum = torch.tensor(vote, dtype=torch.int32)
        self._under_way = dist.all_reduce(self._sum, group=self._group, async_op=True)
        return outcome

    def decide(self, vote: bool) -> bool:
        """Vote and wait; tell whether any rank voted yes in this call or the previous one."""
        before = self.cast(vote)
        return before or (vote if self._group is None else self._count())

    def _count(self) -> bool:
        if self._under_way is not None:
            self._under_way.wait()
            self._under_way = None
        return bool(self._sum)


def environment() -> dict[str, str]:
    """Return where this process runs: the host and the launcher's variables that are set."""
    recorded = {
        name.lower(): os.environ[name] for name in _RECORDED_VARIABLES if name in os.environ
    }
    return {"host": platform.node(), **recorded}


def _integer(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"environment variable {name} must be an integer, not {text!r}") from None


def _require_variables(*names: str) -> None:
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')} but {', '.join(missing)} is not set: "
            "launch with torchrun or multiproc.py"
        )


def _device(launch: Launch, *, cpu: bool) -> torch.device:
    if cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # srun --gpus-per-task shows each task its own GPU only, as number 0.
    bound = launch.launcher == "slurm" and "SLURM_GPUS_PER_TASK" in os.environ and count == 1
    index = 0 if bound else launch.local_rank
    if index >= count:
        raise ValueError(
            f"local rank {launch.local_rank} has no GPU: {count} visible on {platform.node()}; "
            "start at most that many processes per node, or train on the CPU"
        )
    return torch.device("cuda", index)


def _repeat_cublas(env: MutableMapping[str, str]) -> None:
    """Give cuBLAS workspaces with which it repeats its results; torch accepts two."""
    name, accepted = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
    if env.setdefault(name, accepted[0]) not in accepted:
        raise ValueError(
            f"environment variable {name} is {env[name]}, --deterministic needs "
            f"{' or '.join(accepted)}: unset it"
        )


def _slurm_tasks(env: Mapping[str, str]) -> int:
    # A job step (srun) may have fewer tasks than the job that it runs in.
    step = "SLURM_STEP_NUM_TASKS"
    return _integer(env, step if step in env else "SLURM_NTASKS", 1)


def _slurm_address(env: Mapping[str, str]) -> str:
    """Return the rendezvous of a SLURM step: the host of task 0, a port derived from the job."""
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    address = env.get("MASTER_ADDR") or _first_host(hosts)
    if not address:
        raise ValueError(
            "SLURM_STEP_NODELIST is not set: start the tasks with srun, or set MASTER_ADDR and "
            "MASTER_PORT"
        )
    # Below the range from which Linux hands out ephemeral ports.
    port = _integer(env, "MASTER_PORT", 20_000 + _integer(env, "SLURM_JOB_ID", 0) % 10_000)
    return f"tcp://{address}:{port}"


def _first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list: `gpu[03-05,9],x1` -> `gpu03`."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodelist).split(",")[0].strip()
