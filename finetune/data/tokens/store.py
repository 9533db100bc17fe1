"""Tokenized rows on disk, memory-mapped: written once, read by every rank.

A store is a folder with these files:
- ids.bin: int32 token ids.
- codes.bin: uint8, the index of each token's loss weight in the table of meta.json.
- rows.npz: one entry per row.
- meta.json: written last; with the SHA-256 of every other file and of itself.
- bad_rows.jsonl: rows that cannot be used.
- media.jsonl: a line for each row with images, audio or video; missing where every row is text.
- media_files.json: path, size and time of change of their files.

It is written under a temporary name and renamed, so a folder under its final name is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from finetune.data.encoded import Encoded
from finetune.data.positions import PlacedMedia
from finetune.data.sources.readers import location_of
from finetune.system.console import log_once
from finetune.system.errors import DataError
from finetune.system.manifest import sha256_of
from finetune.system.sealed import seal, unseal

# One entry per row; 32 bits suffice for 2^31 rows, and for rows of 2^31 tokens.
ROW = np.dtype(
    [
        ("lengths", np.int32),  # tokens
        ("targets", np.int32),
        ("indices", np.int32),  # of the row in its source, from 0
        ("numbers", np.int32),  # of the line or row in its file, from 1
        ("files", np.int32),  # index of its file in meta.json
        ("control_tokens", np.int32),  # spelled out in its texts
        ("hashes", np.uint64),  # of its content
    ]
)
_IDS, _CODES, _ROWS, _META, BAD_ROWS = "ids.bin", "codes.bin", "rows.npz", "meta.json", "bad_rows.jsonl"
_MEDIA, _MEDIA_FILES = "media.jsonl", "media_files.json"
_MEDIA_ENDS = "media_ends"  # column of rows.npz: where the row's line in media.jsonl ends
_CHOSEN = "chosen_tokens"  # column of rows.npz; missing where rows have no preferences
# Raise it when rows are read that were bad before.
READER_VERSION = 2
_MOST_WEIGHTS = 256  # a code is one byte
# NumPy parses the header of each column as Python. CPython 3.11 counts the depth of all parsers together, so two that
# run at once in two threads fail with a SystemError (cpython issue 106905). A stream opens windows in threads.
_PARSING = Lock()


class BadRow(NamedTuple):
    """A row that cannot be used, as bad_rows.jsonl lists it."""

    index: int
    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Encoded rows of one file, in order.

    rows: [N] ROW; the store sets their files.
    ids, weights: [sum of lengths] int32 and float32.
    placed, chosen_tokens: of each row, as in `Encoded`.
    bytes_read: of the source's files, up to the last of these rows.
    notes: how many messages have each note.
    format: of the rows in their file.
    """

    file: str
    unit: str
    rows: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    placed: tuple[PlacedMedia | None, ...]
    chosen_tokens: tuple[int | None, ...]
    bad: tuple[BadRow, ...]
    bytes_read: int
    notes: Counter[str] = field(default_factory=Counter)
    format: str = "auto"


@dataclass(frozen=True)
class StoreMeta:
    """The content of meta.json.

    content: SHA-256 of tokens and weights, whatever files the rows came from.
    files, units, formats: of each file with rows.
    weights: loss weight of each code.
    sizes: bytes of every other file. sums: SHA-256 likewise; empty in stores of older versions.
    notes: how many messages have each note.
    reader: READER_VERSION of the code that wrote it.
    """

    rows: int
    tokens: int
    bad_rows: int
    content: str
    files: list[str]
    units: list[str]
    formats: list[str]
    weights: list[float]
    sizes: dict[str, int]
    made_from: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    reader: int = 0
    sums: dict[str, str] = field(default_factory=dict)

    def format(self) -> str:
        """Return the format of the rows; where files differ, each format with its files."""
        files: dict[str, list[str]] = {}
        for name, file in zip(self.formats, self.files, strict=True):
            files.setdefault(name, []).append(Path(file).name)
        if len(files) < 2:
            return "".join(files)
        more = {name: f" and {len(named) - 2} more" if len(named) > 2 else "" for name, named in files.items()}
        return ", ".join(f"{name} ({', '.join(named[:2])}{more[name]})" for name, named in files.items())


_META_READER = TypeAdapter(StoreMeta)


