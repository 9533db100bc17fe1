"""One engine behind every protocol: its models by name, and answers as asynchronous streams of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune.config.command_options import ServeSettings
from finetune.serving.request import Engine, Event, Finished, Request
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

    def model(self, name: str) -> ServedModel:
        """Return a model by the name of a request. Raises: InputError."""
        if name not in self.models:
            raise InputError(f"the model {name!r} is not served; there are: {', '.join(self.models)}")
        return self.models[name]

    async def answer(self, request: Request, *, seconds: float | None = None) -> AsyncIterator[Event]:
        """Yield the events of an answer. A consumer that stops early cancels it.

        Args:
            seconds: limit of the client, below that of the server.
        """
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        handle = self.engine.submit(request, put)
        try:
            while True:
                event = await events.get()
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self.engine.cancel(handle)
