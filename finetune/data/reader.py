"""Files of rows, read with the place of every row, so that an error can name it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import DataError

SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True, slots=True)
class Row:
    """A decoded JSON value, or the DataError that reading it met. place: `file:line`, or `file:row N` in a list."""

    place: str
    value: Any


def resolve_source(path: str, split: str | None) -> Path:
    """The file a source names; in a folder, the file called after its split.

    Raises: DataError saying what is there instead.
    """
    source = Path(path).expanduser()
    if source.is_dir():
        files = sorted(p.name for p in source.iterdir() if p.suffix in SUFFIXES)
        if split is None:
            raise DataError(f"{path} is a folder; name a file or set split (files there: {', '.join(files) or 'none'})")
        found = [source / f"{split}{suffix}" for suffix in SUFFIXES if (source / f"{split}{suffix}").is_file()]
        if not found:
            raise DataError(f"{path} has no {split}.jsonl or {split}.json (files there: {', '.join(files) or 'none'})")
        return found[0]
    if not source.is_file():
        near = sorted(p.name for p in source.parent.glob("*") if p.suffix in SUFFIXES) if source.parent.is_dir() else []
        raise DataError(f"{path} does not exist" + (f"; {source.parent} holds {', '.join(near[:8])}" if near else ""))
    if split is not None:
        raise DataError(f"{path} is a file and has no split {split!r}; remove split")
    if source.suffix not in SUFFIXES:
        raise DataError(f"{path} must be a .jsonl or .json file")
    return source


def read_rows(file: Path) -> Iterator[Row]:
    """Rows of a .jsonl file (one object a line, empty lines skipped) or a .json file (a list of objects).

    Raises: DataError if the file can't be read at all; a broken line of .jsonl becomes a Row that holds its DataError.
    """
    try:
        if file.suffix == ".json":
            yield from _json_rows(file)
        else:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _line(f"{file}:{number}", line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error


def _line(place: str, line: bytes) -> Row:
    try:
        return Row(place, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Row(place, DataError(f"is not UTF-8 (byte {error.start})"))
    except (json.JSONDecodeError, RecursionError) as error:
        return Row(place, DataError(f"is not JSON: {error}"))


def _json_rows(file: Path) -> Iterator[Row]:
    try:
        rows = json.loads(file.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}; one object a line needs the name .jsonl") from error
    if not isinstance(rows, list):
        raise DataError(f"{file} must hold a list of rows; one object a line needs the name .jsonl")
    yield from (Row(f"{file}:row {number}", value) for number, value in enumerate(rows, 1))
