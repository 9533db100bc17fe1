"""Read a command's own options (command_options.py) from the command line.

Options follow the rules of a run's config: types, ranges, no unknown keys, and one error that lists every problem.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import ValidationError

from finetune.config.explain import schema_problems, shown, unknown_key
from finetune.config.keys import allowed, find, is_section
from finetune.config.problems import Problem, config_error
from finetune.config.schema import RunConfig, Section
from finetune.system.arguments import Arguments
from finetune.system.errors import ConfigError

Options = TypeVar("Options", bound=Section)


def read_options(schema: type[Options], words: Sequence[str], command: str) -> Options:
    """Read `key=value` words into a schema.

    Args:
        schema: one of command_options.py.
        words: the words in their order; the last of a key counts.
        command: how messages name the command, as `finetune merge`.

    Raises:
        ConfigError: lists every problem.
    """
    from finetune.config.overrides import read_value  # Imports Hydra, which --help does without.

    tree: dict[str, Any] = {}
    problems = []
    for word in words:
        key, _, text = word.partition("=")
        if (kind := find(key, schema)) is None:
            problems.append(unknown_key(key, schema))
            continue
        *parents, last = key.split(".")
        node: Any = tree
        for part in parents:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
        try:
            if not isinstance(node, dict):
                raise ValueError(f"give the whole list, as {parents[0]}=[…]")
            node[last] = read_value(text, kind)
        except ValueError as error:
            problems.append(Problem(key, f"cannot read {shown(text)}: {error}"))
    options = None
    try:
        options = schema.model_validate(tree)
    except ValidationError as error:
        known = {problem.key for problem in problems}
        problems += [problem for problem in schema_problems(error, schema) if problem.key not in known]
    if options is None or problems:
        raise config_error(command, problems, lambda key: "")
    return options


def read_beside_config(schema: type[Options], arguments: Arguments, command: str) -> tuple[Options, list[str]]:
    """Read a command's options among the overrides of a run.

    Returns:
        The options, and the overrides of the run. An unknown key belongs to the schema with the nearest key.
        With config=, a key of both schemas belongs to the run.

    Raises:
        ConfigError: as `read_options`.
    """
    own, others = [], []
    for word in arguments.overrides:
        key = word.partition("=")[0]
        in_run = find(key) is not None and arguments.config is not None
        (own if not in_run and _is_option(schema, key) else others).append(word)
    return read_options(schema, own, command), others


def _is_option(schema: type[Section], key: str) -> bool:
    field, fields = schema.model_fields.get(key.partition(".")[0]), schema.model_fields
    if find(key, schema) is not None or (field is not None and is_section(field.annotation)):
        return True
    near = get_close_matches(key, [*fields, *RunConfig.model_fields], n=1, cutoff=0.6)
    return find(key) is None and bool(near) and near[0] in fields


def options_help(schema: type[Section], prefix: str = "") -> str:
    """Return one line for every key of a command: its default, its allowed values and its meaning."""
    lines = []
    for name, field in schema.model_fields.items():
        if is_section(field.annotation):
            lines.append(options_help(field.annotation, f"{name}."))
        else:
            default = "" if field.is_required() else f" = {json.dumps(field.default).strip(chr(34))}"
            values = allowed(field.annotation, field.metadata)
            lines.append(f"  {prefix + name + default:<24} {values}. {field.description}")
    return "\n".join(lines)


def parse_size(key: str, text: str) -> int:
    """Return the bytes of `4GB`, `500MB` or `1GiB`; key names the option in the ConfigError of any other text."""
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
