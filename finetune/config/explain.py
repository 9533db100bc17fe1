"""Explain the problems of a config: the key, the value, the allowed values, and the probable intention."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from finetune.config.keys import allowed, find, options, schema_fields, sections, takes
from finetune.config.peers import PEERS, REFUSED, RENAMED
from finetune.config.problems import Problem
from finetune.config.schema import RunConfig, contradictions
from finetune.config.section import NUMBER, Section
from finetune.config.sections import ModelConfig, SourceConfig

_LONGEST = 60
_SHORTHANDS: list[tuple[Any, str]] = [  # A single text where a mapping belongs.
    (ModelConfig, "{{name: {}}}"),
    (SourceConfig, "{{path: {}}}"),
]


def problems_of(tree: dict[str, Any], error: ValidationError) -> list[Problem]:
    """Return every problem of a config that pydantic refused, and the contradictions between its valid values.

    A rule names the keys that it reads in its key or text. It is skipped if one of them has an invalid value.
    """
    found = list(schema_problems(error))
    wrong = {".".join(problem.key.split(".")[:2]) for problem in found if "." in problem.key}
    sound = {}
    for name, section in sections().items():
        if isinstance(given := tree.get(name, {}), dict):
            values = {key: value for key, value in given.items() if f"{name}.{key}" not in wrong}
            with suppress(ValidationError):
                sound[name] = section.model_validate(values)
    rules = [rule for rule in contradictions(sound) if not any(key in f"{rule.key} {rule.text}" for key in wrong)]
    return list(dict.fromkeys([*found, *rules]))


def schema_problems(error: ValidationError, root: type[Section] = RunConfig) -> Iterator[Problem]:
    """Yield every problem that pydantic found in one schema, in words."""
    for item in error.errors(include_url=False):
        path, kind = _place(item["loc"], root)
        if item["type"] == "contradiction":
            yield from item["ctx"]["problems"]
        elif item["type"] == "extra_forbidden":
            yield unknown_key(".".join(map(str, item["loc"])), root)
        elif item["type"] == "missing":
            yield Problem(path, f"is missing: {_description(path, root)}")
        elif item["type"] == "value_error":
            yield Problem(path, str(item["ctx"]["error"]))
        elif item["type"] == "invalid_key":
            yield Problem(".".join(str(part) for part in item["loc"] if part != "[key]"), "a key must be text")
        elif item["loc"][-1] == "[key]":
            yield unknown_key(".".join(map(str, item["loc"][:-1])), root)
        else:
            yield Problem(path, f"found {shown(item['input'])}; allowed: {allowed(kind)}{_hint(item['input'], kind)}")


def _place(loc: Sequence[Any], root: type[Section]) -> tuple[str, Any]:
    """Return the deepest key of the schema in pydantic's path, which also contains the branches of unions."""
    path = ""
    for part in loc:
        longer = f"{path}.{part}" if path else str(part)
        if find(longer, root) is None:
            break
        path = longer
    return path, find(path, root) if path else root


def _description(path: str, root: type[Section]) -> str:
    return schema_fields(root)[_general(path)].description or ""


def _general(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def _hint(value: Any, kind: Any) -> str:
    """Guess what a value of the wrong type means."""
    if takes(str, kind) and isinstance(value, bool | int | float):
        return "; in quotes it is text"
    if not isinstance(value, str):
        return ""
    if NUMBER.fullmatch(value) and (takes(int, kind) or takes(float, kind)):
        return "; without quotes it is a number"
    if near := get_close_matches(value.lower(), options(kind), n=1):
        return f"; did you mean {near[0]}?"
    return next((f"; write {form.format(value)}" for section, form in _SHORTHANDS if takes(section, kind)), "")


def unknown_key(path: str, root: type[Section] = RunConfig) -> Problem:
    """Describe an unknown key and name the key that was probably meant.

    That is the new name of a renamed key, another framework's name, a key of another section, or the nearest key.
    """
    folder, _, last = path.rpartition(".")
    name = last.lower().replace("-", "_")
    mapping = find(folder, root)
    if mapping is not None and takes(dict, mapping):  # A mapping with a fixed set of names.
        return Problem(path, f"unknown key; allowed: {allowed(mapping)}. {_description(folder, root)}")
    if root is RunConfig:
        if path in RENAMED:
            return Problem(path, f"unknown key; it is now {RENAMED[path]}")
        if name in REFUSED:
            return Problem(path, f"unknown key; {REFUSED[name]}")
        if peers := PEERS.get(_general(path)) or PEERS.get(name):
            return Problem(path, f"unknown key; here it is {peers}")
    if answer := getattr(root, "OLD_KEYS", {}).get(path):
        return Problem(path, f"unknown key; {answer}")
    elsewhere = [field for field in schema_fields(root) if field.split(".")[-1] == name]
    if meant := " or ".join(elsewhere) or _nearest(path, name, root):
        return Problem(path, f"unknown key; did you mean {meant}?")
    known = "see finetune train --help-all" if root is RunConfig else f"there are {', '.join(schema_fields(root))}"
    return Problem(path, f"unknown key; {known}")


def _nearest(path: str, name: str, root: type[Section]) -> str | None:
    fields, folder = list(schema_fields(root)), path.rpartition(".")[0]
    siblings = [field.split(".")[-1] for field in fields if field.rpartition(".")[0] == _general(folder)]
    pools: list[tuple[str, dict[str, str]]] = [
        (name, {sibling: f"{folder}.{sibling}".lstrip(".") for sibling in siblings}),
        (path, {field: field for field in fields}),
        (name, {field.split(".")[-1]: field for field in fields}),
        (name, PEERS if root is RunConfig else {}),
    ]
    for word, pool in pools:
        if near := get_close_matches(word, pool, n=1, cutoff=0.7 if root is RunConfig else 0.6):
            return pool[near[0]]
    return None


def shown(value: Any) -> str:
    """Return a value as one line of YAML, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
