"""Two hosts made of this one: network namespaces, joined by a cable whose rate can be limited.

A namespace has interfaces, addresses and counters of its own, so that processes in it talk to the
other one over a real TCP connection and nothing else. Needs root and the commands ip and tc.
"""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "twohosts"
_numbers = itertools.count()


@dataclass(frozen=True)
class Host:
    """One end of the cable.

    Attributes:
        name: Name of the namespace.
        interface: Name of its end of the cable.
        address: Its IPv4 address.
    """

    name: str
    interface: str
    address: str

    def command(self, *argv: str) -> list[str]:
        """Return the command that runs `argv` on this host."""
        return ["ip", "netns", "exec", self.name, *argv]

    def kill(self) -> None:
        """Kill all processes on this host."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False
        )
        for pid in map(int, listed.stdout.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def why_not() -> str | None:
    """Say why hosts cannot be made here; None if they can."""
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"{program} (iproute2) is not installed"
    name = f"{_PREFIX}-{os.getpid()}-probe"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"ip netns is not permitted: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@contextlib.contextmanager
def two_hosts(rate: str | None = None) -> Iterator[tuple[Host, Host]]:
    """Make two hosts and take them down again, with what still runs on them.

    Args:
        rate: Limit of each direction as tc writes it, "1gbit" for example; none by default.
    """
    _remove_leftovers()
    number = next(_numbers)
    hosts = tuple(
        Host(f"{_PREFIX}-{os.getpid()}-{number}{end}", f"cable{end}", f"10.77.{number % 256}.{end}")
        for end in (1, 2)
    )
    first, second = hosts
    try:
        for host in hosts:
            _run("ip", "netns", "add", host.name)
        end, other = ("name", first.interface), ("name", second.interface)
        _run("ip", "link", "add", *end, "netns", first.name, "type", "veth",
             "peer", *other, "netns", second.name)  # fmt: skip
        for host in hosts:
            _run("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            for interface in ("lo", host.interface):
                _run("ip", "-n", host.name, "link", "set", interface, "up")
            if rate is not None:
                limit = ("tbf", "rate", rate, "burst", "256kb", "latency", "50ms")
                device = ("dev", host.interface, "root")
                _run("tc", "-n", host.name, "qdisc", "add", *device, *limit)
        yield first, second
    finally:
        for host in hosts:
            host.kill()
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False)


def sent_bytes(interface: str) -> int:
    """Read how many bytes have left through an interface of this process's own host."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])
    raise ValueError(f"there is no interface {interface}")


def _remove_leftovers() -> None:
    """Remove the hosts of processes that died before they could."""
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    for name, pid in re.findall(rf"^({_PREFIX}-(\d+)-\S+)", names.stdout, re.M):
        if not Path("/proc", pid).exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
