"""The whole schema as text, for --help."""

from __future__ import annotations

import json

from pydantic.fields import FieldInfo

from finetune.config.keys import allowed, is_section, schema_fields


def schema_help() -> str:
    """Every key with its default, its type and one line; a key starts a line, its meaning follows."""
    lines = []
    for path, field in schema_fields().items():
        if is_section(field.annotation):
            lines += ["", f"{path}: {field.description}"]
        elif not path.startswith("data.eval.*"):  # The items of data.eval are those of data.train.
            default = default_of(path, field)
            key = path.replace("*", "0") + (f" = {default}" if default else "")
            lines.append(f"  {key:<38} {allowed(field.annotation, field.metadata)}. {field.description}")
    return "\n".join(lines).strip("\n")


def default_of(path: str, field: FieldInfo) -> str:
    """As it would be written in YAML; empty for a key that must be given."""
    if path == "output_dir":
        return "outputs/${name}"
    return "" if field.is_required() else json.dumps(field.default)
