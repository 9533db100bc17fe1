"""The values of a decoded row: checked when read, and named in errors as in the file."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.data.sources.json_rows import DECODER, DEEPEST, checked, kind, text_flaw
from finetune.system.errors import DataError

_SHOWN_CHARACTERS = 60
_SHOWN_NAMES = 32


def shown(value: Any) -> str:
    """Return a number or a text (cut if it is long) as it is, and of anything else its kind."""
    if isinstance(value, str):
        return repr(value[:_SHOWN_CHARACTERS]) + ("…" if len(value) > _SHOWN_CHARACTERS else "")
    # Python refuses to print integers of more than 4,300 digits.
    short = isinstance(value, float) or (type(value) is int and value.bit_length() <= 64)
    return repr(value) if short else kind(value)


def printable_name(name: Any) -> str:
    """Return a name from a file, cut, and escaped if it holds control characters."""
    short = str(name)[:_SHOWN_CHARACTERS]
    return short if short.isprintable() else repr(short)[1:-1]


def listed(names: Iterable[Any]) -> str:
    """Return sorted names for a message, cut if there are many."""
    ordered = sorted(map(printable_name, names))
    more = f" and {len(ordered) - _SHOWN_NAMES} more" if len(ordered) > _SHOWN_NAMES else ""
    return (", ".join(ordered[:_SHOWN_NAMES]) or "none") + more


def as_text(value: Any, location: str) -> str:
    """Return the value, which must be text.

    Raises: DataError naming the location, for another type, a NUL character or half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise DataError(f"{location} must be text, found {kind(value)}")
    if flaw := text_flaw(value):
        raise DataError(f"{location} {flaw}")
    return value


def as_json(value: Any, location: str) -> Any:
    """Decode a value that files hold decoded or as JSON text.

    Raises: DataError naming the location, for text that is not JSON and for values that JSON cannot hold.
    """
    try:
        if isinstance(value, str):
            value = _decoded(value)
        json.dumps(value, allow_nan=False)
    except DataError as error:
        raise DataError(f"{location} {error}") from error
    except RecursionError as error:
        raise DataError(f"{location} is nested more than {DEEPEST} deep") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{location} must be JSON, found {kind(value)} that is not: {error}") from error
    if isinstance(flaw := checked(value, location), DataError):
        raise flaw
    return value


def _decoded(text: str) -> Any:
    """Decode JSON, or what Python's `str` makes of lists and objects, as pandas writes them into CSV files."""
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError:
        if "'" not in text or not text.lstrip().startswith(("[", "{")):
            raise
        try:
            return _literal(ast.parse(text.strip(), mode="eval").body)
        except (SyntaxError, ValueError, MemoryError):
            pass  # the reason why it is not JSON says more
        raise


def _literal(node: ast.expr) -> Any:
    """Return the value of a Python literal that JSON has, too. Raises: ValueError for others."""
    match node:
        case ast.Constant(value=value) if value is None or isinstance(value, str | bool | int | float):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values) if all(isinstance(key, ast.Constant) for key in keys):
            names = [_literal(key) for key in keys if key is not None]
            if all(isinstance(name, str) for name in names) and len(set(names)) == len(values):
                return dict(zip(names, map(_literal, values), strict=True))
    raise ValueError("no JSON value")


@dataclass(frozen=True, slots=True)
class Fields:
    """A row, or an object in it, under our names of its keys.

    names: our name to the file's, where they differ.
    location: of the object in its row; empty for the row itself.
    """

    values: Mapping[str, Any]
    names: Mapping[str, str]
    location: str = ""

    @classmethod
    def of(
        cls, values: Mapping[str, Any], mapped: Mapping[str, str], aliases: Mapping[str, str], location: str
    ) -> Fields:
        """Rename the keys of `values`.

        mapped: our name to the file's, from the config; a key that has our name by chance gives way.
        aliases: our name to another known name.
        Raises: DataError if the object has a key under both names.
        """
        names = {ours: theirs for ours, theirs in mapped.items() if theirs in values}
        for ours, theirs in aliases.items():
            if theirs not in values or ours in mapped or theirs in mapped.values():
                continue
            if values.get(ours) is None:
                names[ours] = theirs
            elif values[theirs] is not None:
                raise DataError(f"{location or 'the row'} has both {theirs} and {ours}; keep one of them")
        if not names:
            return cls(values, names, location)
        taken = {*names, *names.values()}
        kept = {key: value for key, value in values.items() if key not in taken}
        return cls(kept | {ours: values[theirs] for ours, theirs in names.items()}, names, location)

    def get(self, key: str) -> Any:
        """Return the value; None if the key is missing or null."""
        return self.values.get(key)

    def named(self, key: str) -> str:
        """Return the file's name of the key, with its location."""
        name = self.names.get(key, key)
        return f"{self.location}.{name}" if self.location else name

    def text(self, key: str, default: str | None = None) -> str:
        """Return the key's text; `default` if the key is missing or null."""
        value = self.values.get(key)
        return default if value is None and default is not None else as_text(value, self.named(key))


def is_empty(value: Any) -> bool:
    """Return whether a value is null, an empty text, list or object."""
    return value is None or (isinstance(value, str | list | Mapping) and not value)
