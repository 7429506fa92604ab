"""The software and hardware of a run, and the load of its GPU."""

import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).resolve().parents[2]
_DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali")


def run_metadata(*, project: str | None = None, distribution: str | None = None) -> dict[str, str]:
    """Return the facts that a reader needs to repeat a run. Unknown facts are left out.

    These are versions (this project, Python, torch, torchvision, DALI, CUDA, cuDNN, NCCL), the
    commit of the checkout, or that from which pip installed the project, host, operating system,
    CPU, GPUs, and the command line. The commit ends in "+dirty" if files of the checkout differ
    from it.

    Args:
        project: The version of this project.
        distribution: The name under which pip installed the project; None in a checkout.
    """
    facts = {
        "project": project,
        "git_commit": _installed_commit(distribution) if distribution else _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "dali": next(filter(None, map(_version, _DALI)), None),
        **_cuda_versions(),
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "gpus": ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))),
        "command": shlex.join(sys.orig_argv),
    }
    return {name: fact for name, fact in facts.items() if fact}


class GpuMonitor:
    """Reads the load of one GPU through NVML, with the load by other programs.

    Args:
        device: The GPU, or None for the current one. For the CPU nothing is read. The GPU is found
            by its UUID, so the numbering of CUDA_VISIBLE_DEVICES does not matter.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._readers: dict[str, Callable[[], float]] = {}
        if not torch.cuda.is_available() or (device is not None and device.type == "cpu"):
            return
        import pynvml

        self._unavailable = pynvml.NVMLError
        try:
            pynvml.nvmlInit()
            gpu = _nvml_handle(pynvml, str(torch.cuda.get_device_properties(device).uuid))
        except pynvml.NVMLError:  # the library or the permission is missing, as in some containers
            return
        self._readers = {
            "gpu.utilization": lambda: float(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu),
            "gpu.memory": lambda: float(pynvml.nvmlDeviceGetMemoryInfo(gpu).used / 2**30),
            "gpu.power": lambda: float(pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000),
        }

    def sample(self) -> dict[str, float]:
        """Return gpu.utilization (%), gpu.memory (GiB) and gpu.power (W), as far as known.

        Without a GPU or NVML the result is empty. Does not wait for the GPU.
        """
        values: dict[str, float] = {}
        for name, read in self._readers.items():
            try:
                values[name] = read()
            except self._unavailable:  # a MIG slice has no utilization of its own
                continue
        return values


def _nvml_handle(pynvml: Any, uuid: str) -> Any:
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    built = _ROOT / "COMMIT"  # the Dockerfile writes it, because an image has no .git
    if built.is_file():
        return built.read_text(encoding="utf-8").strip()
    commit = _git("rev-parse", "HEAD")
    is_dirty = commit and _git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+dirty" if is_dirty else commit


def _installed_commit(distribution: str) -> str | None:
    """Return the commit that pip took from a repository; None for other sources."""
    try:
        origin = metadata.distribution(distribution).read_text("direct_url.json")  # of PEP 610
    except metadata.PackageNotFoundError:  # its files were copied without pip
        return None
    commit: str | None = json.loads(origin or "{}").get("vcs_info", {}).get("commit_id")
    return commit


def _git(*arguments: str) -> str | None:
    """Return the output of git in the project's own checkout; None if it is no checkout."""
    if not (_ROOT / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(_ROOT), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _cuda_versions() -> dict[str, str | None]:
    if torch.version.cuda is None:
        return {}
    cudnn: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    nccl: tuple[int, ...] = ()
    if torch.distributed.is_nccl_available():
        nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return {
        "cuda": torch.version.cuda,
        "cudnn": str(cudnn) if cudnn else None,
        "nccl": ".".join(map(str, nccl)),
    }


def _cpu() -> str:
    """Return the name of the processor."""
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.is_file() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()
