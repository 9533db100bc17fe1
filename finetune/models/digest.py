"""SHA-256 of weight files, computed once and remembered until a file changes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from finetune.system.atomic import write_text
from finetune.system.errors import IntegrityError
from finetune.system.locks import locked
from finetune.system.manifest import sha256_of
from finetune.system.sealed import seal, unseal

# hashlib releases the GIL. More readers only slow a disk down.
_THREADS = 4
# A file that changed more recently may change again within one tick of the file system's clock.
_SETTLED_NANOSECONDS = 2_000_000_000


def weights_digest(files: Sequence[Path], memory: Path) -> dict[str, str]:
    """Return the SHA-256 of each file's content, by file name.

    memory: a folder of known sums; where it cannot be written, every file is read. A file with unchanged size, inode,
    modification and change time is not read again. The change time cannot be set back, except by the machine's clock;
    some network file systems do not store it.

    Raises:
        OSError: a file cannot be read.
        IntegrityError: a file of the hub's cache is corrupt.
    """
    with suppress(OSError):
        memory.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_THREADS) as threads:
        digests = list(threads.map(lambda file: _remembered(file, memory), files))
    return {file.name: digest for file, digest in zip(files, digests, strict=True)}


def check_downloads(files: Iterable[Path], memory: Path) -> None:
    """Compare files in the hub's cache with their SHA-256, which is their name there; once, until they change.

    Other files have no sum to compare with. memory: as in `weights_digest`.

    Raises:
        IntegrityError: names a corrupt file.
    """
    if named := [file for file in sorted(set(files)) if _sum_in_name(file) is not None]:
        weights_digest(named, memory)


def base_fingerprint(model_name: str) -> str | None:
    """Hash the names, sizes and safetensors headers of the weight files of a local base; None for a hub model."""
    files = sorted(Path(model_name).glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            header_bytes = min(int.from_bytes(stream.read(8), "little"), 2**27)
            digest.update(f"{file.name}:{file.stat().st_size};".encode() + stream.read(header_bytes))
            digest.update(stream.read(2**20))
    return digest.hexdigest()


def identity(file: Path) -> dict[str, Any]:
    """Return the properties that change when a file is written or replaced."""
    real = file.resolve()
    stat = real.stat()
    return {
        "path": str(real),
        "size_bytes": stat.st_size,
        "inode": stat.st_ino,
        "written_ns": stat.st_mtime_ns,
        "changed_ns": stat.st_ctime_ns,
    }


def _remembered(file: Path, memory: Path) -> str:
    known = memory / f"{hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:32]}.json"
    if digest := _recall(known, identity(file)):
        return digest
    # Of several ranks, one reads the file and the others read its result.
    with ExitStack() as turn:
        with suppress(OSError):
            turn.enter_context(locked(known.with_suffix(".lock")))
        before = identity(file)
        if digest := _recall(known, before):
            return digest
        digest = sha256_of(file)
        if _sum_in_name(file) not in (None, digest):
            raise IntegrityError(
                f"{file}: corrupt, its SHA-256 is not that of the hub\n"
                f"help: remove {file.resolve()}, and it is fetched again"
            )
        # Negative where the file has a time in the future.
        if before == identity(file) and time.time_ns() - before["changed_ns"] > _SETTLED_NANOSECONDS:
            with suppress(OSError):
                write_text(known, json.dumps(seal({**before, "digest": digest})))
    return digest


def _sum_in_name(file: Path) -> str | None:
    """Return the SHA-256 that the hub's cache gives a file as its name; None for other files."""
    name = file.resolve().name
    return name if len(name) == 64 and set(name) <= set("0123456789abcdef") else None


def _recall(known: Path, found: dict[str, Any]) -> str | None:
    try:
        then = unseal(json.loads(known.read_text(encoding="utf-8")))
        digest = then.pop("digest")
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return None
    return digest if then == found and isinstance(digest, str) and len(digest) == 64 else None
