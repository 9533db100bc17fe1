"""Read rows of text files: JSON lines, JSON lists, CSV and TSV, also compressed."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

from finetune.data.sources import layouts
from finetune.data.sources.json_rows import BOM, checked, decode_row
from finetune.system.errors import DataError

Unit = Literal["line", "row"]
Content = bytes | dict[str, Any] | DataError

LONGEST_ROW_BYTES = 64_000_000
# An unclosed quote takes the rest of the file into its cell, at 4 bytes per character.
LONGEST_RECORD_BYTES = 16_000_000
BATCH_BYTES = 1 << 20
PIECE_BYTES = 1 << 20

Found = Iterator[tuple[Unit, int, Content]]
# About BATCH_BYTES of rows, not decoded: their unit, their numbers in the file, the rows, and the bytes read so far.
Group = tuple[Unit, tuple[int, ...], tuple[Content, ...], int]


@dataclass(frozen=True)
class Layout:
    """split: the key whose list holds the rows, or None. say: receives what is unusual about the file."""

    split: str | None
    say: Callable[[str], None]


def read_text(raw: io.BufferedReader[Any], kind: str, compression: str, layout: Layout) -> Iterator[Group]:
    """Read the rows of an open text file.

    Raises: DataError if it is not UTF-8 text; OSError and others as the libraries raise them.
    """
    stream: io.BufferedReader[Any] = raw
    if compression:
        stream = io.BufferedReader(COMPRESSIONS[compression](raw), PIECE_BYTES)
    head = stream.peek(64)[:64]
    if layouts.is_utf16(head):
        layout.say("read as UTF-16")
        stream = io.BufferedReader(layouts.from_utf16(stream), PIECE_BYTES)
        head = stream.peek(64)[:64]
    found = [meaning for signature, meaning in _SIGNATURES.items() if head.startswith(signature)]
    if [byte == 0 for byte in head[:4]] in ([False, True, False, True], [True, False, True, False]):
        found.append(_UTF16)
    if found:
        raise DataError(f"is named {kind}{compression}, but looks like {found[0]}")
    if head.startswith(BOM):
        stream.read(len(BOM))
    if layouts.ends_lines_with_cr(stream.peek(PIECE_BYTES)):
        layout.say("read with carriage returns as line ends")
        stream = io.BufferedReader(layouts.from_carriage_returns(stream), PIECE_BYTES)
    unit: Unit = "row"
    numbers: list[int] = []
    contents: list[Content] = []
    size = 0
    for unit, number, content in TEXTS[kind](stream, layout):
        numbers.append(number)
        contents.append(content)
        if isinstance(content, dict):
            size += sum(map(len, content.values()))
        else:
            size += len(content) if isinstance(content, bytes) else 100
        if size >= BATCH_BYTES:
            yield unit, tuple(numbers), tuple(contents), raw.tell()
            numbers, contents, size = [], [], 0
    if contents:
        yield unit, tuple(numbers), tuple(contents), raw.tell()


_UTF16 = "UTF-16 text without a byte-order mark; save it as UTF-8"
# First bytes of a file, and its true format.
_SIGNATURES = {
    b"PAR1": "a parquet file; name it .parquet",
    b"ARROW1": "an arrow file; name it .arrow",
    b"\xff\xff\xff\xff": "an arrow stream; name it .arrow",
    b"\x1f\x8b": "gzip; its name must end in .gz",
    b"BZh": "bzip2; its name must end in .bz2",
    b"\xfd7zXZ": "xz; its name must end in .xz",
    b"\x28\xb5\x2f\xfd": "zstandard; its name must end in .zst",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\xff\xfe\0\0": "UTF-32 text; save it as UTF-8",
    b"version https://git-lfs": "a Git LFS pointer without its file; run git lfs pull",
    b"<!DOCTYPE": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
}


def _open_zstd(raw: BinaryIO) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd")


COMPRESSIONS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def _too_long(length_bytes: int, longest_bytes: int | None = None) -> DataError:
    return DataError(f"is {length_bytes:,} bytes long; a row may have {longest_bytes or LONGEST_ROW_BYTES:,}")


def _lines(stream: io.BufferedReader[Any]) -> Iterator[tuple[int, bytes | DataError]]:
    """Lines with their ends and numbers from 1; a line that is too long becomes an error."""
    number = 0
    while line := stream.readline(PIECE_BYTES):
        number += 1
        pieces, length = [line], len(line)
        while not pieces[-1].endswith(b"\n") and (piece := stream.readline(PIECE_BYTES)):
            length += len(piece)
            if length > LONGEST_ROW_BYTES:
                pieces.clear()
            pieces.append(piece)
        yield number, b"".join(pieces) if length <= LONGEST_ROW_BYTES else _too_long(length)


def _json_lines(stream: io.BufferedReader[Any], layout: Layout) -> Found:
    """One object per line; a list or objects over several lines are read, too."""
    found = layouts.json_layout(stream.peek(PIECE_BYTES))
    if found == "list":
        layout.say("read as one list of rows")
        yield from _json_list(stream)
    elif found == "objects":
        layout.say("read as objects over several lines")
        yield from _json_objects(stream)
    else:
        yield from _objects_in_lines(stream)


def _objects_in_lines(stream: io.BufferedReader[Any]) -> Found:
    for number, line in _lines(stream):
        if isinstance(line, DataError) or not (line.isspace() or line.strip() == BOM):
            yield "line", number, line


def _json(stream: io.BufferedReader[Any], layout: Layout) -> Found:
    """A list of rows, lists under keys, or JSON lines, which many files of this name hold."""
    head = stream.peek(PIECE_BYTES)
    found = layouts.json_layout(head)
    if found == "keyed":
        yield from _json_keyed(stream, layout)
        return
    if layout.split is not None:
        raise DataError(f"is a file and has no split {layout.split!r}; remove it")
    if found == "objects":
        layout.say("read as objects over several lines")
        yield from _json_objects(stream)
        return
    if head.lstrip().startswith(b"["):
        yield from _json_list(stream)
        return
    for i, (unit, number, line) in enumerate(_objects_in_lines(stream)):
        if i == 0 and isinstance(line, bytes) and isinstance(error := decode_row(line), DataError):
            raise DataError(f"holds neither a list of rows nor JSON lines: line {number} {error}")
        yield unit, number, line


# A list is cut into rows without decoding them, so that one bad row stays one bad row. (ijson stops at the first bad
# row, keeps one of two equal keys, and replaces half surrogate pairs by "?".)
# _INSIDE and _BETWEEN skip whole texts: up to a bracket, and in the list itself up to a comma. _TEXT ends a text.
_INSIDE = re.compile(rb'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
_BETWEEN = re.compile(rb'(?:[^"\[\]{},]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
_TEXT = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)


def _marks(stream: io.BufferedReader[Any], commas: tuple[int, ...] = (1,)) -> Iterator[tuple[bytes, bytes, int]]:
    """(bytes before the mark, mark, depth after it) for each bracket, and each comma at the depths `commas`.

    The mark is empty at the end of a piece of the file.
    """
    in_text, depth, buffer = False, 0, b""
    while piece := stream.read(PIECE_BYTES):
        buffer += piece
        start = position = 0
        while True:
            pattern = _TEXT if in_text else _BETWEEN if depth in commas else _INSIDE
            position = pattern.match(buffer, position).end()  # type: ignore[union-attr] - it matches nothing, too
            mark = buffer[position : position + 1]
            if mark == b'"':
                in_text = not in_text
                position += 1
            elif mark in (b"", b"\\"):
                break
            else:
                depth += (mark in b"[{") - (mark in b"]}")
                yield buffer[start:position], mark, depth
                start = position = position + 1
        yield buffer[start:position], b"", depth
        buffer = buffer[position:]


class _Part:
    """The bytes of a row so far; of a row that is too long, only their number."""

    def __init__(self) -> None:
        self._length, self._bytes = 0, bytearray()

    def add(self, part: bytes) -> None:
        self._length += len(part)
        self._bytes += part
        if self._length > LONGEST_ROW_BYTES:
            self._bytes.clear()

    def is_blank(self) -> bool:
        return self._length <= LONGEST_ROW_BYTES and not self._bytes.strip()

    def take(self) -> bytes | DataError:
        """Return the row, and begin another."""
        row = bytes(self._bytes) if self._length <= LONGEST_ROW_BYTES else _too_long(self._length)
        self._length, self._bytes = 0, bytearray()
        return row


def _json_list(stream: io.BufferedReader[Any]) -> Found:
    """The rows of a list, not decoded.

    Raises: DataError if the list does not end at the end of the file.
    """
    number, row, closed = 1, _Part(), False
    for run, mark, depth in _marks(stream):
        if closed and (run + mark).strip():
            raise DataError(f"goes on after the end of its list, which came after row {number - 1}")
        if closed or (mark == b"[" and depth == 1):
            continue
        closed = depth == 0 and mark != b""
        ended = closed or (mark == b"," and depth == 1)
        row.add(run if ended else run + mark)
        if ended and not (closed and number == 1 and row.is_blank()):
            yield "row", number, row.take()
            number += 1
    if not closed:
        raise DataError(f"is cut off: its list does not end; row {number} is the last that begins")


def _json_objects(stream: io.BufferedReader[Any]) -> Found:
    """Objects one after the other, each over any number of lines, not decoded."""
    number, row, outside = 1, _Part(), True
    for run, mark, depth in _marks(stream, ()):
        row.add((run.strip(b", \t\r\n" + BOM) if outside else run) + mark)
        outside = depth <= 0
        if outside and mark == b"}":
            yield "row", number, row.take()
            number += 1
    if not row.is_blank():
        yield "row", number, row.take()


_TRAINING = ("train", "training")
_KEY = re.compile(rb'"([^"\\]*)"\s*:\s*\Z')


def _json_keyed(stream: io.BufferedReader[Any], layout: Layout) -> Found:
    """The rows of the list under the key `split`; without it, of the only list or of a first list named train.

    Raises: DataError if several lists can be meant, or the object does not end.
    """
    number, row, depth, before = 1, _Part(), 0, b""
    key, read, lists = "", "", list[str]()
    for run, mark, depth in _marks(stream, (1, 2)):
        if mark == b"[" and depth == 2:
            match = _KEY.search(before + run)
            key = match[1].decode("utf-8", "replace") if match else ""
            if key in layouts.ROW_KEYS:
                lists.append(key)
                if layout.split is None and len(lists) > 1 and lists[0] not in _TRAINING:
                    best = next((name for name in lists if name in _TRAINING), lists[0])
                    raise DataError(f"holds several lists of rows ({', '.join(lists)})\nhelp: set split: {best}")
                read = key if key == (layout.split or lists[0]) else read
        elif key:
            closed = mark == b"]" and depth == 1
            ended = closed or (mark == b"," and depth == 2)
            row.add(run if ended else run + mark)
            if ended:
                content = row.take()
                if key == read and (content.strip() if isinstance(content, bytes) else True):
                    if number == 1:
                        layout.say(f"read as the rows under {key!r}")
                    yield "row", number, content
                    number += 1
            key = "" if closed else key
        before = before + run if mark == b"" and depth == 1 else b""
    if depth:
        raise DataError("is cut off: its object does not end")
    if not read:
        raise DataError(f"has no split {layout.split!r} (available: {', '.join(lists)})")


def _cells(stream: io.BufferedReader[Any], layout: Layout, usual: str) -> Found:
    """Rows of cells below a line of column names (RFC 4180); every value is text."""
    delimiter, name = layouts.delimiter(stream.peek(PIECE_BYTES), usual)
    if delimiter != usual:
        layout.say(f"read with {name} between cells")
    records = _records(stream, delimiter)
    _, columns = next(records, (1, []))
    if isinstance(problem := columns, DataError) or isinstance(problem := checked(dict.fromkeys(columns)), DataError):
        raise DataError(f"has no readable line of column names: it {problem}")
    if len(set(columns)) < len(columns):
        raise DataError(f"has two columns of one name ({', '.join(columns)})")
    for number, cells in records:
        if isinstance(cells, DataError):
            yield "line", number, cells
        elif len(cells) != len(columns):
            yield "line", number, DataError(f"has {len(cells)} cells, but the line of column names has {len(columns)}")
        else:
            yield "line", number, dict(zip(columns, cells, strict=True))


def _records(stream: io.BufferedReader[Any], delimiter: str) -> Iterator[tuple[int, list[str] | DataError]]:
    """Records with the line in which each begins; blank lines are skipped."""
    number, length = 0, 0

    def text(line: tuple[int, bytes | DataError]) -> str:
        nonlocal number, length
        number, content = line
        if isinstance(content, DataError):
            raise content
        length += len(content)
        if length > LONGEST_RECORD_BYTES:
            raise _too_long(length, LONGEST_RECORD_BYTES)
        return content.decode("utf-8", "surrogateescape")  # `checked` names the column that is not UTF-8

    # The default limit of a cell is 128 KiB, which documents exceed; it can only be set per process.
    csv.field_size_limit(LONGEST_RECORD_BYTES)
    reader = csv.reader(map(text, _lines(stream)), delimiter=delimiter, strict=True)
    while True:
        first, length = number + 1, 0
        try:
            cells = next(reader)
        except StopIteration:
            return
        except DataError as error:
            yield first, error
        except csv.Error as error:
            yield first, DataError(f"is not a record of cells: {error} (read up to line {number})")
        else:
            if cells:
                yield first, cells


TEXTS: dict[str, Callable[[io.BufferedReader[Any], Layout], Found]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": lambda stream, layout: _cells(stream, layout, ","),
    ".tsv": lambda stream, layout: _cells(stream, layout, "\t"),
}
