"""Notice that another rank is gone: each rank beats in the launcher's store, and reads the beats of the others.

A rank that is killed, stopped or cut off leaves the others in a collective operation that never ends, or ends it with
an error that names an address. Here they learn its number and host, write them down, and end, so that the launcher can
start the ranks again. Work that takes long is no loss: a thread beats while a rank tokenizes for hours.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch.distributed as dist

from finetune.parallel.join import Meeting, first_line
from finetune.system.console import report_error
from finetune.system.errors import FinetuneError, Interrupted, RankLost
from finetune.system.signals import StopSignals

ADVICE = "help: start the run again with train.resume=auto; `torchrun --max-restarts=3` does so by itself"
_ENDED = "ended"
_FAILURE = "failure"
# Parts of gloo's errors when another process closes a connection or does not answer.
_OF_GLOO = ("gloo/transport", "Gloo connectFullMesh")


@dataclass(frozen=True)
class Timing:
    """When a rank counts as lost, in seconds.

    Attributes:
        beat: between two beats.
        lost: a rank whose beat has stayed the same for so long is lost.
        broken: the same, once a collective operation has failed or a signal asks this rank to end.
        grace: which the main thread has to end by itself.
    """

    beat: float = 2.0
    lost: float = 60.0
    broken: float = 10.0
    grace: float = 10.0


TIMING = Timing()


class Peers:
    """What a rank knows of the others, by its own clock: those of two hosts may differ, or be set."""

    def __init__(self, meeting: Meeting, timing: Timing, clock: Callable[[], float] = time.monotonic):
        self._hosts, self._rank, self._address = meeting.hosts, meeting.rank, "{}:{}".format(*meeting.address)
        self._server = "the agent of rank 0" if meeting.by_agent else "rank 0"
        self._timing, self._clock = timing, clock
        self._beats = [b""] * len(meeting.hosts)
        self.failure, self.store_error = "", ""
        self._looked = self._answered = clock()
        self._changed = [self._answered] * len(meeting.hosts)

    def update(self, beats: Sequence[bytes], failure: str) -> None:
        """Take what the store holds: the beat of each rank, and the first failure that a rank has reported."""
        now = self._clock()
        for rank, beat in enumerate(beats):
            if beat != self._beats[rank]:
                self._beats[rank], self._changed[rank] = beat, now
        self._answered, self.failure = now, failure

    def look(self) -> None:
        """Note that this process runs. After a time in which it did not, every rank has its full time again."""
        now = self._clock()
        if now - self._looked > self._timing.broken / 2:
            self._answered, self._changed = now, [now] * len(self._changed)
        self._looked = now

    def lost(self, after_seconds: float) -> str | None:
        """Return which ranks are lost, with their hosts; None if all have answered within `after_seconds`."""
        now = self._clock()
        if now - self._answered > after_seconds or (self.store_error and after_seconds <= self._timing.broken):
            at = f"{self._server} on {self._hosts[0]}"
            if self.store_error:
                return f"{at} has closed its connection at {self._address}: {self.store_error}"
            return f"{at} has not answered at {self._address} for {now - self._answered:.0f} s"
        silent: dict[str, list[str]] = {}
        for rank, host in enumerate(self._hosts):
            if (
                rank != self._rank
                and self._beats[rank] != _ENDED.encode()
                and now - self._changed[rank] > after_seconds
            ):
                silent.setdefault(host, []).append(str(rank))
        if not silent:
            return None
        named = " and ".join(f"rank{'s' * (len(r) > 1)} {', '.join(r)} on {host}" for host, r in silent.items())
        several = sum(map(len, silent.values())) > 1
        return f"{named} {'have' if several else 'has'} not answered for {after_seconds:.0f} s"


class Heartbeat:
    """The beats of this rank and its watch over the others, during a `with` block. Without other ranks it does nothing.

    If the main thread is in a collective operation when a rank is lost, the process ends from the watching thread.

    Attributes:
        on_loss: called with the error message before such an end.
    """

    def __init__(self, meeting: Meeting | None, timing: Timing | None = None):
        """Prepare to watch the ranks that have met; None for a process without others. timing: TIMING if None."""
        self.on_loss: Callable[[str], None] = lambda message: None
        self._meeting, self._timing = meeting, timing or TIMING
        self._wake, self._said, self._leaving = threading.Event(), threading.Event(), threading.Event()
        self._words = ""
        self._broken = self._asked_to_end = False
        if meeting is not None:
            self._peers = Peers(meeting, self._timing)
            self._beats = threading.Thread(target=self._exchange, args=(meeting,), name="beats", daemon=True)
            self._watch = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Self:
        if self._meeting is not None:
            self._signals, wakeup = os.pipe()
            os.set_blocking(wakeup, False)
            self._wakeup, self._previous = wakeup, -1
            # A handler runs only when the main thread is back in Python. The number of a signal comes here at once.
            with suppress(ValueError):  # outside the main thread
                self._previous = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
            self._beats.start()
            self._watch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if (meeting := self._meeting) is None:
            return
        if isinstance(error, RankLost):
            self._say(first_line(error))
        elif error is not None and not isinstance(error, Interrupted):
            name = "" if isinstance(error, FinetuneError) else f"{type(error).__name__}: "
            self._say(f"rank {meeting.rank} on {meeting.hosts[meeting.rank]} failed: {name}{first_line(error)}")
        self._leaving.set()
        self._wake.set()
        self._beats.join(2 * self._timing.beat)
        self._watch.join()
        with suppress(ValueError):
            signal.set_wakeup_fd(self._previous)
        os.close(self._wakeup)
        os.close(self._signals)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn the error of a collective operation into one that names the lost rank. Raises: RankLost."""
        try:
            yield
        except RuntimeError as error:
            if self._meeting is None or not _is_of_contact(error):
                raise
            # A launcher that has noticed sends SIGTERM, which outside of a step would end the process at once.
            with StopSignals(lambda number, again: None):
                raise RankLost(f"{self._who_is_lost(error)}\n{ADVICE}") from error

    def _who_is_lost(self, error: RuntimeError) -> str:
        self._broken = True
        self._wake.set()
        deadline = time.monotonic() + self._timing.broken + 2 * self._timing.beat
        while time.monotonic() < deadline:
            if found := self._peers.failure or self._peers.lost(self._timing.broken):
                return found
            time.sleep(self._timing.beat / 10)
        return f"ranks: a collective operation failed, and every rank still answers: {first_line(error)}"

    def _exchange(self, meeting: Meeting) -> None:
        """Beat, report, and read, until the block is left or the store is gone."""
        beats = [f"beat/{rank}" for rank in range(len(meeting.hosts))]
        try:
            store = meeting.connect()
            for name in beats:
                store.add(name, 0)  # Reading a missing key would wait.
            while not self._leaving.is_set():
                words = self._words
                store.compare_set(_FAILURE, "", words)
                store.add(beats[meeting.rank], 1)
                *found, failure = store.multi_get([*beats, _FAILURE])
                self._peers.update(found, failure.decode())
                if words:
                    self._said.set()
                self._wake.wait(self._timing.beat)
                self._wake.clear()
            store.set(beats[meeting.rank], _ENDED)
        except RuntimeError as error:
            self._peers.store_error = first_line(error)
            self._said.set()  # Nobody is left to tell.

    def _say(self, words: str) -> None:
        """Report a failure to the other ranks. The first one reported stands."""
        self._words = words
        self._wake.set()
        self._said.wait(2 * self._timing.beat)
        if self._meeting is not None and self._meeting.serves and not self._peers.store_error:
            time.sleep(2 * self._timing.beat)  # The store ends with this process: the others must read it before.

    def _look(self) -> None:
        """Watch until the block is left, and end the process if a rank is lost."""
        named, ends_at = None, 0.0
        while not self._leaving.is_set():
            if select.select([self._signals], [], [], self._timing.beat / 4)[0]:
                self._asked_to_end |= bool({signal.SIGTERM, signal.SIGINT} & set(os.read(self._signals, 64)))
            self._peers.look()
            if named is None:
                hurries = self._broken or self._asked_to_end
                reported = self._peers.failure
                named = reported or self._peers.lost(self._timing.broken if hurries else self._timing.lost)
                ends_at = time.monotonic() + (self._timing.grace if reported or self._broken else 0)
            if named is not None and time.monotonic() >= ends_at and not self._leaving.is_set():
                self._end(named)

    def _end(self, named: str) -> None:
        message = f"{named}\n{ADVICE}"
        report_error(message)
        self._say(named)

        def close() -> None:
            self.on_loss(message)
            sys.stdout.flush()

        closing = threading.Thread(target=close, daemon=True)  # May hang, as on a disk of the lost host.
        closing.start()
        closing.join(self._timing.grace)
        os._exit(RankLost.exit_code)


def _is_of_contact(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(part in str(error) for part in _OF_GLOO)
