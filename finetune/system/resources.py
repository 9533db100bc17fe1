"""Files that come with the package: configs and data, the same from a wheel and from a checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def packaged(kind: Literal["configs", "data"]) -> Path:
    """Folder of the packaged files: `finetune/_packaged/<kind>` in a wheel, the checkout's `<kind>` otherwise."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_packaged" / kind
    return inside if inside.is_dir() else package.parent / kind
