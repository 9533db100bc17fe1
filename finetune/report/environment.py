"""Render the package's pages. They need no network and no script, and follow the light or dark mode of the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finetune.system.console import printable


def render_page(name: str, /, **values: Any) -> str:
    """Render a page of templates/, with values escaped and their control characters made visible."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # HTML escaping leaves control characters as they are.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    return environment.get_template(name).render(**values)
