"""The schema of a run's config as JSON Schema, for the completion and checks of an editor."""

from __future__ import annotations

from typing import Any

from finetune.config.schema import RunConfig
from finetune.config.section import SHORT_DTYPES

# pydantic writes the bounds of a value with a validator under its own names.
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_INTERPOLATION = {"type": "string", "pattern": r"\$\{"}
_SOURCE = {"$ref": "#/$defs/SourceConfig"}
_GROUPS = {
    "description": "Configs and options of groups to start from, as - model: qwen2.5-7b-instruct.",
    "type": "array",
}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a config file.

    Every value may be an interpolation such as ${oc.env:DATA}. No key is required, since a group may set it.
    """
    schema = _adapted(RunConfig.model_json_schema())
    schema["properties"] = {"defaults": _GROUPS, **schema["properties"]}
    for section in (schema, *schema["$defs"].values()):
        if section.get("title") != "SourceConfig":
            section.pop("required", None)
        section.pop("title")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _adapted(node: Any) -> Any:
    if isinstance(node, list):
        return [_adapted(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {_BOUNDS.get(key, key): _adapted(value) for key, value in node.items()}
    if "properties" in found:
        found["properties"] = {name: _with_interpolation(value) for name, value in found["properties"].items()}
    if found.get("items") == _SOURCE:  # A path stands for a source.
        path = {"type": "string", "minLength": 1}
        source = {"anyOf": [path, _SOURCE]}
        kept = {key: found.pop(key) for key in ("description", "default") if key in found}
        return kept | {"anyOf": [*source["anyOf"], found | {"items": source}]}
    if found.get("enum") == list(SHORT_DTYPES):
        found["enum"] += SHORT_DTYPES.values()
    return found


def _with_interpolation(value: dict[str, Any]) -> dict[str, Any]:
    described = {key: value[key] for key in ("description", "default") if key in value}
    kind = {key: part for key, part in value.items() if key not in ("description", "default", "title")}
    choices = kind.pop("anyOf", None) or [kind]
    if {"type": "string"} in choices or "$ref" in kind or (kind.get("type") == "string" and "enum" not in kind):
        return described | value
    return described | {"anyOf": [*choices, _INTERPOLATION]}
