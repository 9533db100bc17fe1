"""Files that are never seen half-written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from finetune.system.errors import InputError


def sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Whether the system refused bytes for want of room; safetensors wraps its error into words of its own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return type(error).__name__ == "SafetensorError" and "space" in str(error).lower()


def write_text(path: Path, text: str) -> None:
    """Replace a file in one rename, so that no reader ever sees half of it."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


@contextmanager
def whole_file(word: str, path: str, replace: bool = True) -> Iterator[IO[str]]:
    """A UTF-8 text stream that becomes the file at the end of the block, and nothing if the block fails.

    word: what the user called the file on the command line, for messages. replace: whether a file may be there already.
    It is opened before the block's work is done, so a place that cannot be written to is known at once.
    Raises: InputError if it cannot be written there, or is there and may not be replaced.
    """
    target = Path(path).expanduser()
    if not path or os.path.isdir(target):
        raise InputError(f"{word}={path}: {'is a folder; name a file in it' if path else 'name a file'}")
    if os.path.lexists(target) and not (replace and os.path.isfile(target)):
        advice = "is no ordinary file; name one" if replace else "the file exists already; remove it or name another"
        raise InputError(f"{word}={path}: {advice}")
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        stream = temporary.open("x", encoding="utf-8", errors="backslashreplace", newline="\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{word}={path}: cannot be written: {getattr(error, 'strerror', error)}") from error
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
