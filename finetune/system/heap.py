"""The C library's heap, where it is glibc's: what is freed lies there for the process until it is given back."""

from __future__ import annotations

import ctypes


def malloc_trim() -> None:
    """Give the system what the heap holds free. Nothing happens where the C library is another one."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
