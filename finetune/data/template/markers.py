"""Markers that replace a row's texts while a chat template is rendered: they separate the row from the template.

A marker compares and hashes as the text it stands for, so a template that looks up a key or compares a text takes the
same branch as for the row itself. Written out, it is the marker. A tool and the arguments of a call have one marker for
the whole value, which `tojson` writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.formats.messages import Message

# Private-use characters: no template writes them, and a row that contains them is refused.
OPEN, CLOSE = "\ue0f0", "\ue0f1"
# A marker's letters record how the template escaped it, the last time first: j as JSON, a as JSON in ASCII.
MARKER = re.compile(f"{OPEN}([ja]*)([0-9]+){CLOSE}")


class Marker(str):
    """Is written as a marker; compares, orders and hashes as the text that it stands for."""

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


class MarkedDict(dict):
    """An object with markers for its texts, and a number for the whole."""

    _number: int


class MarkedList(list):
    """A list with markers for its texts, and a number for the whole."""

    _number: int


class MarkedRow:
    """A conversation with markers instead of its texts.

    values: texts, objects and lists that the markers stand for, by number.
    owners: the message of each value; -1 for tools.
    parents: the number of the value that contains each value; -1 for none.
    contents: the number of each message's text, if it is not empty; of several texts, the first.
    shape: rows of equal shape give equal numbers to their outer values, which are contents, names, whole arguments and
        whole tools. `mark_inner` marks what is inside these.
    """

    def __init__(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()):
        self.values: list[Any] = []
        self.owners: list[int] = []
        self.parents: list[int] = []
        self.contents: dict[int, int] = {}
        self.messages: list[dict[str, Any]] = []
        self.tools: MarkedList | None = None
        self._unmarked: list[tuple[Any, Any, int]] = []  # (container, key, number of the value to put there)
        for i, message in enumerate(messages):
            if message.content:
                self.contents[i] = len(self.values)
            turn: dict[str, Any] = {"role": message.role, "content": self._content(message, i)}
            if message.tool_calls:
                turn["tool_calls"] = self._calls(message.as_dict()["tool_calls"], i)
            self.messages.append(turn)
        if tools:
            number = self._add(list(tools), -1, -1)
            self.tools = MarkedList([None] * len(tools))
            self.tools._number = number
            self._unmarked += [(self.tools, k, self._add(tool, -1, number)) for k, tool in enumerate(tools)]
        names = [[call.name != "" for call in message.tool_calls] for message in messages]
        roles = [(m.role, _shape_of_content(m), *named) for m, named in zip(messages, names, strict=True)]
        self.shape: tuple = (len(tools), *roles)

    def mark_inner(self) -> tuple:
        """Mark the texts and keys in arguments and tools; return their shape, which decides their numbers."""
        shapes = []
        for container, key, number in self._unmarked:
            marked, shape = self._inner(self.values[number], self.owners[number], number)
            if isinstance(marked, dict):
                marked = MarkedDict(marked)
                marked._number = number
            container[key] = marked
            shapes.append(shape)
        return tuple(shapes)

    def _add(self, value: Any, owner: int, parent: int) -> int:
        self.values.append(value)
        self.owners.append(owner)
        self.parents.append(parent)
        return len(self.values) - 1

    def _content(self, message: Message, owner: int) -> str | list[dict[str, str]]:
        if not message.media:
            return self._text(message.content, owner, -1)
        parts = message.as_dict()["content"]
        return [part | {"text": self._text(part["text"], owner, -1)} if "text" in part else part for part in parts]

    def _text(self, text: str, owner: int, parent: int) -> str:
        if not text:
            return text
        marker = Marker(f"{OPEN}{self._add(text, owner, parent)}{CLOSE}")
        marker._text = text
        return marker

    def _calls(self, calls: list[dict[str, Any]], owner: int) -> MarkedList:
        marked = MarkedList()
        marked._number = self._add(calls, owner, -1)
        for call in calls:
            function = MarkedDict()
            function._number = self._add(call["function"], owner, marked._number)
            function["name"] = self._text(call["function"]["name"], owner, function._number)
            arguments = self._add(call["function"]["arguments"], owner, function._number)
            self._unmarked.append((function, "arguments", arguments))
            marked.append({"type": call["type"], "function": function})
        return marked

    def _inner(self, value: Any, owner: int, parent: int) -> tuple[Any, Any]:
        """A JSON value with markers for its texts and keys, and its shape."""
        if isinstance(value, str):
            return self._text(value, owner, parent), value != ""
        if isinstance(value, dict):
            pairs = {}
            shapes = []
            for key, item in value.items():
                marked_key, key_shape = self._inner(key, owner, parent)
                pairs[marked_key], shape = self._inner(item, owner, parent)
                shapes += [key_shape, shape]
            return pairs, ("{", *shapes)
        if isinstance(value, list | tuple):
            marked = [self._inner(item, owner, parent) for item in value]
            return [item for item, _ in marked], ("[", *(shape for _, shape in marked))
        return value, repr(value)


def _shape_of_content(message: Message) -> Any:
    """Whether a text is not empty; of a message with media, the kinds of its parts."""
    if not message.media:
        return message.content != ""
    return tuple("text" if isinstance(part, str) else part.kind for part in message.parts)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    """The `tojson` filter of chat templates: not escaped for HTML; markers record that they were escaped."""
    if isinstance(value, MarkedDict | MarkedList) and not (ensure_ascii or indent or separators or sort_keys):
        return f"{OPEN}j{value._number}{CLOSE}"
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii and "\\ue0f0" in text:
        return text.replace("\\ue0f0", f"{OPEN}a").replace("\\ue0f1", CLOSE)
    return text.replace(OPEN, f"{OPEN}j") if OPEN in text else text


def written(value: Any, letters: str) -> str:
    """Return what a template writes for a value whose marker has these letters."""
    if not isinstance(value, str):
        value, letters = json.dumps(value, ensure_ascii=False), letters[:-1]
    for letter in reversed(letters):
        value = json.dumps(value, ensure_ascii=letter == "a")[1:-1]
    return value
