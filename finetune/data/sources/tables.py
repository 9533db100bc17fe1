"""Read rows of columnar files: parquet, arrow file and arrow stream."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from finetune.data.sources.text_files import BATCH_BYTES, Content, Group
from finetune.system.errors import DataError

if TYPE_CHECKING:
    import pyarrow

TABLES = (".parquet", ".arrow")
_MOST_ROWS = 10_000


def read_table(raw: BinaryIO, kind: str) -> Iterator[Group]:
    """Read the rows of an open table.

    Memory: about 1 MB of a parquet file's rows and of each column; one record batch of an arrow file.

    Raises: DataError if the file is damaged or not a table.
    """
    import pyarrow

    size = os.fstat(raw.fileno()).st_size
    if size == 0:
        raise DataError("is empty")
    number = 1
    try:
        for batch, share in (_parquet if kind == ".parquet" else _arrow)(raw):
            at_once = max(1, BATCH_BYTES * batch.num_rows // max(batch.nbytes, 1))
            for start in range(0, batch.num_rows, at_once):
                rows = tuple(_rows(batch.slice(start, at_once)))
                yield Group("row", tuple(range(number, number + len(rows))), rows, int(share * size))
                number += len(rows)
    # ValueError: a name that is not text. MemoryError: a damaged length.
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError(f"is damaged or not a {kind} file: {_first_line(error)}") from error


def _parquet(raw: BinaryIO) -> Iterator[tuple[pyarrow.RecordBatch, float]]:
    from pyarrow import parquet

    file = parquet.ParquetFile(raw, buffer_size=BATCH_BYTES, pre_buffer=False)
    _refuse_twins(file.schema_arrow.names)
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
    _refuse_twins(reader.schema.names)
    for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
        batch.validate(full=True)  # offsets outside the file would crash the process
        yield batch, raw.tell() / size


def _refuse_twins(columns: list[str]) -> None:
    if len(set(columns)) < len(columns):
        raise DataError(f"has two columns of one name ({', '.join(columns)})")


def _rows(batch: pyarrow.RecordBatch) -> Iterator[Content]:
    try:
        yield from batch.to_pylist(maps_as_pydicts="strict")
    except (ValueError, KeyError):  # Python cannot hold some value: find its row
        yield from (_row(batch.slice(i, 1)) for i in range(batch.num_rows))


def _row(row: pyarrow.RecordBatch) -> Content:
    try:
        return row.to_pylist(maps_as_pydicts="strict")[0]
    except UnicodeDecodeError as error:
        return DataError(f"holds text that is not UTF-8 (byte {error.object[error.start]:#04x})")
    except (ValueError, KeyError) as error:
        return DataError(f"holds a value that cannot be read: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
