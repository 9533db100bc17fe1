"""The schema as a table: the path, type, allowed values and help text of every key."""

from __future__ import annotations

import json
import textwrap
import types
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from finetune.config.schema import RunConfig
from finetune.config.section import SHORT_DTYPES, Section
from finetune.system.console import line_width

_BOUNDS = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}
_WORDS = {bool: "true | false", int: "whole number", float: "number", str: "text", type(None): "null"}


@cache
def schema_fields(root: type[Section] = RunConfig) -> dict[str, FieldInfo]:
    """Return every key of a schema; the items of a list of sections stand under `*`: `data.train.*.path`."""
    return dict(_walk(root, ""))


def _walk(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        yield prefix + name, field
        for inner in _choices(field.annotation):
            if is_section(inner):
                yield from _walk(inner, f"{prefix}{name}.")
            elif get_origin(inner) is list and is_section(get_args(inner)[0]):
                yield from _walk(get_args(inner)[0], f"{prefix}{name}.*.")


def find(path: str, root: type[Section] = RunConfig) -> Any | None:
    """Return the type of the value at `train.max_steps`, `data.train.0.limit` or `lora.rank_pattern.NAME`, or None."""
    here: Any = root
    for part in path.split("."):
        origins = {get_origin(choice): choice for choice in _choices(here)}
        if is_section(here):
            field = here.model_fields.get(part)
            if field is None:
                return None
            here = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        elif list in origins and part.isdecimal():
            here = get_args(origins[list])[0]
        elif dict in origins:
            names, here = get_args(origins[dict])
            if not options(names):
                return here  # The rest of the path is one name: module names hold dots.
            if part not in options(names):
                return None
        else:
            return None
    return here


@cache
def sections() -> dict[str, type[Section]]:
    """Return the sections of a run by name: model, quant, …"""
    return {name: field.annotation for name, field in RunConfig.model_fields.items() if is_section(field.annotation)}


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Return whether a type is a section."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def takes(kind: Any, annotation: Any) -> bool:
    """Return whether a value of this type may be a `str`, a `list` …"""
    return any(kind in (choice, get_origin(choice)) for choice in _choices(annotation))


def options(annotation: Any) -> list[str]:
    """Return the words that a key chooses from; empty for a key of another type."""
    return [word for choice in _choices(annotation) if get_origin(choice) is Literal for word in get_args(choice)]


def _choices(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _choices(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [choice for part in get_args(annotation) for choice in _choices(part)]
    return [annotation]


def allowed(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Describe the values that a type allows: `whole number >= 1 or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return allowed(arguments[0], [*arguments[1:], *metadata])
    if origin in (Union, types.UnionType):
        # A list reads best after a single value, and null last.
        parts = sorted(arguments, key=lambda part: (part is type(None), get_origin(part) in (list, dict)))
        return " or ".join(allowed(part) for part in parts)
    if origin is Literal:
        return " | ".join(f"{SHORT_DTYPES[word]} | {word}" if word in SHORT_DTYPES else word for word in arguments)
    if origin is list:
        count = "non-empty list" if any(isinstance(mark, MinLen) for mark in metadata) else "list"
        items = "paths or mappings" if is_section(arguments[0]) else allowed(arguments[0])
        return f"{count} of {items}"
    if origin is dict:
        return f"mapping as {{{' | '.join(options(arguments[0])) or 'name'}: {allowed(arguments[1])}}}"
    if is_section(annotation):
        return "mapping of keys to values"
    marks = [mark for item in metadata for mark in (item.metadata if isinstance(item, FieldInfo) else [item])]
    bounds = [(_BOUNDS[type(mark)], mark) for mark in marks if type(mark) in _BOUNDS]
    limits = " and ".join(f"{sign} {getattr(mark, name)}" for (sign, name), mark in bounds)
    return f"{_WORDS[annotation]} {limits}".strip()


def schema_help(root: type[Section] = RunConfig, width: int = 38, only: Sequence[str] = ()) -> str:
    """Return the help text of a schema: each key with its default, its type and its meaning, in aligned lines.

    The items of data.train stand for all lists of sources. width: of the column of keys, in characters.
    only: keys to describe, without headings; empty: all of them.
    """
    lines: list[str] = []
    fields = schema_fields(root)
    for path, field in ((path, fields[path]) for path in only or fields):
        if is_section(field.annotation):
            lines += ["", f"{path}: {field.description}"]
        elif "*" not in path or path.startswith("data.train.*"):
            default = default_of(path, field)
            key = path.replace("*", "0") + (f" = {default}" if default else "")
            meaning = f"{allowed(field.annotation, field.metadata)}. {field.description}"
            lines += _in_columns(key, meaning, width)
    return "\n".join(lines).strip("\n")


def _in_columns(key: str, meaning: str, width: int) -> list[str]:
    """Return lines of two columns; a key that is wider than its column has a line of its own."""
    wrapped = textwrap.wrap(meaning, line_width() - width - 3, break_long_words=False, break_on_hyphens=False)
    lines = [f"  {'':<{width}} {line}" for line in wrapped]
    if len(key) > width:
        return [f"  {key}", *lines]
    return [f"  {key:<{width}} {wrapped[0]}", *lines[1:]]


def default_of(path: str, field: FieldInfo) -> str:
    """Return a key's default as YAML; empty for a key that must be given."""
    if path == "output_dir":
        return "outputs/${name}"
    return "" if field.is_required() else json.dumps(field.default)
