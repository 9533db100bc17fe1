"""Compare a run's settings with the defaults, and with those of other runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from finetune.config.keys import schema_fields


class Change(NamedTuple):
    """A setting that differs from its default, which is empty if it has none."""

    key: str
    default: str
    value: str


_NAMES = {"name", "output_dir"}  # Every run has its own.


def changes(config: Mapping[str, Any]) -> list[Change]:
    """Return the settings that differ from their default or have none, in the schema's order."""
    fields = schema_fields()
    found = []
    for key, value in flat(config):
        field = fields.get(_starred(key))
        if key in _NAMES:
            continue
        if field is None or field.is_required():
            found.append(Change(key, "", shown(value)))
        elif field.get_default() != value:
            found.append(Change(key, shown(field.get_default()), shown(value)))
    return found


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the settings that differ between configs: key -> value in each, empty if a config lacks the key."""
    flats = [dict(flat(config)) for config in configs]
    keys = dict.fromkeys(key for one in flats for key in one)
    table = {key: [shown(one[key]) if key in one else "" for one in flats] for key in keys if key not in _NAMES}
    return {key: values for key, values in table.items() if len(set(values)) > 1}


def flat(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every setting. Lists of sections (data.train) are split; other lists are values."""
    is_section = not key or any(name.startswith(f"{_starred(key)}.") for name in schema_fields())
    if isinstance(config, Mapping) and is_section:
        for name, inner in config.items():
            yield from flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(config, list) and config and all(isinstance(item, Mapping) for item in config):
        for index, inner in enumerate(config):
            yield from flat(inner, f"{key}.{index}")
    else:
        yield key, config


def _starred(key: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", key)


def shown(value: Any) -> str:
    """Format a value about as on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
