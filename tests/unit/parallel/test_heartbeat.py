"""A lost rank is named with its host; a rank that is slow, suspended or ended is not lost. Ranks of one process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from finetune.parallel import heartbeat
from finetune.parallel.heartbeat import Heartbeat, Peers, Timing
from finetune.parallel.join import Meeting, meet
from finetune.system.errors import DataError, Interrupted, RankLost

TIMING = Timing(beat=0.05, lost=0.6, broken=0.3, grace=0.2)
HOSTS = ("alpha", "beta", "beta")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))


@pytest.fixture
def meeting(store, request) -> Callable[[int], Meeting]:
    """Build the meeting of a rank, by a launcher with an agent."""
    return lambda rank: Meeting(rank, HOSTS, request.node.name, ("127.0.0.1", store.port), True, store)


@pytest.fixture
def ended(monkeypatch) -> list[int]:
    """Exit codes of ends from the watching thread, which here goes on."""
    codes: list[int] = []
    monkeypatch.setattr(heartbeat.os, "_exit", codes.append)
    return codes


def wait_for(holds: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def peers_of(clock: Clock, meeting: Meeting) -> Peers:
    peers = Peers(meeting, Timing(), clock)
    peers.update([b"1", b"1", b"1"], "")
    return peers


def pass_time(peers: Peers, clock: Clock, seconds: int, beats: Callable[[int], list[bytes]]) -> None:
    for second in range(seconds):
        clock.now += 1
        peers.look()
        peers.update(beats(second), "")


def test_only_ranks_whose_beats_stay_the_same_are_lost(meeting):
    clock = Clock()
    peers = peers_of(clock, meeting(0))
    pass_time(peers, clock, 60, lambda second: [b"1", str(second).encode(), b"7"])
    assert peers.lost(60) is None  # The beat of rank 2 changed a second after the first.
    pass_time(peers, clock, 2, lambda second: [b"1", f"later {second}".encode(), b"7"])
    assert peers.lost(60) == "rank 2 on beta has not answered for 60 s"
    pass_time(peers, clock, 70, lambda second: [b"1", b"9", b"7"])
    assert peers.lost(60) == "ranks 1, 2 on beta have not answered for 60 s"


def test_a_rank_that_has_ended_is_not_lost(meeting):
    clock = Clock()
    peers = peers_of(clock, meeting(0))
    pass_time(peers, clock, 100, lambda second: [b"1", b"ended", str(second).encode()])
    assert peers.lost(60) is None


def test_a_process_that_was_suspended_blames_nobody(meeting):
    clock = Clock()
    peers = peers_of(clock, meeting(0))
    clock.now += 3600
    peers.look()
    assert peers.lost(60) is None
    pass_time(peers, clock, 61, lambda second: [b"1", b"1", str(second).encode()])
    assert peers.lost(60) == "rank 1 on beta has not answered for 60 s"


def test_a_store_that_is_silent_or_gone_means_the_host_of_rank_0(meeting):
    clock = Clock()
    peers = peers_of(clock, meeting(2))
    for _ in range(61):
        clock.now += 1
        peers.look()
    assert str(peers.lost(60)).startswith("the agent of rank 0 on alpha has not answered at 127.0.0.1:")
    peers = peers_of(clock, meeting(2))
    peers.store_error = "Connection reset"
    assert peers.lost(60) is None and "rank 0 on alpha has closed" in str(peers.lost(10))


def test_a_rank_that_stops_beating_ends_the_others_with_its_name(meeting, ended, capsys):
    noted: list[str] = []
    with Heartbeat(meeting(0), TIMING) as first, Heartbeat(meeting(2), TIMING):
        first.on_loss = noted.append
        other = meeting(1).connect()
        other.set("beat/1", "1")  # beats once
        wait_for(lambda: ended and noted)
    assert "error: rank 1 on beta has not answered for" in capsys.readouterr().err
    assert set(ended) == {4} and "rank 1 on beta" in noted[0] and "train.resume=auto" in noted[0]


def test_an_error_of_one_rank_reaches_the_others(meeting, ended):
    with pytest.raises(RankLost) as lost, Heartbeat(meeting(0), TIMING) as first:
        with pytest.raises(DataError), Heartbeat(meeting(1), TIMING), Heartbeat(meeting(2), TIMING):
            wait_for(lambda: b"" not in first._peers._beats)
            raise DataError("rows.jsonl:3: no target\nhelp: remove it")
        with first.explained():
            raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:1")
    assert "rank 2 on beta failed: rows.jsonl:3: no target\n" in str(lost.value) and ended == []
    assert "train.resume=auto" in str(lost.value) and lost.value.exit_code == 4


def test_an_error_that_is_not_of_a_collective_operation_stays_as_it_is(meeting):
    with pytest.raises(RuntimeError, match="shapes"), Heartbeat(meeting(0), TIMING) as alone, alone.explained():
        raise RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="gloo"), Heartbeat(None) as single, single.explained():
        raise RuntimeError("gloo/transport: closed")


def test_a_stop_by_a_signal_is_no_failure(meeting, ended):
    with Heartbeat(meeting(0), TIMING) as first:
        with pytest.raises(Interrupted), Heartbeat(meeting(1), TIMING), Heartbeat(meeting(2), TIMING):
            wait_for(lambda: b"" not in first._peers._beats)
            raise Interrupted(15, "stopped")
        wait_for(lambda: first._peers._beats[1:] == [b"ended", b"ended"])
        time.sleep(2 * TIMING.lost)
        assert first._peers.failure == "" and ended == []


def test_ranks_meet_under_a_name_of_their_own_each_time(monkeypatch):
    """As after a restart: the store has the keys of the attempt before."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    names = [_attempt(monkeypatch, first) for first in (1, 0, 1)]
    assert len(set(names)) == 3


def _attempt(monkeypatch, first: int) -> str:
    """Return the name under which two ranks meet, if rank `first` comes half a second before the other."""
    found: dict[int, Meeting | None] = {}
    threads = []
    for rank in (first, 1 - first):
        # The environment is read before the thread waits for the other rank.
        monkeypatch.setattr(os, "environ", os.environ | {"RANK": str(rank), "LOCAL_RANK": "0"})
        threads.append(threading.Thread(target=lambda rank=rank: found.update({rank: meet(60)})))
        threads[-1].start()
        time.sleep(0.5)
    for thread in threads:
        thread.join()
    attempts = [each.attempt for each in found.values() if each is not None]
    assert len(attempts) == 2 and attempts[0] == attempts[1]
    return attempts[0]


def test_a_rank_that_does_not_come_is_named(monkeypatch, store):
    given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**given, "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankLost, match=r"ranks: 1, 2 of 3"):
        meet(0.3)


def test_a_single_process_meets_nobody(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert meet(0) is None
