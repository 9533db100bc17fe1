"""Files of rows: read a piece at a time, and every row knows the place it came from.

What a file holds is never trusted: a row that cannot be read is a DataError where the row would be, a file that cannot
be read (any further) raises one, and nothing grows with the file's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.sources.json_rows import checked, decode_row
from finetune.data.sources.tables import TABLES, read_table
from finetune.data.sources.text_files import COMPRESSIONS, TEXTS, Content, Unit, named_errors, read_text
from finetune.system.errors import DataError


@dataclass(frozen=True, slots=True)
class Location:
    """Where a row stands: lines count from 1 as editors do, rows of a list or table from 1 as well."""

    file: str
    number: int
    unit: Unit

    def __str__(self) -> str:
        return f"{self.file}:{self.number}" if self.unit == "line" else f"{self.file}:row {self.number}"


@dataclass(frozen=True, slots=True)
class Row:
    """One row. index: from 0 over all files of a source, bad rows included. value: a dict, or what is wrong with it."""

    index: int
    location: Location
    value: dict[str, Any] | DataError


@dataclass(frozen=True, slots=True)
class RawBatch:
    """About a megabyte of rows that follow one another in one file, as cheap to send as they were to read.

    numbers: of each item in its file. bytes_read: of all the source's files, up to and with this batch.
    """

    file: str
    unit: Unit
    first_index: int
    numbers: tuple[int, ...]
    items: tuple[Content, ...]
    bytes_read: int

    def rows(self) -> Iterator[Row]:
        """The rows, decoded here.

        A null inside a nested object of a table (parquet, arrow) is left out: a table gives every object the keys of
        all others, so that a key without a value is one that the row never had. A null column of the row stays None.
        """
        for offset, (number, item) in enumerate(zip(self.numbers, self.items, strict=True)):
            yield Row(self.first_index + offset, Location(self.file, number, self.unit), _decoded(item))


def _decoded(item: Content) -> dict[str, Any] | DataError:
    if isinstance(item, bytes):
        return decode_row(item)
    if isinstance(item, dict):
        return checked({column: _without_nulls(value) for column, value in item.items()})
    return item


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) if isinstance(item, (dict, list)) else item for item in value]
    return value


def kind_of(path: Path) -> tuple[str, str]:
    """What a file is by its name: (".csv", ".gz"), or (".csv", "") if it is not compressed.

    Raises: DataError if rows cannot be read from such a file.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    kind = suffixes[-1] if suffixes else ""
    if kind in TEXTS or (kind in TABLES and not compression):
        return kind, compression
    raise DataError(
        f"{path} must be one of {', '.join([*TEXTS, *TABLES])}; of these {', '.join(TEXTS)} may be compressed "
        f"({', '.join(COMPRESSIONS)})"
    )


def read_batches(path: Path, label: str, first_index: int, bytes_before: int) -> Iterator[RawBatch]:
    """The rows of one file, in order. label: what places call it. bytes_before: of the files read before it.

    Raises: DataError if the file cannot be read (any further).
    """
    kind, compression = kind_of(path)
    with named_errors(label), path.open("rb") as raw:
        for group in read_table(raw, kind) if kind in TABLES else read_text(raw, kind, compression):
            bytes_read = bytes_before + group.bytes_read
            yield RawBatch(label, group.unit, first_index, group.numbers, group.contents, bytes_read)
            first_index += len(group.contents)
