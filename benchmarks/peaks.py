"""Measure the peak memory of this process: of all its life, of loading, and of training."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path


class Peaks:
    """Peaks before and after `training_begins()`, in bytes: allocated on CUDA, resident on CPU."""

    def __init__(self) -> None:
        self._load_bytes: int | None = None

    def training_begins(self) -> None:
        """Reset the peak, if the system can (CUDA, Linux)."""
        before = peak_bytes()
        if _reset():
            self._load_bytes = before

    def figures(self) -> dict[str, int | None]:
        """Return peak_bytes, and load_peak_bytes and train_peak_bytes, or None if they cannot be separated."""
        now = peak_bytes()
        apart = self._load_bytes is not None
        return {
            "peak_bytes": max(now, self._load_bytes or 0),
            "load_peak_bytes": self._load_bytes,
            "train_peak_bytes": now if apart else None,
        }


def peak_bytes() -> int:
    """Return CUDA's max allocated bytes; on CPU the highest resident size."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset() -> bool:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        # Linux: 5 resets VmHWM to the current resident size.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
