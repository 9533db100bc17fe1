"""Parse `key=value` on the command line with Hydra's grammar; the schema gives the type of a key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from finetune.config.explain import shown, unknown_key
from finetune.config.keys import find, is_section, takes
from finetune.config.problems import COMMAND_LINE, Problem

_SHAPE = re.compile(r"\s*\+{0,2}(?P<key>[^=\s]+?)\s*=(?P<value>.*)", re.DOTALL)


@dataclass(frozen=True)
class Overrides:
    """Group options (`model=qwen2.5-7b-instruct`), values by key, and problems."""

    groups: dict[str, str] = field(default_factory=dict)
    values: list[tuple[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def parse_overrides(lines: Sequence[str]) -> Overrides:
    """Parse every override; the last one for a key wins."""
    found = Overrides()
    for line in lines:
        shape = _SHAPE.fullmatch(line)
        if line.lstrip().startswith("~"):
            _refuse(found, line.strip(), "deleting a key is not supported; set it to its default")
        elif shape is None:
            _refuse(found, line.strip(), "expected key=value, such as train.max_steps=10")
        else:
            _read(shape["key"], shape["value"].strip(), found)
    return found


def _read(key: str, text: str, found: Overrides) -> None:
    kind = find(key)
    if kind is None:
        found.problems.append(unknown_key(key)._replace(origin=COMMAND_LINE))
    elif is_section(kind) and not text.startswith(("{", "[", "$")) and "." not in key:
        found.groups[key] = text
    else:
        try:
            value = read_value(text, kind)
        except ValueError as error:
            hint = f"""quote text with special characters, in the shell '{key}=["a b"]'"""
            _refuse(found, key, f"cannot read {shown(text)}: {error}; {hint}")
            return
        for leaf, part in _leaves(key, value):
            if find(leaf) is None:
                found.problems.append(unknown_key(leaf)._replace(origin=COMMAND_LINE))
            else:
                found.values.append((leaf, part))


def read_value(text: str, kind: Any) -> Any:
    """Return the value of a text for a key of type `kind`.

    Raises:
        ValueError: the text does not fit the grammar; the message gives the reason.
    """
    try:
        return _as_text(text, kind) if takes(str, kind) else _by_grammar(text)
    except HydraException as error:
        raise ValueError(str(error)) from error


def quoted(text: str) -> str:
    """Quote any text for Hydra's grammar."""
    # Only backslashes before a quote are escapes there.
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"


def _refuse(found: Overrides, key: str, text: str) -> None:
    found.problems.append(Problem(key, text, COMMAND_LINE))


def _as_text(text: str, kind: Any) -> Any:
    """Keep text as typed: `model.revision=1234567`, `output_dir=out (2)`."""
    if text == "null":
        return None
    if text.startswith(("'", '"', "[") if takes(list, kind) else ("'", '"')):
        try:
            return _by_grammar(text)
        except HydraException:  # A regex, for example [qv]_proj, can look like a list.
            return text
    return text


def _by_grammar(text: str) -> Any:
    try:
        override: Override = OverridesParser.create().parse_override(f"key={text}")
    except RecursionError as error:
        raise HydraException("nested too deeply") from error
    if override.type is not OverrideType.CHANGE or override.is_sweep_override():
        raise HydraException("expected one value; a list is written [a, b]")
    return override.value()


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keys that a mapping sets in a section."""
    if isinstance(value, dict) and is_section(find(key)):
        for name, part in value.items():
            yield from _leaves(f"{key}.{name}", part)
    else:
        yield key, value
