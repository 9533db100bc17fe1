"""Recognize how a text file writes its rows from its first bytes: encoding, line ends, delimiter, layout of JSON."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO

from finetune.data.sources.json_rows import BOM, decode_row
from finetune.system.errors import DataError

_PIECE_BYTES = 1 << 16
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
SPLITS = ("train", "training", "test", "validation", "valid", "val", "dev", "eval")
# Keys of an object that hold the rows of a file.
ROW_KEYS = frozenset({*SPLITS, "data", "rows", "examples", "items", "records", "instances", "samples", "dataset"})
_SPACE = rb"[\s\xef\xbb\xbf]*"
_LIST = re.compile(_SPACE + rb"\[\s*\{")
# The second line of a file of JSON lines is an object, and never begins with a key.
_PRETTY = re.compile(_SPACE + rb'\{(?:[^\r\n]*[,\[{])?[ \t]*\r?\n\s*"')
_SCALAR = rb'(?:"[^"\\]*"|[-\d.]+|true|false|null)'
# Text and numbers may come before the list. A list of messages is a row.
_KEYED = re.compile(
    _SPACE + rb'\{\s*(?:"[^"\\]*"\s*:\s*' + _SCALAR + rb'\s*,\s*)*"(?:' + "|".join(ROW_KEYS).encode() + rb")"
    rb'"\s*:\s*\[\s*\{(?!\s*"(?:role|from)")'
)


class Recoded(io.RawIOBase):
    """A stream whose pieces are converted. convert: called with a piece and whether the file ends."""

    def __init__(self, stream: BinaryIO, convert: Callable[[bytes, bool], bytes]):
        self._stream, self._convert, self._ready, self._ended = stream, convert, b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer with converted bytes; return their number, 0 at the end."""
        while not self._ready and not self._ended:
            piece = self._stream.read(_PIECE_BYTES)
            self._ended = not piece
            self._ready = self._convert(piece, self._ended)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def from_utf16(stream: BinaryIO) -> Recoded:
    """Return a stream in UTF-16, which starts with a byte-order mark, as UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-16")()

    def convert(piece: bytes, ends: bool) -> bytes:
        try:
            return decoder.decode(piece, ends).encode()
        except UnicodeError as error:
            raise DataError(f"is not the UTF-16 text that its first bytes announce: {error}") from error

    return Recoded(stream, convert)


def from_carriage_returns(stream: BinaryIO) -> Recoded:
    """Return a stream whose lines end in carriage returns with newlines instead."""
    return Recoded(stream, lambda piece, ends: piece.replace(b"\r", b"\n"))


def is_utf16(head: bytes) -> bool:
    """Return whether the bytes start with the mark of UTF-16, and not with that of UTF-32."""
    return head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and head[2:4] != b"\0\0"


def ends_lines_with_cr(head: bytes) -> bool:
    """Return whether a file has carriage returns and no newline."""
    return b"\r" in head[:-1] and b"\n" not in head


def delimiter(head: bytes, usual: str) -> tuple[str, str]:
    """Return the delimiter of the line of column names, and its name. The usual one wins if it splits the line."""
    line = head.removeprefix(BOM).splitlines()[0].decode("utf-8", "replace") if head.strip() else ""
    for candidate in (usual, *_DELIMITERS):
        # Quoted names are no cells with another delimiter; a name over several lines is none with any.
        with suppress(csv.Error):
            if len(next(csv.reader([line], delimiter=candidate, strict=True), [])) > 1:
                return candidate, _DELIMITERS[candidate]
    return usual, _DELIMITERS[usual]


def json_layout(head: bytes) -> str:
    """Return how a file writes rows: `list`, `objects` over several lines, `keyed` lists, or `lines`."""
    if _LIST.match(head):
        return "list"
    if _KEYED.match(head):
        first, _, rest = head.lstrip(b" \t\r\n").partition(b"\n")
        several = rest.strip() and not isinstance(decode_row(first), DataError)
        return "lines" if several else "keyed"
    return "objects" if _PRETTY.match(head) else "lines"
