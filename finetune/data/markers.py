"""Markers that stand for a row's texts while a chat template is rendered, so that what the template wrote and what the
row says stay apart.

A marker compares and hashes as the text it stands for, so that templates which look a key up or compare a type take the
way they take for the row itself; what they write is the marker.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.data.messages import Message, ToolCall
from finetune.errors import DataError

# Private-use characters: no template writes them; a row that holds them is refused.
OPEN, CLOSE = "\ue0f0", "\ue0f1"
# A marker's letters say how the template escaped it: j as JSON, a as JSON in ASCII; one for each time.
MARKER = re.compile(f"{OPEN}([ja]*)([0-9]+){CLOSE}")
_ASCII_MARKER = re.compile(r"\\ue0f0([ja]*)([0-9]+)\\ue0f1")


class Marker(str):
    """Reads as a marker; compares, orders and hashes as the text that it stands for."""

    _text: str

    def __eq__(self, other: object) -> bool:
        return self._text == (other._text if isinstance(other, Marker) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __lt__(self, other: str) -> bool:
        return self._text < (other._text if isinstance(other, Marker) else other)

    def __gt__(self, other: str) -> bool:
        return self._text > (other._text if isinstance(other, Marker) else other)

    def __hash__(self) -> int:
        return hash(self._text)


@dataclass(slots=True)
class MarkedRow:
    """A conversation with markers for its texts.

    texts: what the markers stand for, by number. owners: the message each is of; -1 for tools. shape: equal for rows
    that most templates write alike, their texts aside.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[Any] | None = None
    texts: list[str] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    shape: tuple = ()


def mark_row(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> MarkedRow:
    """Raises: DataError for the markers' own characters and for values that JSON has no word for."""
    row = MarkedRow()
    shape: list[Any] = []
    for i, message in enumerate(messages):
        turn: dict[str, Any] = {"role": message.role, "content": _mark(message.content, row, i)}
        shape.append((message.role, message.content != ""))
        if message.tool_calls:
            calls, call_shapes = zip(*(_mark_call(call, row, i) for call in message.tool_calls), strict=True)
            turn["tool_calls"] = list(calls)
            shape.append(call_shapes)
        row.messages.append(turn)
    if tools:
        row.tools, tools_shape = _mark_value(list(tools), row, -1)
        shape.append(tools_shape)
    row.shape = tuple(shape)
    if any(OPEN in text or CLOSE in text for text in row.texts):
        raise DataError("a text holds the private-use character U+E0F0 or U+E0F1; remove it")
    return row


def _mark(text: str, row: MarkedRow, owner: int) -> str:
    if not text:
        return text
    marker = Marker(f"{OPEN}{len(row.texts)}{CLOSE}")
    marker._text = text
    row.texts.append(text)
    row.owners.append(owner)
    return marker


def _mark_call(call: ToolCall, row: MarkedRow, owner: int) -> tuple[dict[str, Any], Any]:
    name = _mark(call.name, row, owner)
    arguments, shape = _mark_value(call.arguments, row, owner)
    return {"type": "function", "function": {"name": name, "arguments": arguments}}, shape


def _mark_value(value: Any, row: MarkedRow, owner: int) -> tuple[Any, Any]:
    """A JSON value with markers for its strings and keys, and its shape."""
    if isinstance(value, str):
        return _mark(value, row, owner), value != ""
    if isinstance(value, dict):
        pairs = {}
        shapes = []
        for key, item in value.items():
            if not isinstance(key, str):
                raise DataError(f"tools and arguments are JSON, whose keys are texts; found the key {key!r}")
            marked_key = _mark(key, row, owner)
            pairs[marked_key], shape = _mark_value(item, row, owner)
            shapes.append((key != "", shape))
        return pairs, ("{", *shapes)
    if isinstance(value, list | tuple):
        marked = [_mark_value(item, row, owner) for item in value]
        return [item for item, _ in marked], ("[", *(shape for _, shape in marked))
    if value is None or isinstance(value, bool | int | float):
        return value, (type(value), value)
    raise DataError(f"tools and arguments are JSON, which knows no {type(value).__name__}: {value!r}")


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    """The `tojson` filter of chat templates: not escaped for HTML; markers remember that they were escaped."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii and "\\ue0f0" in text:
        return _ASCII_MARKER.sub(f"{OPEN}\\1a\\2{CLOSE}", text)
    return MARKER.sub(f"{OPEN}\\1j\\2{CLOSE}", text) if OPEN in text else text


def escaped(text: str, letters: str) -> str:
    """What a template writes for a text that it escaped as the letters of its marker say."""
    for letter in letters:
        text = json.dumps(text, ensure_ascii=letter == "a")[1:-1]
    return text
