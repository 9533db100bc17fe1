"""A client of OpenAI's API for one conversation: its models, and answers as they are written."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from finetune.distill.endpoint import api_root, error_message
from finetune.system.console import printable
from finetune.system.errors import InputError

_CONNECT_SECONDS = 10.0
# Between two pieces of an answer, and before the first one: prompts wait in a queue.
_READ_SECONDS = 600.0
_QUOTED_CHARACTERS = 500
_DONE = "[DONE]"


class ChatClient:
    """One server, reached without a proxy. Redirects are not followed, so only this host receives the key.

    url: with or without /v1 at its end.
    Raises: ConfigError if the URL is invalid.
    """

    def __init__(self, url: str, key: str | None):
        self.url = api_root(url, "url")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise InputError("the API key has characters that no key has, such as a line break")
        self._client = httpx.Client(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS),
            trust_env=False,
        )

    def models(self) -> dict[str, bool]:
        """Return the names of the served models, and whether each is an adapter of another one.

        Raises: InputError.
        """
        with self._sent("GET", "/models") as response:
            try:
                return {str(model["id"]): bool(model.get("parent")) for model in json.loads(response.read())["data"]}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{self.url}/models: is no list of models; is it a server of OpenAI's API?") from error

    def answer(self, model: str, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> StreamedAnswer:
        """Return an answer, which is written while it is read.

        Args:
            messages: of the conversation, as OpenAI's.
            settings: of the request, as temperature.
        """
        body = {"model": model, "messages": list(messages), "stream": True, "stream_options": {"include_usage": True}}
        return StreamedAnswer(self, {**body, **settings})

    def events(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events of an answer; closing the iterator closes the connection, which cancels the answer.

        Raises:
            InputError: the server refuses, fails, or ends the answer before it is complete.
        """
        with self._sent("POST", "/chat/completions", json=dict(body)) as response:
            for line in response.iter_lines():
                name, _, data = line.partition(":")
                if name != "data":
                    continue
                if data.strip() == _DONE:
                    return
                try:
                    event = json.loads(data)
                except ValueError as error:
                    raise InputError(f"{self.url}: a part of the answer is not JSON ({error})") from error
                if not isinstance(event, dict) or event.get("error"):
                    raise InputError(f"{self.url}: {_quoted(error_message(data.encode()))}")
                yield event
        raise InputError(f"{self.url}: the server ended the answer before it was complete")

    @contextmanager
    def _sent(self, method: str, path: str, **body: Any) -> Iterator[httpx.Response]:
        try:
            with self._client.stream(method, self.url + path, **body) as response:
                if response.status_code != 200:
                    text = _quoted(error_message(response.read()))
                    raise InputError(f"{self.url}: HTTP {response.status_code}: {text}")
                yield response
        except httpx.TimeoutException as error:
            raise InputError(f"{self.url}: the server does not answer") from error
        except httpx.ConnectError as error:
            raise InputError(f"{self.url}: cannot be reached ({error})\nhelp: check that the server runs") from error
        except httpx.TransportError as error:
            raise InputError(f"{self.url}: the connection was lost ({type(error).__name__})") from error


class StreamedAnswer:
    """The texts of an answer, in order. text: those read so far. tokens: as the server counts, else one a text."""

    def __init__(self, client: ChatClient, body: Mapping[str, Any]):
        self._client, self._body = client, body
        self.text, self.tokens = "", 0

    def __iter__(self) -> Generator[str]:
        for event in self._client.events(self._body):
            try:
                # The last event has no choice where it has the counts.
                delta = event["choices"][0].get("delta") or {} if event.get("choices") else {}
                piece = str(delta.get("content") or "")
                self.tokens = int((event.get("usage") or {}).get("completion_tokens", self.tokens + bool(piece)))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise InputError(f"{self._client.url}: a part of the answer is no chunk of OpenAI's API") from error
            if piece:
                self.text += piece
                yield piece


def _quoted(text: str) -> str:
    return printable(" ".join(text.split())[:_QUOTED_CHARACTERS])
