"""Two hosts on one machine: network namespaces joined by a virtual Ethernet link, for runs of two nodes."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

INTERFACE = "link0"
_numbers = count()
# The shell names the host, then becomes the command, which so has the process id of its starter's child.
_NAMED = 'echo "$1" > /proc/sys/kernel/hostname && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


@dataclass(frozen=True)
class Host:
    """A network namespace.

    Attributes:
        name: of the namespace, and of the host for its processes.
        address: IPv4, on the interface INTERFACE.
        hosts: what its processes see as /etc/hosts.
    """

    name: str
    address: str
    hosts: Path

    def command(self, *words: str) -> list[str]:
        """Return the command line that runs `words` on this host."""
        own = ["unshare", "--uts", "--mount", "sh", "-c", _NAMED, "sh", self.name, str(self.hosts)]
        return ["ip", "netns", "exec", self.name, *own, *words]

    def set_link(self, state: str) -> None:
        """Set this host's end of the link `up` or `down`."""
        _run("ip", "-n", self.name, "link", "set", INTERFACE, state)

    def shape(self, *queue: str) -> None:
        """Let a queueing discipline of tc, as `netem delay 20ms`, hold what this host sends."""
        _run("tc", "-n", self.name, "qdisc", "replace", "dev", INTERFACE, "root", *queue)


@contextmanager
def two_hosts(rate_mbit: float | None = None) -> Iterator[tuple[Host, Host]]:
    """Join two new hosts by a link, and remove them at the end. Processes on them must have ended.

    Args:
        rate_mbit: megabits/s of each direction; None: no limit.
    """
    number, folder = next(_numbers), Path(tempfile.mkdtemp())
    names = {f"host-{side}-{os.getpid()}-{number}": f"10.77.0.{i}" for i, side in enumerate("ab", 1)}
    hosts = tuple(Host(name, address, folder / name) for name, address in names.items())
    made: list[Host] = []
    try:
        for host in hosts:
            # As on Debian, the name of the second host leads to an address that no other host reaches.
            known = names if host is hosts[0] else {**names, host.name: "127.0.1.1"}
            lines = (f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **known}.items())
            host.hosts.write_text("".join(lines))
            _run("ip", "netns", "add", host.name)
            made.append(host)
            _run("ip", "-n", host.name, "link", "set", "lo", "up")
        ends = ["name", INTERFACE, "netns", hosts[0].name], ["name", INTERFACE, "netns", hosts[1].name]
        _run("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host in hosts:
            _run("ip", "-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            host.set_link("up")
            if rate_mbit is not None:
                # Ten milliseconds of data pass at once: a burst hides less of the rate than a message of a step takes.
                burst_bytes = max(int(rate_mbit * 1e6 / 8 * 0.01), 16_384)
                host.shape("tbf", "rate", f"{rate_mbit}mbit", "burst", f"{burst_bytes}b", "latency", "1s")
        yield hosts[0], hosts[1]
    finally:
        for host in made:
            _run("ip", "netns", "delete", host.name)
        shutil.rmtree(folder)


@functools.cache
def why_no_hosts() -> str | None:
    """Return why this machine cannot make two hosts, or None if it can."""
    try:
        with two_hosts():
            return None
    except FileNotFoundError as error:
        return f"{error.filename} is not installed"
    except subprocess.CalledProcessError as error:
        return f"network namespaces: {error.stderr.strip()}"


def can_shape(*queue: str) -> bool:
    """Return whether this machine's kernel has a queueing discipline of tc."""
    try:
        with two_hosts() as (host, _):
            host.shape(*queue)
        return True
    except subprocess.CalledProcessError:
        return False


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)
