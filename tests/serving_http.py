"""A service over a scripted engine, behind a real socket or in this process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from finetune.config.command_options import ServeSettings
from finetune.data.template.chat import ChatTemplate
from finetune.serving.http.app import build_app
from finetune.serving.request import Request
from finetune.serving.service import ServedModel, Service
from tests.serving_engine import ScriptedEngine

# The embedded base's own template has no tools.
TOOLS_TEMPLATE = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{{- '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""


class Served:
    """A service and its parts.

    reply: text or tokens of the answers; by default the engine repeats the prompt.
    options: seconds of the engine's tokens, engine, the names of its adapters, api_key, and settings of `serve`.
    """

    def __init__(self, chat: ChatTemplate, reply: Callable[[Request], list[int]] | str | None = None, **options: Any):
        seconds, api_key, engine = (options.pop(name, None) for name in ("seconds", "api_key", "engine"))
        adapters = options.pop("adapters", ())
        self.chat = chat
        script = (lambda request: self.ids(reply)) if isinstance(reply, str) else reply
        self.engine = engine or ScriptedEngine(script, seconds or 0.0)
        models = [ServedModel("base", None, "b" * 64, 1)]
        if engine is None:
            self.engine.load_adapter("pirate", "outputs/pirate")
            models.append(ServedModel("pirate", "pirate", "a" * 64, 2, {"max_kl": 0.001}))
        models += [ServedModel(name, name, name, 3) for name in adapters]
        self.service = Service(self.engine, chat, models, ServeSettings(**options))
        self.service.ready = True
        self._stack = ExitStack()
        self.app: FastAPI = build_app(self.service, api_key=api_key)

    def ids(self, text: str) -> list[int]:
        """Return the tokens of an answer, with its end."""
        return [*self.chat.encode_texts([text])[0].tolist(), self.chat.turn_end_id]

    @cached_property
    def client(self) -> TestClient:
        """Return a client in this process; all its requests have one event loop."""
        client = TestClient(self.app, base_url="http://127.0.0.1", raise_server_exceptions=False)
        return self._stack.enter_context(client)

    def close(self) -> None:
        """Stop the engine and the client."""
        self._stack.close()
        self.engine.close()


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so; the time limit of a test ends what never is."""
    while not condition():
        time.sleep(0.01)


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """Serve an app on a free port; yield its URL."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
