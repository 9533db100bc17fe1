"""A command's own settings (commands.py), read from the command line.

Like a run's config: typed, with ranges, no unknown words, and everything that is wrong told at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from finetune.config.explain import shown
from finetune.config.keys import allowed, find, is_section
from finetune.config.overrides import read_value
from finetune.config.problems import Problem, config_error
from finetune.config.schema import RunConfig, Section
from finetune.system.arguments import Arguments
from finetune.system.errors import ConfigError

Options = TypeVar("Options", bound=Section)


def read_options(kind: type[Options], words: Sequence[str], command: str) -> Options:
    """`key=value` words as settings of that kind. command: what opens the messages, as `finetune merge`.

    Raises: ConfigError with everything that is wrong.
    """
    tree: dict[str, Any] = {}
    problems = []
    for word in words:
        key, _, text = word.partition("=")
        annotation = _find(kind, key)
        if annotation is None:
            problems.append(Problem(key, _unknown(kind, key)))
            continue
        try:
            value = read_value(text, annotation)
        except ValueError as error:
            problems.append(Problem(key, f"cannot read {shown(text)}: {error}"))
            continue
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    options = None
    try:
        options = kind.model_validate(tree)
    except ValidationError as error:
        known = {problem.key for problem in problems}
        refused = [_problem(kind, item) for item in error.errors(include_url=False)]
        problems += [problem for problem in refused if problem.key not in known]
    if options is None or problems:
        raise config_error(command, problems, lambda key: "")
    return options


def read_beside_config(kind: type[Options], arguments: Arguments, command: str) -> tuple[Options, list[str]]:
    """A command's own settings among those of a run, and the words that are the run's.

    A word that is neither's, and most like one of the command's, is told here. Raises: as `read_options`.
    """
    own, others = arguments.split(kind.model_fields)
    meant = [word for word in others if _is_meant(kind, word.partition("=")[0])]
    return read_options(kind, [*(f"{key}={value}" for key, value in own.items()), *meant], command), others


def _is_meant(kind: type[Section], key: str) -> bool:
    if find(key) is not None:
        return False
    near = get_close_matches(key, [*kind.model_fields, *RunConfig.model_fields], n=1, cutoff=0.6)
    return bool(near) and near[0] in kind.model_fields


def options_help(kind: type[Section], prefix: str = "") -> str:
    """Every key of a command with its default, what it may be, and its meaning."""
    lines = []
    for name, field in kind.model_fields.items():
        if is_section(field.annotation):
            lines.append(options_help(field.annotation, f"{name}."))
        else:
            default = "" if field.is_required() else f" = {_default(field)}"
            may_be = allowed(field.annotation, field.metadata)
            lines.append(f"  {prefix + name + default:<24} {may_be}. {field.description}")
    return "\n".join(lines)


def _default(field: FieldInfo) -> str:
    return json.dumps(field.default).strip('"')


def _find(kind: type[Section], key: str) -> Any | None:
    first, _, rest = key.partition(".")
    field = kind.model_fields.get(first)
    if field is None:
        return None
    annotation: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    if not rest:
        return annotation
    return _find(field.annotation, rest) if is_section(field.annotation) else None


def _unknown(kind: type[Section], key: str) -> str:
    known = [
        f"{name}.{inner}" if inner else name
        for name, field in kind.model_fields.items()
        for inner in (field.annotation.model_fields if is_section(field.annotation) else ("",))
    ]
    near = get_close_matches(key, known, n=1, cutoff=0.6)
    return f"unknown key; did you mean {near[0]}?" if near else f"unknown key; there are {', '.join(known)}"


def _problem(kind: type[Section], item: Any) -> Problem:
    path: list[str] = []
    for part in item["loc"]:
        if _find(kind, ".".join([*path, str(part)])) is None:
            break
        path.append(str(part))
    key = ".".join(path)
    if item["type"] == "missing":
        field = kind.model_fields[item["loc"][0]] if len(item["loc"]) == 1 else None
        return Problem(".".join(map(str, item["loc"])), f"is missing: {field.description}" if field else "is missing")
    if item["type"] == "extra_forbidden":
        return Problem(".".join(map(str, item["loc"])), "unknown key")
    return Problem(key, f"found {shown(item['input'])}; allowed: {allowed(_find(kind, key))}")


def parse_size(key: str, text: str) -> int:
    """`4GB`, `500MB`, `1GiB` in bytes. Raises: ConfigError."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.strip().upper().rstrip("KMGIB")
    unit = text.strip().upper()[len(number) :]
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ConfigError(f"{key}={text}: write a size as 4GB or 500MB")
    return size
