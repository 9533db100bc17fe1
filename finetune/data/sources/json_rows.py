"""Decode the bytes of one JSON object as a row: stricter than `json.loads`, and no slower."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from finetune.system.errors import DataError

# Later functions recurse through a row.
DEEPEST = 100
# A row without these bytes, and with few brackets, always passes `checked`.
_SUSPICIOUS = (b"\\u0000", b"\\ud", b"\\uD")
BOM = b"\xef\xbb\xbf"
_WALKED = (str, dict, list)
_KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


def kind(value: Any) -> str:
    """Return the JSON name of a value's type."""
    return _KINDS.get(type(value), type(value).__name__)


def decode_row(line: bytes) -> dict[str, Any] | DataError:
    """Decode a line of JSON; return an error if it is not one valid object."""
    try:
        row = DECODER.decode(_without_marks(str(line, "utf-8")))
    except DataError as error:
        return error
    except UnicodeDecodeError as error:
        return DataError(f"is not UTF-8 (byte {error.start + 1} is {line[error.start]:#04x}); save the file as UTF-8")
    except json.JSONDecodeError as error:
        return DataError(_not_json(line, error))
    except RecursionError:
        return DataError(f"is nested more than {DEEPEST} deep")
    except ValueError:
        return DataError("holds an integer of more than 4,300 digits")
    if not isinstance(row, dict):
        hint = "; name a file with a list of rows .json" if isinstance(row, list) else ""
        return DataError(f"must be an object, found {kind(row)}{hint}")
    brackets = line.count(b"[") + line.count(b"{")
    return checked(row) if brackets > DEEPEST or any(mark in line for mark in _SUSPICIOUS) else row


def _without_marks(text: str) -> str:
    """Cut byte-order marks at both ends: joined files have them anywhere between rows."""
    return text.strip("\ufeff \t\r\n") if text[:1] == "\ufeff" or "\ufeff" in text[-4:] else text


def checked(decoded: Any, location: str = "") -> Any:
    """Return a row, or another value, if its texts can be encoded as UTF-8 and it is not too deep, else a DataError."""
    pending: list[tuple[str, Any, int]] = [(location, decoded, 1)]
    while pending:
        path, value, depth = pending.pop()
        if isinstance(value, str):
            if flaw := text_flaw(value):
                return DataError(f"{path} {flaw}")
        elif depth > DEEPEST:
            return DataError(f"{location} is nested more than {DEEPEST} deep".lstrip())
        elif isinstance(value, dict):
            for key, item in value.items():
                if flaw := text_flaw(str(key)):
                    return DataError(f"{path} has the name {key!r}, which {flaw}".lstrip())
                if isinstance(item, _WALKED):
                    name = str(key) if str(key).isprintable() else repr(key)
                    pending.append((f"{path}.{name}" if path else name, item, depth + 1))
        elif isinstance(value, list):  # perhaps of a million numbers
            pending += [(f"{path}[{i}]", item, depth + 1) for i, item in enumerate(value) if isinstance(item, _WALKED)]
    return decoded


def text_flaw(text: str) -> str | None:
    """Return why a text cannot be written as UTF-8 or holds a NUL character; None for other texts."""
    if "\0" in text:
        return f"holds a NUL character (character {text.index(chr(0)) + 1})"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # `surrogateescape` keeps a byte that is not UTF-8 like this.
        byte = f"is not UTF-8 (byte {code - 0xDC00:#04x}) or " if 0xDC80 <= code <= 0xDCFF else ""
        return f"{byte}holds half of a surrogate pair (\\u{code:04x}, character {error.start + 1})"
    return None


def _not_json(line: bytes, error: json.JSONDecodeError) -> str:
    if b"\0" in line:
        return f"holds a NUL character (byte {line.index(0) + 1})"
    if not line.strip():
        return "is empty; remove the extra comma"
    if line.strip() == b"[":
        return "opens a list; name the file .json"
    if line.lstrip().startswith((b"//", b"#")):
        return "is a comment, which JSON lines have none of; remove the line"
    reason = f"{error.msg.removesuffix(' at')} at column {error.colno}"
    ends_early = error.msg.startswith("Unterminated") or error.pos >= len(error.doc.rstrip())
    return f"is cut off: {reason}" if ends_early else f"is not JSON: {reason}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise DataError(f"has the key {twice!r} twice in one object")
    return row


def _no_constant(name: str) -> Any:
    raise DataError(f"holds {name}, which is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise DataError(f"holds {text[:40]}, which is larger than any floating-point number")
    return number


# Built once: `json.loads` with a hook builds a decoder per call, which costs more than the hook.
DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
