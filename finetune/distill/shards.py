"""A folder of signals by document: written shard by shard, never half, and checked before it is believed.

    fingerprint.json               what the signals come from; written first
    shard-00000.safetensors        columns of signals, an entry a target; keys and counts, an entry a document
    shard-00000.json               its SHA-256 and size; a shard without it is not there
    complete.json                  the shards in all; a folder without it is not finished

Everything appears by a rename. A killed writer's folder is gone on with, a damaged shard is named.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from finetune.distill.codec import Columns
from finetune.distill.keys import KEY_BYTES
from finetune.errors import ConfigError, IntegrityError, ResourceError
from finetune.files import write_text
from finetune.models.digest import sha256_of

FINGERPRINT, COMPLETE = "fingerprint.json", "complete.json"
_KEYS, _COUNTS = "keys", "counts"
# What a killed writer loses at most, in work; small enough to be written while nobody notices.
_SHARD_BYTES = 16 << 20


@dataclass
class ShardWriter:
    """Adds documents to a folder. stored: keys of those that are there already."""

    folder: Path
    stored: set[bytes] = field(default_factory=set)
    _keys: list[bytes] = field(default_factory=list)
    _columns: list[Columns] = field(default_factory=list)
    _size_bytes: int = 0

    def __post_init__(self) -> None:
        """Raises: IntegrityError if a shard that is there is damaged."""
        for left in self.folder.glob(".shard-*"):
            left.unlink()
        for shard in _shards(self.folder):
            _verify(shard)
            self.stored |= set(_keys_of(shard))

    def add(self, key: bytes, columns: Columns) -> None:
        """Keep the signal of one document; on disk once enough has come together."""
        self._keys.append(key)
        self._columns.append(columns)
        self.stored.add(key)
        self._size_bytes += sum(column.nbytes for column in columns.values())
        if self._size_bytes >= _SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last time.

        Raises: ResourceError if the disk is full; what was written before stays.
        """
        if not self._keys:
            return
        counts = [len(next(iter(columns.values()))) for columns in self._columns]
        tensors = {name: np.concatenate([columns[name] for columns in self._columns]) for name in self._columns[0]} | {
            _KEYS: np.frombuffer(b"".join(self._keys), np.uint8).reshape(-1, KEY_BYTES),
            _COUNTS: np.asarray(counts, dtype=np.int64),
        }
        written = _shards(self.folder)
        number = int(written[-1].stem.removeprefix("shard-")) + 1 if written else 0
        file = self.folder / f"shard-{number:05d}.safetensors"
        temporary = file.with_name(f".{file.name}")
        try:
            save_file(tensors, temporary)
            _settle(temporary)
            digest = sha256_of(temporary)
            os.replace(temporary, file)
            write_text(file.with_suffix(".json"), json.dumps({"sha256": digest, "bytes": file.stat().st_size}))
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink()
            raise ResourceError(
                f"distill.cache: {self.folder} took {len(written)} shards and then no more ({error}); free some space and "
                "start again: it goes on where it stopped"
            ) from error
        self._keys, self._columns, self._size_bytes = [], [], 0

    def finish(self) -> None:
        """Write the rest and declare the folder whole."""
        self.flush()
        shards = {shard.name: _record(shard) for shard in _shards(self.folder)}
        write_text(self.folder / COMPLETE, json.dumps({"documents": len(self.stored), "shards": shards}, indent=1))


