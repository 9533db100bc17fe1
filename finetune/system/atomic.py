"""Files and folders that no reader sees half-written: write a temporary one, then rename it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from finetune.system.errors import ConfigError, InputError, ResourceError, is_disk_full


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file by UTF-8 text in one rename."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes, durable: bool = False) -> None:
    """Replace a file in one rename; durable: after its bytes are on the disk."""
    with replaced_file(path, durable) as stream:
        stream.write(content)


@contextmanager
def replaced_file(path: Path, durable: bool = True, buffering: int = -1) -> Iterator[IO[bytes]]:
    """Yield a stream that replaces the file at the end of the block, and nothing if the block fails.

    Args:
        durable: wait until the bytes are on the disk before the rename.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb", buffering) as stream:
            yield stream
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def refuse_existing(out: Path) -> None:
    """Raise ConfigError if `out` exists and is not an empty folder."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise ConfigError(f"out={out}: already exists; name a new folder, or remove that one")


def commit_folder(temporary: Path, folder: Path) -> None:
    """Replace a folder by a temporary one beside it, in one rename, after all its files are on the disk."""
    for path in temporary.rglob("*"):
        sync(path)
    sync(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    sync(folder.parent)


@contextmanager
def whole_file(word: str, path: str, replace: bool = True) -> Iterator[IO[str]]:
    """Yield a UTF-8 text stream that becomes the file at the end of the block, and nothing if the block fails.

    It is opened at once, so that a wrong path fails before the work.

    Args:
        word: name of the path on the command line, for messages.
        replace: whether an existing file is replaced.

    Raises:
        InputError: the file cannot be written, or exists and must not be replaced.
    """
    target = Path(path).expanduser()
    if not path or os.path.isdir(target):
        raise InputError(f"{word}={path}: {'is a folder; name a file in it' if path else 'name a file'}")
    if os.path.lexists(target) and not (replace and os.path.isfile(target)):
        advice = "is not a regular file; name one" if replace else "the file exists already; remove it or name another"
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
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise ResourceError(f"{word}={path}: the disk is full\nhelp: free space, or name another disk") from error
        raise
