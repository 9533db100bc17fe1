"""A cache folder of teacher targets by document, written in shards and verified before use.

    fingerprint.json               origin of the targets; written first
    shard-00000.safetensors        columns with one entry per target; keys and counts with one entry per document
    shard-00000.json               SHA-256 and size of the shard; a shard without it is ignored
    complete.json                  SHA-256 and size of all shards; a shard that it does not list is ignored
    .lock                          held by the one process that writes

Each file appears by a rename. A killed writer can continue, and a corrupt shard is named.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from finetune.distill.codec import Columns
from finetune.distill.fingerprint import KEY_BYTES
from finetune.system.atomic import write_bytes, write_text
from finetune.system.errors import ConfigError, IntegrityError, ResourceError, is_disk_full
from finetune.system.locks import locked
from finetune.system.manifest import sha256_of
from finetune.system.sealed import seal, unseal

FINGERPRINT, COMPLETE = "fingerprint.json", "complete.json"
_KEYS, _COUNTS = "keys", "counts"
_SHARD = re.compile(r"shard-\d{5,}\.safetensors")
# Held in memory until it is written.
_SHARD_BYTES = 16 << 20
_NEW_FOLDER = "write a new folder with finetune cache"
_REMOVE_SHARD = "remove both files with this number and run finetune cache again; it adds the missing documents"


@contextmanager
def open_folder(folder: Path, fingerprint: Mapping[str, Any]) -> Iterator[ShardWriter]:
    """Begin a cache, or continue one of the same origin. On exit, the documents added are written."""
    with ExitStack() as stack:
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not stack.enter_context(locked(folder / ".lock", 0)):
                raise ConfigError(
                    f"distill.cache: another process is writing to {folder}\nhelp: wait for it, or set another folder"
                )
            # Incomplete files of a killed writer.
            half = [shard for shard in folder.glob("shard-*.safetensors") if not shard.with_suffix(".json").exists()]
            for left in (*folder.glob(".*.tmp"), *half):
                left.unlink()
            if not (folder / FINGERPRINT).exists():
                if any(not file.name.startswith(".") for file in folder.iterdir()):
                    raise ConfigError(f"distill.cache: {folder} holds other files; name an empty or a new folder")
                write_text(folder / FINGERPRINT, json.dumps(seal(dict(sorted(fingerprint.items()))), indent=1))
        check_fingerprint(folder, fingerprint)
        notes = {file.with_suffix(".safetensors"): _read(file) for file in sorted(folder.glob("shard-*.json"))}
        _verify(notes)
        writer = ShardWriter(folder)
        for shard in notes:
            with _opened(shard) as tensors:
                writer.stored.update(key.tobytes() for key in tensors.get_tensor(_KEYS))
        stack.callback(writer.flush)
        yield writer


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn the system's errors into ResourceError if the disk is full, else ConfigError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if is_disk_full(error):
            raise ResourceError(
                f"distill.cache: the disk of {folder} is full\nhelp: free some space and start again; it continues"
            ) from error
        raise ConfigError(f"distill.cache: {folder} cannot be written to: {error}") from error


@dataclass
class ShardWriter:
    """Add documents to a folder opened by `open_folder`. stored: keys of the documents in it."""

    folder: Path
    stored: set[bytes] = field(default_factory=set)
    _keys: list[bytes] = field(default_factory=list)
    _columns: list[Columns] = field(default_factory=list)
    _size_bytes: int = 0

    def add(self, key: bytes, columns: Columns) -> None:
        """Add the targets of one document, written once a shard is full."""
        self._keys.append(key)
        self._columns.append(columns)
        self.stored.add(key)
        self._size_bytes += sum(column.nbytes for column in columns.values())
        if self._size_bytes >= _SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the documents added since the last flush. Raises: ResourceError if the disk is full."""
        if not self._keys:
            return
        content = save(
            {name: np.concatenate([part[name] for part in self._columns]) for name in self._columns[0]}
            | {
                _KEYS: np.frombuffer(b"".join(self._keys), np.uint8).reshape(-1, KEY_BYTES),
                _COUNTS: np.array([len(next(iter(part.values()))) for part in self._columns], dtype=np.int32),
            }
        )
        written = sorted(self.folder.glob("shard-*.json"))
        number = int(written[-1].stem.removeprefix("shard-")) + 1 if written else 0
        shard = self.folder / f"shard-{number:05d}.safetensors"
        with _writing(self.folder):
            write_bytes(shard, content, durable=True)
            note = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            write_text(shard.with_suffix(".json"), json.dumps(seal(note)))
        self._keys, self._columns, self._size_bytes = [], [], 0

    def finish(self) -> None:
        """Write the rest and mark the cache as complete."""
        self.flush()
        notes = {file.stem: _read(file) for file in sorted(self.folder.glob("shard-*.json"))}
        with _writing(self.folder):
            text = json.dumps(seal({"shards": {f"{name}.safetensors": note for name, note in notes.items()}}), indent=1)
            write_text(self.folder / COMPLETE, text)


