"""Calls of tools as Qwen2.5 writes them: JSON between <tool_call> and </tool_call>."""

from __future__ import annotations

import json
from typing import NamedTuple

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class CalledTool(NamedTuple):
    """A complete call. arguments: JSON text."""

    name: str
    arguments: str


class ToolCallParser:
    """Separates content from calls as a text comes."""

    def __init__(self) -> None:
        self._text = ""

    def push(self, text: str) -> list[str | CalledTool]:
        """Return the content and the calls that are complete now."""
        self._text += text
        found: list[str | CalledTool] = []
        while _CLOSE in self._text and _OPEN in self._text:
            before, _, rest = self._text.partition(_OPEN)
            inner, closed, after = rest.partition(_CLOSE)
            if not closed:
                break
            found += [before] if before.strip() else []
            found.append(_read(inner) or f"{_OPEN}{inner}{_CLOSE}")
            self._text = after
        return found

    def finish(self) -> list[str | CalledTool]:
        """Return the rest as content."""
        rest, self._text = self._text, ""
        return [rest] if rest.strip() else []


def _read(text: str) -> CalledTool | None:
    try:
        call = json.loads(text)
        return CalledTool(str(call["name"]), json.dumps(call["arguments"]))
    except (ValueError, TypeError, KeyError):
        return None
