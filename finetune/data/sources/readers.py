"""Read files of rows piece by piece, with the location of every row.

A file is never trusted. A row that cannot be read becomes a DataError in its place. A file that cannot be read, or not
to its end, raises a DataError. Memory does not grow with the size of the file.
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
    """The file and line of a row, or its number in a list or table; both count from 1."""

    file: str
    number: int
    unit: Unit

    def __str__(self) -> str:
        return f"{self.file}:{self.number}" if self.unit == "line" else f"{self.file}:row {self.number}"


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    index: from 0 over all files of a source, bad rows included.
    value: the decoded row, or its error.
    """

    index: int
    location: Location
    value: dict[str, Any] | DataError


@dataclass(frozen=True, slots=True)
class RawBatch:
    """About 1 MB of consecutive rows of one file, not decoded, so that they are cheap to send to a worker.

    numbers: of each item in its file.
    bytes_read: of all files of the source, up to the end of this batch.
    """

    file: str
    unit: Unit
    first_index: int
    numbers: tuple[int, ...]
    items: tuple[Content, ...]
    bytes_read: int

    def rows(self) -> Iterator[Row]:
        """Decode the rows.

        A null inside a nested object of a table (parquet, arrow) is left out, because a table gives every object the
        keys of all others. A null column of the row stays None.
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
    """Return a file's format and compression by its name: (".csv", ".gz"), or (".csv", "") without compression.

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
    """Read the rows of one file, in order.

    Args:
        path: the file.
        label: its name in locations.
        first_index: index of its first row in the source.
        bytes_before: bytes of the files before it.

    Raises:
        DataError: the file cannot be read, or cannot be read further.
    """
    kind, compression = kind_of(path)
    with named_errors(label), path.open("rb") as raw:
        for group in read_table(raw, kind) if kind in TABLES else read_text(raw, kind, compression):
            bytes_read = bytes_before + group.bytes_read
            yield RawBatch(label, group.unit, first_index, group.numbers, group.contents, bytes_read)
            first_index += len(group.contents)
