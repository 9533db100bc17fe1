"""What machines do to runs, done on purpose: kills, damaged files, full disks, wrong input, long runs."""

from __future__ import annotations

from typing import Any

# What a campaign returns: counts by name. `lost` counts the cases that broke their law; the exit code is 1 if any did.
Figures = dict[str, Any]
