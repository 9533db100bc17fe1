"""One run of a sweep in a process of its own, whose end is known however it comes."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

_KEPT_LINES = 40
_LONGEST_ERROR = 2000


@dataclass
class Stop:
    """SIGINT and SIGTERM while a sweep goes on: passed to the run that is going on, which saves a checkpoint.

    received: 0, or the first signal. A run has a process group of its own, so a Ctrl+C reaches it once, through here.
    """

    received: int = 0
    _process: subprocess.Popen[str] | None = None
    _previous: dict[int, object] = field(default_factory=dict)

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # not in the main thread: signals stay with whoever started this one
                self._previous[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def watch(self, process: subprocess.Popen[str] | None) -> None:
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


def run_process(command: Sequence[str], log: Path, stop: Stop) -> tuple[int, str]:
    """Run a command to its end; what it prints goes to stderr and to `log`.

    Returns: its exit code (128 + the signal that ended it), and its last error message, empty if it told none.
    Raises: OSError if it cannot be started.
    """
    last: deque[str] = deque(maxlen=_KEPT_LINES)
    with log.open("a", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            encoding="utf-8", errors="replace", start_new_session=True, preexec_fn=_end_with_parent(),
        )  # fmt: skip
        stop.watch(process)
        assert process.stdout is not None
        reader = threading.Thread(target=_copy, args=(process.stdout, file, last), daemon=True)
        reader.start()
        code = process.wait()
        stop.watch(None)
        reader.join()
    return (code if code >= 0 else 128 - code), _error_in(last)


def _copy(stream: IO[str], file: IO[str], last: deque[str]) -> None:
    for line in stream:
        file.write(line)
        file.flush()
        last.append(line.rstrip("\n"))
        sys.stderr.write(line)
        sys.stderr.flush()


def _error_in(lines: Sequence[str]) -> str:
    """The last message that starts with `error:`, to its end; else the last line."""
    starts = [i for i, line in enumerate(lines) if line.startswith("error")]
    found = list(lines)[starts[-1] :] if starts else list(lines)[-1:]
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