class ShardReader:
    """Read a complete cache by document."""

    def __init__(self, folder: Path):
        """Open a cache.

        Raises:
            ConfigError: it is incomplete.
            IntegrityError: names a shard that is missing or corrupt.
        """
        try:
            shards = dict(_read(folder / COMPLETE)["shards"])
        except FileNotFoundError as error:
            raise ConfigError(
                f"distill.cache: {folder} is not complete\nhelp: run finetune cache with this config; it continues"
            ) from error
        except (LookupError, TypeError, ValueError) as error:
            raise _corrupt(folder / COMPLETE, f"lacks {error}") from error
        if strange := [name for name in shards if not _SHARD.fullmatch(name)]:
            raise _corrupt(folder / COMPLETE, f"it lists {strange[0][:80]!r}, which is no shard")
        files = [folder / name for name in shards]
        _verify(dict(zip(files, shards.values(), strict=True)))
        self._files, self._shards = files, [_opened(file) for file in files]
        counts = [shard.get_tensor(_COUNTS).astype(np.int64) for shard in self._shards]
        none = np.empty(0, np.int64)
        self._shard = np.repeat(np.arange(len(files)), np.array([len(part) for part in counts], np.int64))
        self._starts = np.concatenate([none, *(np.cumsum(part) - part for part in counts)])
        self._counts = np.concatenate([none, *counts])
        keys = _as_words(b"".join(shard.get_tensor(_KEYS).tobytes() for shard in self._shards))
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def check_layout(self, layout: Mapping[str, tuple[str, int]]) -> None:
        """Check the columns of every shard: their names, dtypes and numbers of dimensions, and that all are as wide.

        Raises: IntegrityError naming the first shard that differs.
        """
        widths: dict[str, list[int]] = {}
        for file, shard in zip(self._files, self._shards, strict=True):
            for name, (dtype, dimensions) in layout.items():
                try:
                    found = shard.get_slice(name)
                except SafetensorError as error:
                    raise _corrupt(file, f"it has no column {name}") from error
                shape = found.get_shape()
                width = widths.setdefault(name, shape[1:])
                if found.get_dtype() != dtype or len(shape) != dimensions or shape[1:] != width:
                    raise _corrupt(file, f"its column {name} is {found.get_dtype()} {shape}")

    def missing(self, keys: Sequence[bytes]) -> np.ndarray:
        """Return the indices of the documents that the cache lacks."""
        return np.flatnonzero(self._find(keys) < 0)

    def read(self, keys: Sequence[bytes]) -> Columns:
        """Return the columns of these documents, concatenated. The cache must have them."""
        places = self._find(keys)
        assert (places >= 0).all(), "the cache lacks a document: call check_holds first"
        if not len(places):
            return {name: column[:0] for name, column in self._columns_at(0).items()} if len(self._order) else {}
        parts = [self._columns_at(place) for place in places]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _find(self, keys: Sequence[bytes]) -> np.ndarray:
        """Return the position of each key among all documents, -1 if missing."""
        wanted = _as_words(b"".join(keys))
        if not len(self._order):
            return np.full(len(wanted), -1)
        nearest = np.minimum(np.searchsorted(self._sorted, wanted), len(self._order) - 1)
        return np.where(self._sorted[nearest] == wanted, self._order[nearest], -1)

    def _columns_at(self, place: int) -> Columns:
        shard, start = self._shards[self._shard[place]], int(self._starts[place])
        end = start + int(self._counts[place])
        names = [name for name in shard.keys() if name not in (_KEYS, _COUNTS)]  # noqa: SIM118, the handle is not a mapping
        return {name: shard.get_slice(name)[start:end] for name in names}


