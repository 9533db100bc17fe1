"""Highest memory of this process: of its whole life, and of the training apart from what loading took."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path


class Peaks:
    """`training_begins()` splits a process's peak in two; bytes, by the allocator's count on CUDA, resident on CPU."""

    def __init__(self) -> None:
        self._load_bytes: int | None = None

    def training_begins(self) -> None:
        """From here on the peak is counted anew, where the system can do that (CUDA, Linux)."""
        before = peak_bytes()
        if _reset():
            self._load_bytes = before

    def figures(self) -> dict[str, int | None]:
        """peak_bytes of all; load_ and train_peak_bytes of each part, None where they cannot be told apart."""
        now = peak_bytes()
        apart = self._load_bytes is not None
        return {
            "peak_bytes": max(now, self._load_bytes or 0),
            "load_peak_bytes": self._load_bytes,
            "train_peak_bytes": now if apart else None,
        }


def peak_bytes() -> int:
    """CUDA's max allocated bytes; on CPU the highest resident size."""
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
        # Linux: 5 sets VmHWM back to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
