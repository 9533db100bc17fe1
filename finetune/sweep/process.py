"""Run one training of a sweep in its own process."""

from __future__ import annotations

import codecs
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from finetune.system.locks import locked
from finetune.system.signals import StopSignals

_KEPT_CHARACTERS = 20_000
_POLL_SECONDS = 0.1
_LONGEST_ERROR = 2000
_LONGEST_WAIT_SECONDS = 60
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


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
    # Linux sends the process SIGTERM when this one ends, so that `kill -9` on a sweep leaves no run behind.
    on_linux = sys.platform == "linux"
    die_with_parent = partial(ctypes.CDLL(None).prctl, _PR_SET_PDEATHSIG, signal.SIGTERM) if on_linux else None
    with log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    stop.watch(process)
    lines = _follow(log, begin, process).splitlines()
    stop.watch(None)
    code = process.wait()
    # The last message that starts with `error:`, to its end; otherwise the last line.
    start = max((i for i, line in enumerate(lines) if line.startswith("error")), default=-1)
    message = "\n".join(lines[start:]).removeprefix("error: ").strip()[:_LONGEST_ERROR]
    return (code if code >= 0 else 128 - code), message


def _follow(log: Path, begin: int, process: subprocess.Popen[bytes]) -> str:
    """Copy the log to stderr until the process ends, and return the end of it."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    output, ended = "", False
    with log.open("rb") as file:
        file.seek(begin)
        while not ended:
            ended = process.poll() is not None  # polled first, so that the read below is complete
            text = decoder.decode(file.read(), final=ended)
            sys.stderr.write(text)
            sys.stderr.flush()
            output = (output + text)[-_KEPT_CHARACTERS:]
            if not ended:
                time.sleep(_POLL_SECONDS)
    return output
