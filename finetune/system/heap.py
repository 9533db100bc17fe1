"""Return freed memory to the operating system: glibc malloc_trim; does nothing with other C libraries."""

from __future__ import annotations

import ctypes


def malloc_trim() -> None:
    """Return all free heap memory to the operating system."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