class TokenStore:
    """Encoded rows of one source, before any is cut.

    lengths, targets, indices, hashes, control_tokens: [N], columns of ROW.
    has_media: [N] bool.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta = _read_meta(folder)
        with _PARSING, np.load(folder / _ROWS, allow_pickle=False) as rows:
            self.lengths, self.targets = rows["lengths"], rows["targets"]
            self.indices, self.hashes = rows["indices"], rows["hashes"]
            self.control_tokens = rows["control_tokens"]
            self._files, self._numbers = rows["files"], rows["numbers"]
            self._media_ends, self._chosen = rows.get(_MEDIA_ENDS), rows.get(_CHOSEN)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        self._ids = _mapped(folder / _IDS, np.int32, self.meta.tokens)
        self._codes = _mapped(folder / _CODES, np.uint8, self.meta.tokens)
        self._weights = np.asarray(self.meta.weights, dtype=np.float32)
        self.has_media = np.zeros(len(self), dtype=bool)
        if self._media_ends is not None:
            self._media = _mapped(folder / _MEDIA, np.uint8, int(self._media_ends[-1]))
            self.has_media = np.diff(self._media_ends, prepend=0) > 0

    def __len__(self) -> int:
        return self.meta.rows

    def __getitem__(self, row: int) -> Encoded:
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return self.piece(row % len(self), 0, int(self.lengths[row]))

    def piece(self, row: int, start: int, length: int) -> Encoded:
        """Return the tokens [start, start + length) of a row."""
        where = slice(first := int(self.starts[row]) + start, first + length)
        placed = self.placed(row)
        if placed is not None:
            placed = placed.within(start, start + length)
        chosen = None if self._chosen is None else int(self._chosen[row])
        return Encoded(np.asarray(self._ids[where]), self._weights[self._codes[where]], placed, chosen)

    def placed(self, row: int) -> PlacedMedia | None:
        """Return the images, audio and video of a row; None for text."""
        if self._media_ends is None or not self.has_media[row]:
            return None
        start = int(self._media_ends[row - 1]) if row else 0
        return PlacedMedia.from_dict(json.loads(self._media[start : int(self._media_ends[row])].tobytes()))

    def location(self, row: int) -> str:
        """Return the row's location: `file:line`, or `file:row N` in files without lines."""
        file = int(self._files[row])
        return location_of(self.meta.files[file], self.meta.units[file], int(self._numbers[row]))

    def used_ids(self) -> np.ndarray:
        """Return the distinct token ids [U] int32."""
        return np.unique(self._ids)

    @property
    def bad_rows(self) -> Path:
        """JSON lines of the rows that cannot be used: index, place, reason."""
        return self.folder / BAD_ROWS


def _mapped(file: Path, dtype: type, length: int) -> np.ndarray:
    return np.memmap(file, dtype=dtype, mode="r", shape=(length,)) if length else np.empty(0, dtype=dtype)


def _read_meta(folder: Path) -> StoreMeta:
    """Read meta.json. Raises: OSError if it is missing, ValueError if it is corrupt."""
    try:
        return _META_READER.validate_python(unseal(json.loads((folder / _META).read_text(encoding="utf-8"))))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_META}: {error}") from error


def is_valid(folder: Path) -> bool:
    """Return whether a folder holds a complete store, made from the files of media that are there now.

    All files of the store have the size and the SHA-256 in meta.json. Logs the file of a store that is damaged.
    """
    if not folder.is_dir():
        return False
    try:
        meta = _read_meta(folder)
        for name, size in meta.sizes.items():
            file = folder / name
            if file.stat().st_size != size or (meta.sums and sha256_of(file) != meta.sums.get(name)):
                raise ValueError(f"{name}: its size or SHA-256 differs")
    except (OSError, ValueError) as error:
        log_once(f"data.cache: {folder} is corrupt ({error}); tokenizing again")
        return False
    return _MEDIA not in meta.sizes or _are_unchanged(folder / _MEDIA_FILES)


def _are_unchanged(listed: Path) -> bool:
    """Return whether files have the sizes and times of a list."""
    stamps = json.loads(listed.read_text(encoding="utf-8"))
    try:
        return all(_stamp(path) == stamp for path, stamp in stamps.items())
    except OSError:  # missing
        return False


def _stamp(path: str) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def has_outdated_bad_rows(folder: Path) -> bool:
    """Return whether a store lists bad rows that a newer reader may read."""
    try:
        meta = _read_meta(folder)
    except (OSError, ValueError):
        return False
    return bool(meta.bad_rows) and meta.reader < READER_VERSION


