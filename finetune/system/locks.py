"""Locks between processes. The system releases a lock when its process ends, also when it is killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

Lock = FileLock


def try_lock(file: Path, wait_seconds: float = 0) -> Lock | None:
    """Lock a file until `release()`, or return None if another process holds it for all of `wait_seconds`.

    The file is made where it is missing and stays. Raises OSError if it cannot be written.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=wait_seconds)
    except Timeout:
        return None
    return lock


@contextmanager
def locked(file: Path, wait_seconds: float = -1) -> Iterator[bool]:
    """Hold the lock of a file during the block; yield False if another process holds it. -1 waits without limit."""
    lock = try_lock(file, wait_seconds)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()
