"""The configs and data of the package, from a wheel or a checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def packaged(kind: Literal["configs", "data"]) -> Path:
    """Return `finetune/_packaged/<kind>` of a wheel, or `<kind>` of a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_packaged" / kind
    return inside if inside.is_dir() else package.parent / kind
