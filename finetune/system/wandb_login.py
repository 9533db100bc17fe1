"""Find out whether Weights & Biases has a key, without an import of it and without reading the key out."""

from __future__ import annotations

import contextlib
import netrc
import os
import urllib.parse


def has_wandb_key() -> bool:
    """Return whether the environment or the login file has a key for the server of WANDB_BASE_URL."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False
