"""An output folder that is whole or not there: filled under another name, then renamed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.system.atomic import is_disk_full, sync
from finetune.system.errors import ConfigError, FinetuneError, ResourceError

_MADE_FROM = ".made_from.json"
# Text files, and what a file system needs for itself.
_SPARE_BYTES = 32 << 20


class KeepPartial(FinetuneError):
    """Ends a command without its folder, and keeps what is written so far for the next start."""


@contextmanager
def staged(out: Path, needed_bytes: int, made_from: dict[str, Any] | None = None) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` at the end of the block, and is removed if the block fails.

    needed_bytes: that will be written; there must be room for them. made_from: everything that decides the content;
    the files of an earlier start that was made from the same are still there then, if it was interrupted. None: each
    start begins anew.
    Raises: ConfigError if `out` is there already, or another process is writing it; ResourceError if the disk is full.
    """
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise ConfigError(f"out={out}: there is something already; name a new folder, or remove that one")
    temporary = out.with_name(f".{out.name}.partial")
    lock = _claim(temporary, out)
    try:
        _prepare(temporary, made_from)
        check_room(temporary, out, needed_bytes)
        yield temporary
        _put_in_place(temporary, out)
    except BaseException as error:
        if not (made_from is not None and isinstance(error, KeyboardInterrupt | KeepPartial)):
            shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_full(error):
            raise ResourceError(
                f"out={out}: the disk is full; free space or name another disk; nothing was kept"
            ) from error
        raise
    finally:
        os.close(lock)


@contextmanager
def scratch(out: Path, what: str) -> Iterator[Path]:
    """A folder beside `out`, gone after the block; one that a killed process left behind is taken over. Use it inside
    `staged`, whose lock is for it as well.
    """
    folder = out.with_name(f".{out.name}.{what}")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_room(folder: Path, out: Path, needed_bytes: int) -> None:
    """Raises: ResourceError if a disk has no room for what will be written to `folder`, less what is there already."""
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if free < (missing := needed_bytes - there + _SPARE_BYTES):
        raise ResourceError(
            f"out={out}: {missing / 1e9:,.2f} GB are needed and {free / 1e9:,.2f} GB are free there; free space or "
            "name a folder on another disk"
        )


def _claim(folder: Path, out: Path) -> int:
    """A lock on the temporary folder, held until its descriptor is closed or the process dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(f"out={out}: another process is writing it; wait for it or name another folder") from error
    return descriptor


def _prepare(folder: Path, made_from: dict[str, Any] | None) -> None:
    """Keep what an earlier start has written if it was made from the same; empty the folder otherwise."""
    record = folder / _MADE_FROM
    text = json.dumps(made_from, sort_keys=True)
    if made_from is None or not record.is_file() or record.read_text(encoding="utf-8") != text:
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    if made_from is not None:
        record.write_text(text, encoding="utf-8")


def _put_in_place(temporary: Path, out: Path) -> None:
    (temporary / _MADE_FROM).unlink(missing_ok=True)
    for path in temporary.rglob("*"):
        sync(path)
    sync(temporary)
    if out.exists():
        out.rmdir()  # it was empty
    temporary.rename(out)
    sync(out.parent)
