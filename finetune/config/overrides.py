"""Read `key=value` words by the schema and Hydra's grammar: overrides of a run, and options of a command.

Options follow the rules of a run's config: types, ranges, no unknown keys, and one error that lists every problem.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from finetune.config.explain import schema_problems, shown, unknown_key
from finetune.config.keys import find, is_section, takes
from finetune.config.problems import COMMAND_LINE, Problem, config_error
from finetune.config.schema import RunConfig, Section
from finetune.system.arguments import Arguments

Options = TypeVar("Options", bound=Section)
_SHAPE = re.compile(r"\s*\+{0,2}(?P<key>[^=\s]+?)\s*=(?P<value>.*)", re.DOTALL)


class Overrides(NamedTuple):
    """Group options (`model=qwen2.5-7b-instruct`), values by key, and problems."""

    groups: dict[str, str]
    values: list[tuple[str, Any]]
    problems: list[Problem]


def parse_overrides(lines: Sequence[str]) -> Overrides:
    """Parse every override of a run; the last one for a key wins."""
    groups, values, problems = {}, [], []
    for line in lines:
        shape = _SHAPE.fullmatch(line)
        key, text = (shape["key"], shape["value"].strip()) if shape else ("", "")
        kind = find(key)
        if line.lstrip().startswith("~"):
            problems.append(Problem(line.strip(), "deleting a key is not supported; set it to its default"))
        elif shape is None:
            problems.append(Problem(line.strip(), "expected key=value, such as train.max_steps=10"))
        elif kind is None:
            problems.append(unknown_key(key))
        elif is_section(kind) and not text.startswith(("{", "[", "$")) and "." not in key:
            groups[key] = text
        else:
            try:
                parts = list(_leaves(key, read_value(text, kind)))
            except ValueError as error:
                hint = f"""quote text with special characters, in the shell '{key}=["a b"]'"""
                problems.append(Problem(key, f"cannot read {shown(text)}: {error}; {hint}"))
                continue
            values += [(leaf, part) for leaf, part in parts if find(leaf) is not None]
            problems += [unknown_key(leaf) for leaf, _ in parts if find(leaf) is None]
    return Overrides(groups, values, [problem._replace(origin=COMMAND_LINE) for problem in problems])


def read_value(text: str, kind: Any) -> Any:
    """Return the value of a text for a key of type `kind`; keep text as typed: `output_dir=out (2)`.

    Raises:
        ValueError: the text does not fit the grammar; the message gives the reason.
    """
    if not takes(str, kind):
        return _by_grammar(text)
    if text == "null":
        return None
    if text.startswith(("'", '"', "[") if takes(list, kind) else ("'", '"')):
        with suppress(ValueError):  # A regex, for example [qv]_proj, can look like a list.
            return _by_grammar(text)
    return text


def _by_grammar(text: str) -> Any:
    # Hydra is imported here, because --help does without it.
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"key={text}")
        if override.type is OverrideType.CHANGE and not override.is_sweep_override():
            return override.value()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except HydraException as error:
        raise ValueError(str(error)) from error
    raise ValueError("expected one value; a list is written [a, b]")


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keys that a mapping sets in a section."""
    if isinstance(value, dict) and is_section(find(key)):
        for name, part in value.items():
            yield from _leaves(f"{key}.{name}", part)
    else:
        yield key, value


def quoted(text: str) -> str:
    """Quote any text for Hydra's grammar."""
    # Only backslashes before a quote are escapes there.
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"


def read_options(schema: type[Options], words: Sequence[str], command: str) -> Options:
    """Read `key=value` words into a schema.

    Args:
        schema: one of command_options.py.
        words: the words in their order; the last of a key counts.
        command: how messages name the command, as `finetune merge`.

    Raises:
        ConfigError: lists every problem.
    """
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
