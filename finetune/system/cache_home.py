"""The folders that finetune keeps between runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal


def cache_home(kind: Literal["tokens", "quantized", "rates"]) -> Path:
    """Return $FINETUNE_CACHE/kind, else $XDG_CACHE_HOME/finetune/kind, else ~/.cache/finetune/kind."""
    base = os.environ.get("FINETUNE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "finetune"
    return Path(base).expanduser() / kind
