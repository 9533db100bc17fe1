"""The part of Go's text/template that chat templates for Ollama use."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|:=|[()]|[^\s()]+')
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda one, *others: one in others,
    "ne": lambda one, other: one != other,
    "len": len,
    "slice": lambda items, start: items[start:],
    "not": lambda value: not value,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
}


def render(source: str, **data: Any) -> str:
    """Render a template with `.Messages` and the like; raise ValueError for syntax outside of this part."""
    parts = list(_parts(source))
    tree = _block(iter(parts))
    return "".join(_write(tree, data, {"$": data}))


def _parts(source: str) -> Iterator[tuple[str, str]]:
    """Yield ("text", …) and ("action", …), without the spaces that dashes remove."""
    pieces = re.split(r"(\{\{.*?\}\})", source, flags=re.DOTALL)
    for place, piece in enumerate(pieces):
        if place % 2:
            yield "action", piece.removeprefix("{{").removeprefix("- ").removesuffix("}}").removesuffix(" -").strip()
            continue
        if place + 1 < len(pieces) and pieces[place + 1].startswith("{{- "):
            piece = piece.rstrip(" \t\r\n")
        if place and pieces[place - 1].endswith(" -}}"):
            piece = piece.lstrip(" \t\r\n")
        yield "text", piece


def _block(parts: Iterator[tuple[str, str]]) -> list[Any]:
    nodes: list[Any] = []
    for kind, text in parts:
        if kind == "text":
            nodes.append(text)
        elif text == "end":
            return nodes
        elif text.startswith(("if ", "range ")):
            nodes.append((*text.split(" ", 1), _block(parts)))
        else:
            nodes.append(("do", text, []))
    return nodes


def _write(nodes: list[Any], dot: Any, names: dict[str, Any]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, str):
            yield node
            continue
        kind, text, body = node
        if kind == "if":
            if _value(text, dot, names):
                yield from _write(body, dot, names)
        elif kind == "range":
            variables, _, items = text.partition(" := ")
            index, item = variables.split(", ")
            for place, value in enumerate(_value(items, dot, names)):
                yield from _write(body, value, {**names, index: place, item: value})
        elif " := " in text:
            name, _, expression = text.partition(" := ")
            names[name] = _value(expression, dot, names)
        else:
            yield str(_value(text, dot, names))


def _value(expression: str, dot: Any, names: dict[str, Any]) -> Any:
    tokens = _TOKEN.findall(expression)
    value = _call(tokens, dot, names)
    if tokens:
        raise ValueError(f"left over in {expression!r}: {tokens}")
    return value


def _call(tokens: list[str], dot: Any, names: dict[str, Any]) -> Any:
    values = []
    while tokens and tokens[0] != ")":
        token = tokens.pop(0)
        if token == "(":
            values.append(_call(tokens, dot, names))
            tokens.pop(0)
        else:
            values.append(_operand(token, dot, names))
    return values[0](*values[1:]) if callable(values[0]) else values[0]


def _operand(token: str, dot: Any, names: dict[str, Any]) -> Any:
    if token in _FUNCTIONS:
        return _FUNCTIONS[token]
    if token.startswith('"'):
        return token[1:-1]
    if token.isdigit():
        return int(token)
    first, *fields = token.split(".")
    value = names[first] if first else dot
    for field in fields:
        value = value[field]
    return value
