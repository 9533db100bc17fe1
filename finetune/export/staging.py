"""Fill an output folder under a temporary name, then rename it: it is complete or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.models.hub import TOKENIZER_FILES
from finetune.system.atomic import commit_folder, refuse_existing
from finetune.system.errors import ConfigError, FinetuneError, ResourceError, os_errors_as
from finetune.system.format import format_bytes
from finetune.system.locks import try_lock

_MADE_FROM, _LOCK = ".made_from.json", ".lock"
_FULL = "free space, or name a folder on another disk"
# For text files and the file system itself.
_SPARE_BYTES = 32 << 20
# vocab.json and merges.txt belong to slow tokenizers.
_SLOW_FILES = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
TOKENIZER_COPIES = (*TOKENIZER_FILES, *_SLOW_FILES, "chat_template.jinja")
# Settings with which a processor reads media.
PROCESSOR_COPIES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
# The template of a processor in older checkpoints. transformers prefers chat_template.jinja.
OLD_TEMPLATE = "chat_template.json"
# Files of a model that are copied unchanged.
MODEL_COPIES = ("generation_config.json", *PROCESSOR_COPIES, OLD_TEMPLATE, *TOKENIZER_COPIES, "README.md")


class KeepPartial(FinetuneError):
    """End a command without its folder, and keep the written files for the next start."""


@contextmanager
def staged(out: Path, needed_bytes: int, made_from: dict[str, Any] | None = None) -> Iterator[Path]:
    """Yield a folder beside `out` that is renamed to `out` after the block, and removed if the block fails.

    Args:
        made_from: everything that decides the content. The folder then still holds the files of an interrupted start
            with an equal value. None: it is empty.

    Raises:
        ConfigError: `out` exists, or another process writes it.
        ResourceError: the disk has too little room, or is full.
    """
    refuse_existing(out)
    temporary = out.with_name(f".{out.name}.partial")
    with os_errors_as(ConfigError, f"out={out}: cannot be written"):
        temporary.mkdir(parents=True, exist_ok=True)
        lock = try_lock(temporary / _LOCK)
    if lock is None:
        raise ConfigError(f"out={out}: another process writes it; wait for it or name another folder")
    try:
        _prepare(temporary, made_from)
        check_room(temporary, out, needed_bytes)
        yield temporary
        for name in (_MADE_FROM, _LOCK):
            (temporary / name).unlink(missing_ok=True)
        if out.exists():
            out.rmdir()  # It is empty.
        commit_folder(temporary, out)
    except BaseException as error:
        if not (made_from is not None and isinstance(error, KeyboardInterrupt | KeepPartial)):
            shutil.rmtree(temporary, ignore_errors=True)
        with os_errors_as(FinetuneError, f"out={out}: cannot be written, so nothing was kept", _FULL):
            raise
    finally:
        lock.release()


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out` that is removed after the block; use it inside `staged`, which locks it."""
    folder = out.with_name(f".{out.name}.scratch")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def copy_files(source: Path, out: Path, names: Sequence[str]) -> None:
    """Copy the named files that exist in source."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def check_room(folder: Path, out: Path, needed_bytes: int) -> None:
    """Raise ResourceError if the disk has no room for needed_bytes, less the bytes that `folder` already holds."""
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if free < (missing := needed_bytes - there + _SPARE_BYTES):
        raise ResourceError(
            f"out={out}: {format_bytes(missing)} are needed, found {format_bytes(free)} free; free space or name a "
            "folder on another disk"
        )


def _prepare(folder: Path, made_from: dict[str, Any] | None) -> None:
    """Keep the files of an earlier start with an equal made_from; otherwise empty the folder."""
    record = folder / _MADE_FROM
    text = json.dumps(made_from, sort_keys=True)
    if made_from is None or not record.is_file() or record.read_text(encoding="utf-8") != text:
        for path in (path for path in folder.iterdir() if path.name != _LOCK):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    if made_from is not None:
        record.write_text(text, encoding="utf-8")
