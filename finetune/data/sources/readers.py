"""Read files of rows piece by piece, with the location of every row.

A file is never trusted. A row that cannot be read becomes a DataError in its place. A file that cannot be read, or not
to its end, raises a DataError. Memory does not grow with the size of the file.
"""

from __future__ import annotations

import io
import lzma
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from finetune.data.sources.json_rows import checked, decode_row
from finetune.data.sources.text_files import (
    BATCH_BYTES,
    COMPRESSIONS,
    TEXTS,
    Content,
    Group,
    Layout,
    Unit,
    read_text,
)
from finetune.system.console import log_once
from finetune.system.errors import DataError

if TYPE_CHECKING:
    import pyarrow

TABLES = (".parquet", ".arrow")
_MOST_ROWS = 10_000
# The start of a text file shows its layout: line ends, one list, or objects over several lines.
_PEEKED_BYTES = 1 << 17


def location_of(file: str, unit: str, number: int) -> str:
    """Return `file:line`, or `file:row N` in a list or table; both count from 1."""
    return f"{file}:{number}" if unit == "line" else f"{file}:row {number}"


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    index: from 0 over all files of a source, bad rows included.
    number: in its file, from 1.
    value: the decoded row, or its error.
    """

    index: int
    number: int
    location: str
    value: dict[str, Any] | DataError


@dataclass(frozen=True, slots=True)
class RawBatch:
    """About 1 MB of consecutive rows of one file, not decoded, so that they are cheap to send to a worker.

    numbers: of each item in its file.
    bytes_read: of all files of the source, up to the end of this batch.
    format: of the rows of its file; auto before it is recognized.
    """

    file: str
    unit: Unit
    first_index: int
    numbers: tuple[int, ...]
    items: tuple[Content, ...]
    bytes_read: int
    format: str = "auto"

    def split(self, rows: int) -> tuple[RawBatch, RawBatch]:
        """Return the first `rows` rows, and the others."""
        head = replace(self, numbers=self.numbers[:rows], items=self.items[:rows])
        index = self.first_index + len(head.items)
        return head, replace(self, first_index=index, numbers=self.numbers[rows:], items=self.items[rows:])

    def pieces(self, rows: int) -> Iterator[RawBatch]:
        """Yield all rows in batches of at most `rows`."""
        rest = self
        while len(rest.items) > rows:
            head, rest = rest.split(rows)
            yield head
        yield rest

    def rows(self) -> Iterator[Row]:
        """Decode the rows.

        A null inside a nested object of a table (parquet, arrow) is left out, because a table gives every object the
        keys of all others. A null column of the row stays None.
        """
        for offset, (number, item) in enumerate(zip(self.numbers, self.items, strict=True)):
            if isinstance(item, bytes):
                item = decode_row(item)
            elif isinstance(item, dict):
                item = checked({column: _without_nulls(value) for column, value in item.items()})
            yield Row(self.first_index + offset, number, location_of(self.file, self.unit, number), item)


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


def read_batches(
    path: Path, label: str, first_index: int, bytes_before: int, split: str | None = None
) -> Iterator[RawBatch]:
    """Read the rows of one file, in order.

    label: the file's name in locations.
    first_index, bytes_before: rows and bytes of the source's files before it.
    split: a key of a JSON file with a list of rows under each of several keys.
    Raises: DataError if the file cannot be read, or cannot be read further.
    """
    kind, compression = kind_of(path)
    try:
        with io.BufferedReader(io.FileIO(path), _PEEKED_BYTES) as raw:
            if kind in TABLES:
                groups = _read_table(raw, kind)
            else:
                groups = read_text(raw, kind, compression, Layout(split, lambda text: log_once(f"{label}: {text}")))
            for unit, numbers, contents, bytes_read in groups:
                yield RawBatch(label, unit, first_index, numbers, contents, bytes_before + bytes_read)
                first_index += len(contents)
    except DataError as error:
        raise DataError(f"{label} {error}") from error
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, OSError) and error.strerror:
            raise DataError(f"{label} cannot be read: {error.strerror}") from error
        raise DataError(f"{label} is broken or cut off: {error}") from error


def _read_table(raw: BinaryIO, kind: str) -> Iterator[Group]:
    """Memory: about 1 MB of a parquet file's rows and of each column; one record batch of an arrow file."""
    import pyarrow

    size = os.fstat(raw.fileno()).st_size
    if size == 0:
        raise DataError("is empty")
    number = 1
    try:
        for batch, share in (_parquet if kind == ".parquet" else _arrow)(raw):
            if len(set(columns := batch.schema.names)) < len(columns):
                raise DataError(f"has two columns of one name ({', '.join(columns)})")
            at_once = max(1, BATCH_BYTES * batch.num_rows // max(batch.nbytes, 1))
            for start in range(0, batch.num_rows, at_once):
                rows = tuple(_rows(batch.slice(start, at_once)))
                yield "row", tuple(range(number, number + len(rows))), rows, int(share * size)
                number += len(rows)
    # ValueError: a name that is not text. MemoryError: a damaged length.
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError(f"is damaged or not a {kind} file: {_first_line(error)}") from error


def _parquet(raw: BinaryIO) -> Iterator[tuple[pyarrow.RecordBatch, float]]:
    from pyarrow import parquet

    file = parquet.ParquetFile(raw, buffer_size=BATCH_BYTES, pre_buffer=False)
    metadata = file.metadata
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    rows = max(1, min(_MOST_ROWS, BATCH_BYTES * metadata.num_rows // max(size, 1)))
    done = 0
    for batch in file.iter_batches(rows, use_threads=False):
        done += batch.num_rows
        yield batch, done / metadata.num_rows


def _arrow(raw: BinaryIO) -> Iterator[tuple[pyarrow.RecordBatch, float]]:
    import pyarrow

    is_file = raw.read(6) == b"ARROW1"
    raw.seek(0)
    size = os.fstat(raw.fileno()).st_size
    reader = pyarrow.ipc.open_file(raw) if is_file else pyarrow.ipc.open_stream(raw)
    for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
        batch.validate(full=True)  # offsets outside the file would crash the process
        yield batch, raw.tell() / size


def _rows(batch: pyarrow.RecordBatch) -> Iterator[Content]:
    try:
        yield from batch.to_pylist(maps_as_pydicts="strict")
        return
    except (ValueError, KeyError):  # Python cannot hold some value: find its row
        rows = [batch.slice(i, 1) for i in range(batch.num_rows)]
    for row in rows:
        try:
            yield row.to_pylist(maps_as_pydicts="strict")[0]
        except UnicodeDecodeError as error:
            yield DataError(f"holds text that is not UTF-8 (byte {error.object[error.start]:#04x})")
        except (ValueError, KeyError) as error:
            yield DataError(f"holds a value that cannot be read: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
