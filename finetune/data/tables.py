"""Rows in columnar files: parquet, and arrow's own file and stream formats."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from finetune.data.texts import Content, Item
from finetune.errors import DataError

if TYPE_CHECKING:
    import pyarrow

TABLES = (".parquet", ".arrow")
_SLICE_BYTES = 1 << 20
_MOST_ROWS = 10_000


def read_table(raw: BinaryIO, kind: str) -> Iterator[Item]:
    """The rows of a table that is open for reading bytes.

    Memory: about a megabyte of a parquet file's rows and of each column; one record batch of an arrow file, as written.
    Raises: DataError if the file is damaged or is no table.
    """
    import pyarrow

    size = os.fstat(raw.fileno()).st_size
    if size == 0:
        raise DataError("is empty")
    try:
        number = 0
        for batch, share in (_parquet if kind == ".parquet" else _arrow)(raw):
            row_bytes = batch.nbytes // max(batch.num_rows, 1) + 1
            for content in _rows(batch, max(1, _SLICE_BYTES // row_bytes)):
                number += 1
                yield Item("row", number, content, row_bytes, int(share * size))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"is damaged or no {kind} file: {_first_line(error)}") from error


def _parquet(raw: BinaryIO) -> Iterator[tuple[pyarrow.RecordBatch, float]]:
    from pyarrow import parquet

    file = parquet.ParquetFile(raw, buffer_size=_SLICE_BYTES, pre_buffer=False)
    _refuse_twins(file.schema_arrow.names)
    metadata = file.metadata
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    rows = max(1, min(_MOST_ROWS, _SLICE_BYTES * metadata.num_rows // max(size, 1)))
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
    _refuse_twins(reader.schema.names)
    for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
        batch.validate(full=True)  # offsets that point outside the file would end the process
        yield batch, raw.tell() / size


def _refuse_twins(columns: list[str]) -> None:
    if len(set(columns)) < len(columns):
        raise DataError(f"has two columns of one name ({', '.join(columns)})")


def _rows(batch: pyarrow.RecordBatch, at_once: int) -> Iterator[Content]:
    for start in range(0, batch.num_rows, at_once):
        part = batch.slice(start, at_once)
        try:
            yield from part.to_pylist(maps_as_pydicts="strict")
        except (ValueError, KeyError):  # one value that Python cannot hold: which row has it?
            yield from (_row(part.slice(i, 1)) for i in range(part.num_rows))


def _row(row: pyarrow.RecordBatch) -> Content:
    try:
        return row.to_pylist(maps_as_pydicts="strict")[0]
    except UnicodeDecodeError as error:
        return DataError(f"holds text that is not UTF-8 (byte {error.object[error.start]:#04x})")
    except (ValueError, KeyError) as error:
        return DataError(f"holds a value that cannot be read: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
