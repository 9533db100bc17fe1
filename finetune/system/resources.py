"""The folders of finetune: packaged configs and data, and caches between runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal


def packaged(kind: Literal["configs", "data"]) -> Path:
    """Return `finetune/_packaged/<kind>` of a wheel, or `<kind>` of a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_packaged" / kind
    return inside if inside.is_dir() else package.parent / kind


def packaged_configs() -> list[str]:
    """Return the packaged configs of whole runs, as config= takes them: `lora.yaml`, `recipes/math.yaml`."""
    folder = packaged("configs")
    files = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("recipes/*.yaml"))]
    return [file.relative_to(folder).as_posix() for file in files]


def cache_home(kind: Literal["tokens", "quantized", "rates", "rows", "media", "served"]) -> Path:
    """Return $FINETUNE_CACHE/kind, else $XDG_CACHE_HOME/finetune/kind, else ~/.cache/finetune/kind."""
    base = os.environ.get("FINETUNE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "finetune"
    return Path(base).expanduser() / kind