def _opened(shard: Path) -> Any:
    """Open a shard. Raises: IntegrityError if its keys, counts and columns do not fit each other."""
    try:
        tensors = safe_open(shard, framework="np")
        keys, counts = tensors.get_tensor(_KEYS), tensors.get_tensor(_COUNTS)
        rows = {(tensors.get_slice(name).get_shape() or [-1])[0] for name in set(tensors.keys()) - {_KEYS, _COUNTS}}
    except (SafetensorError, LookupError, TypeError, AttributeError) as error:
        raise _corrupt(shard, str(error)) from error
    fits = keys.dtype == np.uint8 and counts.dtype == np.int32 and keys.shape == (counts.size, KEY_BYTES)
    if not fits or counts.ndim != 1 or (counts < 0).any() or not rows <= {int(counts.sum(dtype=np.int64))}:
        raise _corrupt(shard, "its keys, counts and columns do not fit each other")
    return tensors


def _as_words(keys: bytes) -> np.ndarray:
    """View concatenated keys as numpy byte strings, which can be sorted and searched."""
    return np.frombuffer(keys, dtype=f"S{KEY_BYTES}")


def check_fingerprint(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Compare the origin of a cache, without None values. Raises: ConfigError naming the fields that differ."""
    there = _flat(_fingerprint_of(folder))
    here = _flat(json.loads(json.dumps(fingerprint)))
    open_fields = tuple(f"{name}." for name, value in fingerprint.items() if value is None)
    differing = [
        f"  {name}: {there.get(name)!r} there, {here.get(name)!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name) and not f"{name}.".startswith(open_fields)
    ]
    if differing:
        first = f"distill.cache: {folder} was made with other settings than this config:"
        raise ConfigError("\n".join([first, *differing, f"help: change the config, or {_NEW_FOLDER}"]))


def vocabulary_of(folder: Path) -> int:
    """Return the vocabulary size of a cache. Raises: as `check_fingerprint`."""
    try:
        return int(_fingerprint_of(folder)["vocabulary"])
    except (LookupError, TypeError, ValueError) as error:
        raise _corrupt(folder / FINGERPRINT, f"lacks {error}") from error


def _fingerprint_of(folder: Path) -> dict[str, Any]:
    try:
        return _read(folder / FINGERPRINT)
    except FileNotFoundError as error:
        raise ConfigError(f"distill.cache: {folder} is not a cache\nhelp: write it with finetune cache") from error


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _read(file: Path) -> dict[str, Any]:
    """Read a sealed JSON object. Raises: FileNotFoundError; ConfigError if unreadable; IntegrityError if corrupt."""
    try:
        return unseal(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"distill.cache: {file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _corrupt(file, str(error)) from error


def _verify(notes: Mapping[Path, Mapping[str, Any]]) -> None:
    """Raises: IntegrityError naming the first shard that differs from its size and SHA-256."""

    def check(shard: Path) -> None:
        try:
            right = shard.stat().st_size == notes[shard]["bytes"] and sha256_of(shard) == notes[shard]["sha256"]
        except (OSError, LookupError, TypeError) as error:
            raise _corrupt(shard, f"cannot be checked ({error})") from error
        if not right:
            raise _corrupt(shard, "its size or SHA-256 differs")

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        list(threads.map(check, notes))


def _corrupt(file: Path, what: str) -> IntegrityError:
    others = {FINGERPRINT: _NEW_FOLDER, COMPLETE: "remove it and run finetune cache again"}
    advice = others.get(file.name, _REMOVE_SHARD)
    return IntegrityError(f"distill.cache: {file} is corrupt: {what}\nhelp: {advice}")
