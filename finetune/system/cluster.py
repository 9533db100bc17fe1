"""What joins the GPUs of this machine with each other, and this machine with others."""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress

_LOOKUP_SECONDS = 3.0
# Links of `nvidia-smi topo -m` that cross a host bridge or the link between processors.
SLOW_LINKS = frozenset({"PHB", "NODE", "SYS"})


def gpu_links(topology: str) -> Counter[str]:
    """Count the pairs of GPUs by their link, from the output of `nvidia-smi topo -m`: NV18, PIX, SYS …"""
    rows = [re.sub(r"\x1b\[\d*m", "", line).split() for line in topology.splitlines()]
    gpus = [row for row in rows if len(row) > 1 and re.fullmatch(r"GPU\d+", row[0]) and "X" in row]
    return Counter(row[1 + other] for number, row in enumerate(gpus) for other in range(number + 1, len(gpus)))


def interfaces() -> dict[str, list[str]]:
    """Return the IP addresses of each network interface that is up, without the loopback."""
    import psutil

    states, found = psutil.net_if_stats(), {}
    for name, addresses in psutil.net_if_addrs().items():
        # An IPv6 address of the link alone reaches no other network.
        texts = [a.address.partition("%")[0] for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6)]
        texts = [text for text in texts if not (ipaddress.ip_address(text).is_loopback or text.startswith("fe80"))]
        if texts and states[name].isup:
            found[name] = texts
    return found


def resolves(name: str) -> bool:
    """Return whether a host name has an address, within three seconds."""
    answers: list[object] = []

    def look_up() -> None:
        with suppress(OSError):
            answers.extend(socket.getaddrinfo(name, None))

    # A thread, because looking up a name has no timeout of its own.
    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(_LOOKUP_SECONDS)
    return bool(answers)


def network_problems(environment: Mapping[str, str], names: Mapping[str, object]) -> Iterator[str]:
    """Yield what would stop a run on several machines.

    Args:
        environment: the variables of a launcher, NCCL and gloo.
        names: the network interfaces that are up.
    """
    host = socket.gethostname()
    if not (local := environment.get("PET_LOCAL_ADDR")) and not resolves(host):
        yield f"the name of this machine, {host}, has no address: add it to /etc/hosts, or set PET_LOCAL_ADDR"
    elif local and not resolves(local):
        yield f"PET_LOCAL_ADDR={local} has no address"
    for variable in ("MASTER_ADDR", "PET_MASTER_ADDR"):
        if (main := environment.get(variable)) and not resolves(main):
            yield f"{variable}={main} has no address: other machines cannot meet there"
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = environment.get(variable, "")
        if wanted and not any(_matches(variable, wanted, name) for name in (*names, "lo")):
            yield f"{variable}={wanted} is no interface that is up; there are {', '.join(names) or 'none'}"


def _matches(variable: str, wanted: str, name: str) -> bool:
    """Return whether an interface is one of those that a variable names.

    Source: NCCL's environment variables. A word is a prefix there, `=word` a whole name, and `^` excludes.
    """
    words = wanted.lstrip("^=").split(",")
    if variable == "GLOO_SOCKET_IFNAME":
        return name in words
    listed = any(name == word if wanted.lstrip("^").startswith("=") else name.startswith(word) for word in words)
    return listed != wanted.startswith("^")
