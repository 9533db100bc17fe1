"""One run of a sweep in a process of its own, whose end is known however it comes."""

from __future__ import annotations

import codecs
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

_KEPT_CHARACTERS = 20_000
_SECONDS_BETWEEN_LOOKS = 0.1
_LONGEST_ERROR = 2000
_LONGEST_WAIT_SECONDS = 60


@dataclass
class Stop:
    """SIGINT and SIGTERM while a sweep goes on: passed to the run that is going on, which saves a checkpoint.

    received: 0, or the first signal. A run has a process group of its own, so a Ctrl+C reaches it once, through here.
    """

    received: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _previous: dict[int, object] = field(default_factory=dict)

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # not in the main thread: signals stay with whoever started this one
                self._previous[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def watch(self, process: subprocess.Popen[bytes] | None) -> None:
        """The run that signals go to from now on. One that came while it was being started is passed on here."""
        self._process = process
        if process is not None and self.received:
            self._send(self.received)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        self._send(number)

    def _send(self, number: int) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


def wait_until_free(folder: Path, stop: Stop) -> None:
    """Give a run that a killed sweep has left the time to save its checkpoint and to unlock its folder; where it does
    not end, the next run into that folder says so itself.
    """
    lock = folder / ".lock"
    end = time.monotonic() + _LONGEST_WAIT_SECONDS
    while lock.exists() and not stop.received and time.monotonic() < end:
        with lock.open("w") as file, suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def run_process(command: Sequence[str], log: Path, stop: Stop) -> tuple[int, str]:
    """Run a command to its end; what it prints goes to `log`, and from there to stderr.

    So it never writes to this process, and can save its checkpoint when this one has been killed.
    Returns: its exit code (128 + the signal that ended it), and its last error message, empty if it told none.
    Raises: OSError if it cannot be started.
    """
    with log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent(),
        )
    stop.watch(process)
    told = _follow(log, begin, process)
    stop.watch(None)
    code = process.wait()
    return (code if code >= 0 else 128 - code), _error_in(told.splitlines())


def _follow(log: Path, begin: int, process: subprocess.Popen[bytes]) -> str:
    """Print what is written into the log until the process ends; returns the end of it."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    told = ""
    with log.open("rb") as file:
        file.seek(begin)
        ended = False
        while not ended:
            ended = process.poll() is not None  # looked at first, so that what is read next is all there is
            text = decoder.decode(file.read(), final=ended)
            sys.stderr.write(text)
            sys.stderr.flush()
            told = (told + text)[-_KEPT_CHARACTERS:]
            if not ended:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
    return told


def _error_in(lines: Sequence[str]) -> str:
    """The last message that starts with `error:`, to its end; else the last line."""
    starts = [i for i, line in enumerate(lines) if line.startswith("error")]
    found = lines[starts[-1] :] if starts else lines[-1:]
    return "\n".join(found).removeprefix("error: ").strip()[:_LONGEST_ERROR]


def _end_with_parent() -> Callable[[], None] | None:
    """What a run does before it starts: ask Linux for SIGTERM when this process ends, so that `kill -9` on a sweep
    leaves no run behind; it saves a checkpoint and stops.
    """
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
    return lambda: library.prctl(set_parent_death_signal, signal.SIGTERM)
