"""Run another program as a child that never outlives this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from finetune.system.console import log, printable
from finetune.system.errors import FinetuneError, Interrupted
from finetune.system.signals import StopSignals

_LINES = 20
_POLL_SECONDS = 0.2
# Linux ends the program when this process dies, even by SIGKILL. The check is for a death before the call.
_START = (
    "import ctypes, os, signal, sys\n"
    "if sys.platform == 'linux': ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"
    "if os.getppid() == int(sys.argv[1]): os.execvp(sys.argv[2], sys.argv[2:])\n"
)


class Ended(Exception):
    """A signal asked this process to end."""


class Child:
    """A running program. Its output goes to stderr, and the last lines are kept."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]):
        """Start the program in a process group of its own, so that Ctrl+C reaches it only from here."""
        self._name = os.path.basename(words[0])
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(os.getpid()), *words],
            # A program in Python writes its lines as they come, so that the last ones are those before its end.
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.signals: list[int] = []  # that asked this process to end

    def wait(self, until: Callable[[], bool] = lambda: False) -> None:
        """Wait until a condition holds, which is tried again and again.

        Raises:
            FinetuneError: the program ended by itself; with its last lines.
            Ended: a signal came.
        """
        while not until():
            with suppress(subprocess.TimeoutExpired):
                code = self._process.wait(_POLL_SECONDS)
                if self.signals:
                    raise Ended
                self._reader.join(1.0)
                last = "\n".join(f"  {line}" for line in self._lines)
                raise FinetuneError(f"{self._name} ended by itself, exit code {code}; its last lines:\n{last}")
            if self.signals:
                raise Ended

    def signal(self, number: int) -> None:
        """Send a signal to every process of the program."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def end(self, seconds: float) -> bool:
        """Wait for the end after a signal, then kill what is left of the group; return whether it ended in time."""
        in_time = True
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            in_time = False
        self.signal(signal.SIGKILL)
        self._process.wait()
        self._reader.join(1.0)
        return in_time

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(printable(line.rstrip("\n")))
            print(self._lines[-1], file=sys.stderr)


@contextmanager
def running(words: Sequence[str], environment: Mapping[str, str], drain_seconds: float) -> Iterator[Child]:
    """Run a program during the block. SIGTERM and Ctrl+C are passed on and end the block normally.

    Args:
        words: the program and its arguments.
        environment: variables beside those of this process.
        drain_seconds: time to end after a signal; then it is killed.

    Raises:
        Interrupted: a second signal killed the program.
    """

    def on_signal(number: int, again: bool) -> None:
        child.signals.append(number)
        child.signal(signal.SIGKILL if again else number)

    child = Child(words, environment)
    with StopSignals(on_signal):
        try:
            yield child
        except Ended:
            pass
        finally:
            if not child.signals:
                child.signal(signal.SIGTERM)
            if not child.end(drain_seconds):
                log(f"WARNING: serve.drain_seconds={drain_seconds:g} passed; {words[0]} was killed")
    if len(child.signals) > 1:
        raise Interrupted(child.signals[-1], "ended by a second signal; running answers were cut")
