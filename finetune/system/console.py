"""The user's terminal: messages, progress bars, and safe printing of foreign text."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console

Log = Callable[[str], None]
"""Receives one message for the user."""

_COLORS = {"red": 31, "green": 32, "yellow": 33}
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_VISIBLE |= {0x7F: 0x2421}
_VISIBLE |= {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}


def printable(text: str, one_line: bool = False) -> str:
    """Make control characters visible (escape becomes ␛), except tab and newline.

    Answers of a model and rows of a file can hold escape sequences that control a terminal.

    Args:
        one_line: escape every character that is not printable, newlines too, as in a Python string.
    """
    if one_line:
        return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return text.translate(_VISIBLE)


def log(text: str) -> None:
    """Print a message to stderr; in a notebook to stdout, since notebooks color stderr as an error."""
    print(text, file=sys.stdout if in_notebook() else sys.stderr, flush=True)


def report_error(message: str) -> None:
    """Print an error message to stderr, with the rank of a process that is not the first."""
    rank = os.environ.get("RANK", "0")
    head = colored(f"error{'' if rank == '0' else f' (rank {rank})'}:", "red", sys.stderr)
    print(head, printable(message), file=sys.stderr, flush=True)


def in_notebook() -> bool:
    """Return whether a Jupyter kernel runs this code."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def is_plain(stream: IO[str]) -> bool:
    """Return whether a stream takes no colors: a pipe or file, or with NO_COLOR or TERM=dumb."""
    return not stream.isatty() or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") in (None, "", "dumb")


def colored(text: str, color: Literal["red", "green", "yellow"], stream: IO[str]) -> str:
    """Return a text bold and in a color, if the stream takes colors."""
    return text if is_plain(stream) else f"\x1b[1;{_COLORS[color]}m{text}\x1b[0m"


def line_width() -> int:
    """Return the characters of a line: those of the terminal from 80 to 120, elsewhere 120."""
    return min(120, max(80, shutil.get_terminal_size().columns)) if sys.stdout.isatty() else 120


@contextmanager
def silent_keys(terminal: int = 0) -> Iterator[None]:
    """Let the terminal echo no key; keys that are typed meanwhile stay for the next `input()`. terminal: its file."""
    if not os.isatty(terminal):
        yield
        return
    import termios

    before = termios.tcgetattr(terminal)
    changed = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(terminal, termios.TCSANOW, changed)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)


def console_for(stream: IO[str]) -> Console:
    """Build a console that wraps no line, and is plain with NO_COLOR, TERM=dumb or a pipe."""
    from rich.console import Console

    plain = is_plain(stream)
    return Console(
        file=stream,
        color_system=None if plain else "auto",
        force_terminal=not plain,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
    )


@contextmanager
def progress_bar(what: str, size_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar if stderr is a terminal; yield the function that takes the number of new bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=size_bytes)
        yield lambda count: progress.advance(task, count)


class Pace:
    """Limits lines about progress to one in `seconds`."""

    def __init__(self, seconds: float = 10.0):
        self._seconds, self._last = seconds, time.monotonic()

    def is_due(self) -> bool:
        """Return whether a line is due; if so, the next one is due `seconds` later."""
        now = time.monotonic()
        due = now - self._last >= self._seconds
        self._last = now if due else self._last
        return due


@lru_cache(maxsize=1024)
def log_once(text: str) -> None:
    """Print a message the first time, and only in the main process of a launch."""
    if os.environ.get("RANK", "0") == "0":
        log(text)
