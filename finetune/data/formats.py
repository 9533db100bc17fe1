"""Row formats: one function each, from a decoded JSON object to a conversation.

To add a format: write `(row) -> list[Message]`, name its columns, add it to FORMATS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.errors import DataError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: a role out of ROLES and its text."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class RowFormat:
    """A format is recognised by the columns it needs; `parse` raises DataError with what is wrong in the row."""

    required: frozenset[str]
    parse: Callable[[Mapping[str, Any]], list[Message]]


def _text(row: Mapping[str, Any], column: str, default: str | None = None) -> str:
    value = row.get(column, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise DataError(f"{column} must be text, found {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"{place} must be an object with role and content, found {_kind(item)}")
    unknown = sorted(set(item) - {"role", "content", "name"})
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        raise DataError(f"{place}.role is {role!r}; it must be one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"{place}.content must be text, found {_kind(content)}")
    if unknown:
        raise DataError(f"{place} has {', '.join(unknown)}, which this version cannot train on; remove it")
    return Message(role, content)


def _conversation(items: Any, column: str) -> list[Message]:
    if not isinstance(items, list) or not items:
        raise DataError(
            f"{column} must be a list with at least one message, found {_kind(items) if items else 'nothing'}"
        )
    return [_message(item, f"{column}[{i}]") for i, item in enumerate(items)]


def parse_messages(row: Mapping[str, Any]) -> list[Message]:
    """OpenAI chat rows: `{"messages": [{"role": …, "content": …}, …]}`."""
    return _conversation(row["messages"], "messages")


def parse_prompt_completion(row: Mapping[str, Any]) -> list[Message]:
    """TRL's prompt/completion rows; text becomes one user and one assistant turn, message lists are joined."""

    def side(column: str, role: str) -> list[Message]:
        value = row[column]
        return _conversation(value, column) if isinstance(value, list) else [Message(role, _text(row, column))]

    return side("prompt", "user") + side("completion", "assistant")


def parse_alpaca(row: Mapping[str, Any]) -> list[Message]:
    """Alpaca rows: instruction, optional input (on its own line after it), output, system and history pairs."""
    turns = []
    if system := _text(row, "system", default=""):
        turns.append(Message("system", system))
    for i, pair in enumerate(row.get("history") or []):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(f"history[{i}] must be a pair of texts, found {_kind(pair)}")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    extra = _text(row, "input", default="")
    instruction = _text(row, "instruction")
    turns.append(Message("user", f"{instruction}\n{extra}" if extra else instruction))
    return [*turns, Message("assistant", _text(row, "output"))]


FORMATS = {
    "messages": RowFormat(frozenset({"messages"}), parse_messages),
    "prompt_completion": RowFormat(frozenset({"prompt", "completion"}), parse_prompt_completion),
    "alpaca": RowFormat(frozenset({"instruction", "output"}), parse_alpaca),
}


def detect_format(columns: frozenset[str], source: str) -> str:
    """The one format whose columns are all there.

    Raises: DataError naming the columns found when none or several fit.
    """
    fitting = [name for name, fmt in FORMATS.items() if fmt.required <= columns]
    if len(fitting) == 1:
        return fitting[0]
    known = "; ".join(f"{name}: {', '.join(sorted(fmt.required))}" for name, fmt in FORMATS.items())
    found = ", ".join(sorted(columns)) or "none"
    problem = f"fits several formats ({', '.join(fitting)}); set format" if fitting else f"fits no format ({known})"
    raise DataError(f"{source}: a row with the columns {found} {problem}")


def parse_row(row: Any, format_name: str) -> list[Message]:
    """One row as a conversation.

    Raises: DataError saying what is wrong, without the row's place (the reader adds it).
    """
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be an object, found {_kind(row)}")
    fmt = FORMATS[format_name]
    if missing := sorted(fmt.required - set(row)):
        found = ", ".join(sorted(map(str, row))) or "none"
        raise DataError(f"lacks {', '.join(missing)}, which {format_name} rows need; its columns: {found}")
    return fmt.parse(row)
