"""Run one training of a sweep in its own process."""

from __future__ import annotations

import codecs
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from finetune.system.locks import locked
from finetune.system.signals import StopSignals

_KEPT_CHARACTERS = 20_000
_POLL_SECONDS = 0.1
_LONGEST_ERROR = 2000
_LONGEST_WAIT_SECONDS = 60


class Stop(StopSignals):
    """Pass signals on to the running process, which saves a checkpoint.

    The process has its own process group, so a Ctrl+C reaches it once, through here.
    """

    def __init__(self) -> None:
        super().__init__(lambda number, again: self._send(number))
        self._process: subprocess.Popen[bytes] | None = None

    def watch(self, process: subprocess.Popen[bytes] | None) -> None:
        """Pass signals on to this process from now on, and one that came while it started."""
        self._process = process
        if process is not None and self.received:
            self._send(self.received)

    def _send(self, number: int) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


def wait_until_free(folder: Path, stop: Stop) -> None:
    """Wait, for up to a minute, until the run of a killed sweep has saved its checkpoint and unlocked its folder."""
    lock = folder / ".lock"
    end = time.monotonic() + _LONGEST_WAIT_SECONDS
    while lock.exists() and not stop.received and time.monotonic() < end:
        with suppress(OSError), locked(lock, 0) as free:
            if free:
                return
        time.sleep(_POLL_SECONDS)


def run_process(command: Sequence[str], log: Path, stop: Stop) -> tuple[int, str]:
    """Run a command to its end; append its output to the file `log`, and copy it to stderr.

    The command writes to a file only, so it can still save its checkpoint if this process is killed.

    Returns:
        The exit code (128 + the signal that ended it), and the last error message, which may be empty.

    Raises:
        OSError: the command cannot be started.
    """
    with log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_terminate_with_parent(),
        )
    stop.watch(process)
    output = _follow(log, begin, process)
    stop.watch(None)
    code = process.wait()
    return (code if code >= 0 else 128 - code), _error_in(output.splitlines())


def _follow(log: Path, begin: int, process: subprocess.Popen[bytes]) -> str:
    """Copy the log to stderr until the process ends, and return the end of it."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    output = ""
    with log.open("rb") as file:
        file.seek(begin)
        ended = False
        while not ended:
            ended = process.poll() is not None  # polled first, so that the read below is complete
            text = decoder.decode(file.read(), final=ended)
            sys.stderr.write(text)
            sys.stderr.flush()
            output = (output + text)[-_KEPT_CHARACTERS:]
            if not ended:
                time.sleep(_POLL_SECONDS)
    return output


def _error_in(lines: Sequence[str]) -> str:
    """Return the last message that starts with `error:`, to its end; otherwise the last line."""
    starts = [i for i, line in enumerate(lines) if line.startswith("error")]
    found = lines[starts[-1] :] if starts else lines[-1:]
    return "\n".join(found).removeprefix("error: ").strip()[:_LONGEST_ERROR]


def _terminate_with_parent() -> Callable[[], None] | None:
    """Let Linux send the process SIGTERM when this one ends, so that `kill -9` on a sweep leaves no run behind."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
    return lambda: library.prctl(set_parent_death_signal, signal.SIGTERM)
