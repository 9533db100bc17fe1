"""The user's terminal: messages, progress, and text of others made safe to print."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Log = Callable[[str], None]
"""Receives one message for the user."""

_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_VISIBLE |= {0x7F: 0x2421}
_VISIBLE |= {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}


def printable(text: str) -> str:
    """The text with every control character but tab and newline made visible (escape becomes ␛).

    Answers of a model and rows of a file can hold escape sequences that recolor, rename or retype a terminal.
    """
    return text.translate(_VISIBLE)


def log(text: str) -> None:
    """A message, on stderr; in a notebook, which colors that as an error, on stdout."""
    print(text, file=sys.stdout if in_notebook() else sys.stderr, flush=True)


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this code."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


@contextmanager
def progress_bar(what: str, size_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal, told of bytes; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=size_bytes)
        yield lambda count: progress.advance(task, count)