class ShardReader:
    """The signals of a finished folder by document.

    Raises: ConfigError if it is not finished; IntegrityError naming the shard that is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            shards = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["shards"]
        except FileNotFoundError as error:
            raise ConfigError(
                f"distill.cache: {folder} is not finished; run finetune cache with this config again: it goes on where "
                "it stopped"
            ) from error
        except (ValueError, LookupError, TypeError) as error:
            raise IntegrityError(f"distill.cache: {folder / COMPLETE} is damaged: {error}") from error
        files = [folder / name for name in shards]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            list(threads.map(_verify, files))
        self._shards = [safe_open(file, framework="np") for file in files]
        counts = [shard.get_tensor(_COUNTS) for shard in self._shards]
        self._keys = np.concatenate([shard.get_tensor(_KEYS) for shard in self._shards])
        self._counts = np.concatenate(counts)
        self._shard = np.repeat(np.arange(len(files)), [len(c) for c in counts])
        self._starts = np.concatenate([np.cumsum(c) - c for c in counts])
        # Found by their first 8 bytes; the others are compared.
        prefixes = self._prefixes(self._keys)
        self._order = np.argsort(prefixes, kind="stable")
        self._sorted = prefixes[self._order]

    @staticmethod
    def _prefixes(keys: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(keys[:, :8]).view(">u8")[:, 0].astype(np.uint64)

    def missing(self, keys: Sequence[bytes]) -> np.ndarray:
        """Which of these documents are not there, by index."""
        return np.flatnonzero(self._find(keys) < 0)

    def read(self, keys: Sequence[bytes]) -> Columns:
        """The columns of these documents, which must be there, one after another; empty columns for none."""
        parts = [self._columns_at(place) for place in self._find(keys)]
        if not parts:
            return {name: column[:0] for name, column in self._columns_at(0).items()}
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _find(self, keys: Sequence[bytes]) -> np.ndarray:
        """The place of each key among all, -1 for one that is not there."""
        wanted = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
        if not len(self._order) or not len(wanted):
            return np.full(len(wanted), -1)
        nearest = np.minimum(np.searchsorted(self._sorted, self._prefixes(wanted)), len(self._order) - 1)
        places = self._order[nearest]
        return np.where((self._keys[places] == wanted).all(1), places, -1)

    def _columns_at(self, place: int) -> Columns:
        shard, start = self._shards[self._shard[place]], int(self._starts[place])
        end = start + int(self._counts[place])
        names = [name for name in shard.keys() if name not in (_KEYS, _COUNTS)]  # noqa: SIM118, the handle is no mapping
        return {name: shard.get_slice(name)[start:end] for name in names}


def open_folder(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Begin a folder of signals, or go on with one of the same origin.

    Raises: ConfigError naming what differs, if it holds signals of another origin; if it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / FINGERPRINT).exists():
            if any(folder.iterdir()):
                raise ConfigError(f"distill.cache: {folder} holds other files; name an empty or a new folder")
            write_text(folder / FINGERPRINT, json.dumps(fingerprint, indent=1, sort_keys=True))
    except OSError as error:
        raise ConfigError(f"distill.cache: {folder} cannot be written to: {error.strerror}") from error
    check_fingerprint(folder, fingerprint)


def check_fingerprint(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Refuse a folder whose signals are not the ones that are wanted; a wanted value of None is not compared.

    Raises: ConfigError naming the fields that differ, with both values.
    """
    file = folder / FINGERPRINT
    try:
        there = _flat(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ConfigError(f"distill.cache: {folder} holds no signals; write them with finetune cache") from error
    except (ValueError, AttributeError) as error:
        raise IntegrityError(f"distill.cache: {file} is damaged: {error}") from error
    here = _flat(json.loads(json.dumps(fingerprint)))
    open_fields = tuple(f"{name}." for name, value in fingerprint.items() if value is None)
    differing = [
        f"  {name}: {there.get(name)!r} there, {here.get(name)!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name) and not f"{name}.".startswith(open_fields)
    ]
    if differing:
        raise ConfigError("\n".join([
            f"distill.cache: {folder} holds another signal than this config asks for:", *differing,
            "change the config, or write a new folder with finetune cache",
        ]))  # fmt: skip


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _shards(folder: Path) -> list[Path]:
    """Shards that were written to their end, in order."""
    return sorted(note.with_suffix(".safetensors") for note in folder.glob("shard-*.json"))


def _record(shard: Path) -> dict[str, Any]:
    return json.loads(shard.with_suffix(".json").read_text(encoding="utf-8"))


def _verify(shard: Path) -> None:
    advice = "remove it and its .json and run finetune cache again, which makes what is missing"
    try:
        record = _record(shard)
        if shard.stat().st_size != record["bytes"] or sha256_of(shard) != record["sha256"]:
            raise IntegrityError(f"distill.cache: {shard} is not what was written; {advice}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise IntegrityError(f"distill.cache: {shard} cannot be checked ({error}); {advice}") from error


def _keys_of(shard: Path) -> Iterator[bytes]:
    with safe_open(shard, framework="np") as tensors:
        for key in tensors.get_tensor(_KEYS):
            yield key.tobytes()


def _settle(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
