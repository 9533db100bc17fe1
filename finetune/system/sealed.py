"""JSON objects that carry a SHA-256 of their own content, so that damage is found when they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_SEAL = "content_sha256"


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content as JSON keeps it, with its SHA-256 as last entry."""
    kept = json.loads(json.dumps(content))
    return {**kept, _SEAL: _digest(kept)}


def unseal(content: Any) -> dict[str, Any]:
    """Return a sealed object without its seal; one without a seal is of an older version, and returned as it is.

    Raises: ValueError if the content is not what was sealed.
    """
    if not isinstance(content, dict) or not content:
        raise ValueError(f"expected a JSON object with entries, found {type(content).__name__}")
    kept = dict(content)
    _, last = kept.popitem()  # whatever its name: a damaged name of the seal changes nothing
    if last == _digest(kept):
        return kept
    if _SEAL in content:
        raise ValueError("its SHA-256 differs from its content")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
