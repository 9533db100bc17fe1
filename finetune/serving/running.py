"""One answer that the engine writes now, and the consumers that read it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from finetune.serving.metrics import Metrics
from finetune.serving.request import Engine, Event, Finished, Request, Token


class RunningAnswer:
    """The events of one answer, for any number of consumers in one event loop.

    The engine stops when the last consumer leaves. A consumer that joins later gets every event from the first on.

    first: loop time of the first event; None before. tokens: of the answer so far.
    on_end: called in the loop with the last event, also when nobody reads it.
    """

    def __init__(self, request: Request, metrics: Metrics, on_end: Callable[[RunningAnswer, Finished], None]):
        self.request = request
        self.events: list[Event] = []
        self.first: float | None = None
        self.tokens = 0
        self._last = 0.0
        self._metrics, self._on_end = metrics, on_end
        self._readers: list[asyncio.Queue[Event]] = []
        self._loop = asyncio.get_running_loop()
        self.began = self._loop.time()
        self._engine: Engine | None = None
        self._handle: Any = None

    def start(self, engine: Engine) -> None:
        """Submit the request. Raises: InputError for an adapter that is not loaded."""
        self._handle = engine.submit(self.request, self._put)
        self._engine = engine

    def join(self) -> asyncio.Queue[Event]:
        """Return a queue of all events, past and future."""
        queue: asyncio.Queue[Event] = asyncio.Queue()
        for event in self.events:
            queue.put_nowait(event)
        self._readers.append(queue)
        return queue

    def leave(self, queue: asyncio.Queue[Event]) -> bool:
        """End the reading of a queue; return whether that cancelled the answer."""
        self._readers.remove(queue)
        if self._readers or self._engine is None or self.ended:
            return False
        self._engine.cancel(self._handle)
        return True

    @property
    def ended(self) -> bool:
        """Return whether the last event came."""
        return bool(self.events) and isinstance(self.events[-1], Finished)

    def _put(self, event: Event) -> None:
        """Take an event in the engine's thread."""
        # A loop that is closed has no consumers; the engine's thread goes on.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._push, event)

    def _push(self, event: Event) -> None:
        now = self._loop.time()
        if isinstance(event, Token):
            if self.tokens:
                self._metrics.between_tokens.observe(now - self._last)
            self.tokens += 1
            self._last = now
        if self.first is None:
            self.first = now
        self.events.append(event)
        for reader in self._readers:
            reader.put_nowait(event)
        if isinstance(event, Finished):
            self._on_end(self, event)