class StoreWriter:
    """Writes a store batch by batch into a new folder. Memory: about 50 bytes per row, the paths of media, no tokens.

    Raises: DataError for rows with more than 254 different loss weights.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        self.folder = folder
        self._ids = (folder / _IDS).open("wb")
        self._codes = (folder / _CODES).open("wb")
        self._bad = (folder / BAD_ROWS).open("w", encoding="utf-8")
        self._content = [hashlib.sha256() for _ in ("ids", "codes", "lengths")]
        self._weights: dict[float, int] = {0.0: 0, 1.0: 1}
        self._files: dict[tuple[str, str, str], int] = {}
        self._rows = [np.empty(0, ROW)]
        self._media = (folder / _MEDIA).open("wb")
        self._media_ends: list[int] = []
        self._media_digests: list[str] = []
        self._media_files: set[str] = set()
        self._chosen: list[int | None] = []
        self._bad_rows = 0
        self._notes: Counter[str] = Counter()

    def append(self, batch: EncodedBatch) -> None:
        """Append rows; batches must come in the order of the source."""
        codes = self._code(batch.weights)
        self._ids.write(batch.ids.data)
        self._codes.write(codes.data)
        for digest, values in zip(
            self._content, (batch.ids, codes, batch.rows["lengths"].astype(np.int64)), strict=True
        ):
            digest.update(values.data)
        batch.rows["files"] = self._files.setdefault((batch.file, batch.unit, batch.format), len(self._files))
        self._rows.append(batch.rows)
        for placed in batch.placed:
            if placed is not None:
                self._media.write(json.dumps(placed.as_dict(), ensure_ascii=False).encode() + b"\n")
                self._media_files.update(item.path for item in placed.items)
            self._media_ends.append(self._media.tell())
            self._media_digests.append("" if placed is None else placed.digest.hex())
        self._chosen += batch.chosen_tokens
        self._bad.writelines(json.dumps(bad._asdict(), ensure_ascii=False) + "\n" for bad in batch.bad)
        self._bad_rows += len(batch.bad)
        self._notes += batch.notes

    def finish(self, made_from: dict[str, Any]) -> None:
        """Write and sync all files; then the folder can be renamed."""
        table = np.concatenate(self._rows)
        columns = {name: table[name] for name in ROW.names or ()}
        content: list[Any] = [*(part.hexdigest() for part in self._content), list(self._weights)]
        files = [_IDS, _CODES, _ROWS, BAD_ROWS]
        if any(self._media_digests):
            columns[_MEDIA_ENDS] = np.array(self._media_ends, dtype=np.int64)
            content.append(self._media_digests)
            files += [_MEDIA, _MEDIA_FILES]
            with (self.folder / _MEDIA_FILES).open("w", encoding="utf-8") as listed:
                json.dump({path: _stamp(path) for path in sorted(self._media_files)}, listed)
                _sync(listed)
        else:  # a store of text looks as it did before there was media
            (self.folder / _MEDIA).unlink()
        if any(tokens is not None for tokens in self._chosen):
            columns[_CHOSEN] = np.array(self._chosen, dtype=np.int32)
            content.append(self._chosen)
        with (self.folder / _ROWS).open("wb") as rows:
            np.savez(rows, allow_pickle=False, **columns)
            _sync(rows)
        for stream in (self._ids, self._codes, self._bad, self._media):
            _sync(stream)
            stream.close()
        meta = StoreMeta(
            rows=len(table),
            tokens=int(table["lengths"].sum(dtype=np.int64)),
            bad_rows=self._bad_rows,
            content=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
            files=[file for file, _, _ in self._files],
            units=[unit for _, unit, _ in self._files],
            formats=[name for _, _, name in self._files],
            weights=list(self._weights),
            sizes={name: (self.folder / name).stat().st_size for name in files},
            made_from=made_from,
            notes=dict(self._notes),
            reader=READER_VERSION,
            sums={name: sha256_of(self.folder / name) for name in files},
        )
        with (self.folder / _META).open("w", encoding="utf-8") as stream:
            json.dump(seal(asdict(meta)), stream, ensure_ascii=False, indent=1)
            _sync(stream)

    def _code(self, weights: np.ndarray) -> np.ndarray:
        found, inverse = np.unique(weights, return_inverse=True)
        for weight in found.tolist():
            self._weights.setdefault(weight, len(self._weights))
        if len(self._weights) > _MOST_WEIGHTS:
            raise DataError(
                f"the rows have more than {_MOST_WEIGHTS - 2} different weights; round them, as 0.25, 0.5, 1"
            )
        table = np.array([self._weights[weight] for weight in found.tolist()], dtype=np.uint8)
        return table[inverse] if len(table) else np.empty(0, dtype=np.uint8)


def _sync(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
