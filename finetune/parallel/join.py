"""How the ranks of a launch meet: through the store of the launcher, under names that no earlier attempt used."""

from __future__ import annotations

import os
import socket
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch.distributed as dist

from finetune.system.errors import RankLost

# What torchrun and `accelerate launch` set, and any other launcher of ranks must.
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL_SECONDS = 0.1
_READ_SECONDS = 300.0


@dataclass(frozen=True)
class Meeting:
    """The ranks of a launch that have met.

    Attributes:
        hosts: host name of each rank.
        attempt: prefix of these ranks' keys in the store.
        address: host name or address, and port, of the store's server.
        by_agent: the server is torchrun's agent on the host of rank 0, not rank 0 itself.
        store: the first connection to the server, without a prefix. It lives as long as the server must.
    """

    rank: int
    hosts: tuple[str, ...]
    attempt: str
    address: tuple[str, int]
    by_agent: bool
    store: dist.Store

    @property
    def serves(self) -> bool:
        """Whether the store ends with this process."""
        return self.rank == 0 and not self.by_agent

    def connect(self) -> dist.Store:
        """Return a new connection to the store of these ranks. Two threads that share one would wait for each other."""
        return dist.PrefixStore(self.attempt, _connect(*self.address, serves=False, timeout_seconds=_READ_SECONDS))


def meet(timeout_seconds: float = 600) -> Meeting | None:
    """Wait for all ranks of the launch, and return who they are; None if this process is the only one.

    An agent of torchrun keeps its store when it starts the ranks again. So rank 0 draws a name for each attempt, under
    which keys of this attempt stand, and a rank takes the name only from a rank 0 that has seen this very process.

    Raises:
        RankLost: ranks have not come in time. It names them.
    """
    if any(not os.environ.get(name) for name in _VARIABLES) or os.environ["WORLD_SIZE"] == "1":
        return None
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = _connect(host, port, rank == 0 and not by_agent, timeout_seconds)
        names = _agree(store, rank, ranks, timeout_seconds)
    except dist.DistError as error:
        raise RankLost(
            f"MASTER_ADDR: {'the agent of rank 0' if by_agent else 'rank 0'} does not answer at {host}:{port}: "
            f"{first_line(error)}\n"
            "help: check that it runs, and that this host reaches the port"
        ) from error
    return Meeting(rank, tuple(names[1:]), names[0], (host, port), by_agent, store)


def _connect(host: str, port: int, serves: bool, timeout_seconds: float) -> dist.Store:
    limit = timedelta(seconds=timeout_seconds)
    # Several stores of a process share one server.
    return dist.TCPStore(host, port, is_master=serves, timeout=limit, wait_for_workers=False, multi_tenant=True)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type. Errors of torch go on with a trace."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _agree(store: dist.Store, rank: int, ranks: int, timeout_seconds: float) -> list[str]:
    """Return the name of this attempt, and the host of each rank."""
    deadline = time.monotonic() + timeout_seconds
    attempt, me = uuid.uuid4().hex, f"{uuid.uuid4().hex} {socket.gethostname()}"
    if rank == 0:
        store.set("finetune/attempt", attempt)
    while True:
        if store.check(["finetune/attempt"]):
            attempt = store.get("finetune/attempt").decode()
        came = [f"finetune/{attempt}/came/{other}" for other in range(ranks)]
        store.set(came[rank], me)
        seen = f"finetune/{attempt}/seen"
        if rank == 0 and store.check(came):
            store.set(seen, "\n".join(value.decode() for value in store.multi_get(came)))
        if store.check([seen]) and me in (entries := store.get(seen).decode().split("\n")):
            return [f"finetune/{attempt}", *(entry.partition(" ")[2] for entry in entries)]
        if time.monotonic() > deadline:
            missing = [str(other) for other in range(ranks) if not store.check([came[other]])] or ["0"]
            raise RankLost(
                f"ranks: {', '.join(missing)} of {ranks} have not come within {timeout_seconds:.0f} s\n"
                "help: check that the launch command runs on each host, with the same number of ranks"
            )
        time.sleep(_POLL_SECONDS)


def route_over(meeting: Meeting) -> None:
    """Let gloo use the network interface that leads to the store, if the ranks are on several hosts.

    By default gloo takes the address of the host's own name, which on many systems is 127.0.1.1.
    """
    if len(set(meeting.hosts)) == 1 or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    [(family, kind, _, _, target), *_] = socket.getaddrinfo(*meeting.address, type=socket.SOCK_DGRAM)
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # Chooses a route, and sends nothing.
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == own for address in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return
