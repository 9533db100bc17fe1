"""How the package's pages are made: no network, no script, light and dark; text of others is escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finetune.system.console import printable


def page_environment(*folders: Path, **functions: Any) -> Environment:
    """Templates of these folders and of this one: escaped, strict about names, control characters made visible.

    functions: that templates may call. look.css is how the package's pages look.
    """
    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # HTML's own escaping leaves control characters as they are.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.globals.update(functions)
    return environment
