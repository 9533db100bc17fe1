"""Separate the calls of tools from the text of an answer, as Qwen2.5 and Qwen3 write them.

A call is `<tool_call>`, a line break, `{"name": …, "arguments": {…}}`, a line break and `</tool_call>`. The line break
before it belongs to it too: the chat template writes one between a content and a call.
"""

from __future__ import annotations

import json
from typing import NamedTuple

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_BLANKS = " \n\r\t"
# Deeper JSON is no call; the parser of JSON would end in a RecursionError.
_MOST_NESTED = 100


class CalledTool(NamedTuple):
    """A complete call. arguments: a JSON object as text."""

    name: str
    arguments: str


class ToolCallParser:
    """Separates content from calls as a text comes. How the text is cut into pieces does not matter.

    What is not a complete and valid call is content, unchanged.
    """

    def __init__(self) -> None:
        self._held = ""  # may be the start of a call
        self._call: _Call | None = None

    def push(self, text: str) -> list[str | CalledTool]:
        """Return the pieces of content and the calls that are complete now, in order."""
        found: list[str | CalledTool] = []
        while text:
            text = self._read_content(text, found) if self._call is None else self._read_call(self._call, text, found)
        return found

    def finish(self) -> list[str | CalledTool]:
        """Return the rest as content."""
        rest = self._held if self._call is None else self._call.text
        self._held, self._call = "", None
        return [rest] if rest else []

    def _read_content(self, text: str, found: list[str | CalledTool]) -> str:
        """Return the text after the start of a call."""
        content, opened, rest = (self._held + text).partition(OPEN)
        if opened:
            final = len(content) - content.endswith("\n")
            self._held, self._call = "", _Call(content[final:] + OPEN)
        else:
            final = len(content) - _start_at_end(content)
            self._held = content[final:]
        if final:
            found.append(content[:final])
        return rest

    def _read_call(self, call: _Call, text: str, found: list[str | CalledTool]) -> str:
        """Return the text after the call, or that which follows the error of a broken one."""
        for place, character in enumerate(text):
            if not call.read(character):
                # A line break or the start of a tag may belong to the next call.
                kept = call.text[: len(call.text) - _start_at_end(call.text)]
                found.append(kept)
                self._call = None
                return call.text[len(kept) :] + text[place:]
            if call.complete:
                found.append(_called(call.json) or call.text)
                self._call = None
                return text[place + 1 :]
        return ""


class _Call:
    """A call as it is written. text: all of it. complete: whether its end was read."""

    def __init__(self, opened: str):
        self._opened = opened
        self._read: list[str] = []
        self._brackets: list[str] = []  # closing ones that must follow
        self._in_string = self._escaped = False
        self._end = 0  # characters of the JSON; 0 before its end
        self._closed = 0  # characters of the tag at the end

    @property
    def text(self) -> str:
        return self._opened + "".join(self._read)

    @property
    def json(self) -> str:
        return "".join(self._read[: self._end])

    @property
    def complete(self) -> bool:
        return self._closed == len(CLOSE)

    def read(self, character: str) -> bool:
        """Return whether the character can follow; if not, it is not read."""
        if self._end:
            fits = character == CLOSE[self._closed] or (character in _BLANKS and not self._closed)
            self._closed += fits and character not in _BLANKS
        elif self._in_string:
            fits = self._read_string(character)
        else:
            fits = self._read_json(character)
        if fits:
            self._read.append(character)
        return fits

    def _read_json(self, character: str) -> bool:
        if character in "{[":
            self._brackets.append("}" if character == "{" else "]")
            return len(self._brackets) <= _MOST_NESTED and self._brackets[0] == "}"
        if not self._brackets:
            return character in _BLANKS
        if character in "}]":
            fits = self._brackets.pop() == character
            self._end = 0 if self._brackets else len(self._read) + 1
            return fits
        self._in_string = character == '"'
        return character != "<"  # the model gave the call up

    def _read_string(self, character: str) -> bool:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
        return character >= " "


def _start_at_end(text: str) -> int:
    """Return how many characters at the end may be the start of a call."""
    starts = f"\n{OPEN}"[:-1], OPEN[:-1]
    lengths = range(min(len(starts[0]), len(text)), 0, -1)
    return next((n for n in lengths if any(start.startswith(text[-n:]) for start in starts)), 0)


def _called(text: str) -> CalledTool | None:
    """Read the JSON of a call; None if it is none. Arguments may be an object or, as in OpenAI's API, its text."""
    try:
        call = json.loads(text)
        name, arguments = call["name"], call.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        (name + written).encode()  # half a surrogate pair is no text
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return CalledTool(name, written) if isinstance(arguments, dict) and name else None
