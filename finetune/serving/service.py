"""One engine behind every protocol: its models by name, and answers as asynchronous streams of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune.config.command_options import ServeSettings
from finetune.serving.admission import Admission, DeadlineExceeded, Deadlines, Unavailable
from finetune.serving.request import Engine, Event, Finished, Request, Token
from finetune.system.errors import InputError

if TYPE_CHECKING:
    from finetune.data.template.chat import ChatTemplate


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A name that requests may ask for. digest: of its weights. details: shown in /v1/models."""

    name: str
    adapter: str | None
    digest: str
    created: int
    details: dict[str, Any] = field(default_factory=dict)


class Service:
    """Answers requests of all protocols in one event loop.

    ready: whether the warm-up and the comparison with the trained model are over, and no shutdown has begun.
    """

    def __init__(self, engine: Engine, chat: ChatTemplate, models: Sequence[ServedModel], settings: ServeSettings):
        self.engine, self.chat, self.settings = engine, chat, settings
        self.models = {model.name: model for model in models}
        self.ready = False
        self._admission = Admission(settings)
        self._deadlines = Deadlines(settings)
        self._idle = asyncio.Event()
        self._idle.set()

    def model(self, name: str) -> ServedModel:
        """Return a model by the name of a request. Raises: InputError."""
        if name not in self.models:
            raise InputError(f"the model {name!r} is not served; there are: {', '.join(self.models)}")
        return self.models[name]

    async def answer(self, request: Request, *, seconds: float | None = None) -> AsyncIterator[Event]:
        """Yield the events of an answer. A consumer that stops early cancels it: close the iterator.

        A deadline that passes after the first event ends the answer with Finished("error").

        Args:
            seconds: limit of the client, below that of the server.

        Raises:
            InputError: the adapter is not loaded.
            Overloaded: the queue is full; Unavailable, a kind of it: the service is starting or ending.
            DeadlineExceeded: the time passed before the first event.
        """
        if not self.ready:
            raise Unavailable()
        self._admission.enter()
        self._idle.clear()
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        given = min(self._deadlines.seconds(request), seconds or float("inf"))
        began = loop.time()
        first, tokens, handle = None, 0, None
        try:
            handle = self.engine.submit(request, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
            while True:
                try:
                    async with asyncio.timeout_at(began + given):
                        event = await events.get()
                except TimeoutError as error:
                    self._deadlines.note(request, (first or loop.time()) - began, tokens, loop.time() - (first or 0))
                    if first is None:
                        raise DeadlineExceeded(given) from error
                    event = Finished("error", error=f"deadline: the request had {given:.1f} s")
                first = first or loop.time()
                tokens += isinstance(event, Token)
                if isinstance(event, Finished) and event.reason in ("stop", "length"):
                    self._deadlines.note(request, first - began, tokens, loop.time() - first)
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            if handle is not None:
                self.engine.cancel(handle)
            self._admission.leave()
            if not self._admission.count:
                self._idle.set()

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait for the running ones, at most `seconds`; return whether all have ended."""
        self.ready = False
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
