"""Build the Jinja environment of all pages: no network, no script, light and dark, text of users escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finetune.system.console import printable


def page_environment(**functions: Any) -> Environment:
    """Build the environment of templates/: escaped, strict about names, control characters made visible.

    functions: that templates may call. look.css is how the package's pages look.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # HTML's own escaping leaves control characters as they are.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.globals.update(functions)
    return environment
