"""Stop cleanly on SIGINT (Ctrl+C) and SIGTERM."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Self


class StopSignals:
    """Hold SIGINT and SIGTERM during a `with` block; `received` is the last one, or 0."""

    def __init__(self, on_signal: Callable[[int, bool], None]):
        """Call `on_signal(number, again)` at each signal; `again` is true from the second on."""
        self.received = 0
        self._on_signal = on_signal
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            with suppress(ValueError):  # outside the main thread, Python allows no handlers
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.received = bool(self.received), number
        self._on_signal(number, again)
