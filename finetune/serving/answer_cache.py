"""Answers of repeated requests, kept in this process or in Redis.

A stored answer is found again only by the same weights, the same request and the same version of this package. A store
that is dead, slow, full or wrong costs a computation, never a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

from finetune import __version__
from finetune.config.command_options import ServeSettings
from finetune.serving.request import Event, Finished, PromptScores, Request, Token, TokenScore
from finetune.system.console import log
from finetune.system.errors import ConfigError, MissingExtra

_FORMAT = 1  # raise it when the bytes of an answer change
_ANSWER_BYTES = 1 << 20  # longer answers are not kept
_MEMORY_BYTES = 256 << 20
_REDIS_SECONDS = 0.25  # for one call
_REDIS_CALLS = 32  # at the same time; more are not worth their wait
_REDIS_LIFETIME_SECONDS = 24 * 3600
_REDIS_PAUSE_SECONDS = 5.0  # after a failure no request waits for Redis
_CHECK_BYTES = 16


class Store(Protocol):
    """Keeps bytes by key. It raises nothing: what fails is not found."""

    async def get(self, key: str) -> bytes | None:
        """Return what was put, or None."""
        ...

    async def put(self, key: str, value: bytes) -> None:
        """Keep a value, perhaps."""
        ...

    async def close(self) -> None:
        """Free connections."""
        ...


class AnswerCache:
    """Whole answers of deterministic requests.

    on_error: called at each failure of the store or wrong value in it.
    """

    def __init__(self, store: Store, on_error: Callable[[], None]):
        self._store, self._on_error = store, on_error

    async def get(self, key: str) -> list[Event] | None:
        """Return the events of an answer, or None."""
        value = await self._store.get(key)
        if value is None:
            return None
        try:
            return decode(key, value)
        except ValueError:
            self._on_error()
            return None

    async def put(self, key: str, events: Sequence[Event]) -> None:
        """Keep an answer that ended by itself."""
        value = encode(key, events)
        if len(value) <= _ANSWER_BYTES + _CHECK_BYTES:
            await self._store.put(key, value)

    async def close(self) -> None:
        """Free the connections of the store."""
        await self._store.close()


def build_answer_cache(settings: ServeSettings, on_error: Callable[[], None]) -> AnswerCache | None:
    """Build the cache of `serve.cache`; None for none.

    Raises:
        ConfigError: serve.cache is none of its values.
        MissingExtra: Redis without its package.
    """
    if settings.cache == "none":
        return None
    if settings.cache == "memory":
        return AnswerCache(MemoryStore(settings.cache_entries, _MEMORY_BYTES), on_error)
    if urlsplit(settings.cache).scheme in ("redis", "rediss", "unix"):
        return AnswerCache(RedisStore(settings.cache, on_error), on_error)
    # The value may hold a password.
    raise ConfigError("serve.cache: it is none, memory, or an address as redis://HOST:PORT/DB")


def answer_key(request: Request, model_digest: str, adapter_digest: str) -> str:
    """Return the SHA-256 of all that decides an answer, as hex digits."""
    settings = dataclasses.asdict(request) | {"adapter": adapter_digest, "stop_ids": sorted(request.stop_ids)}
    text = json.dumps([__version__, _FORMAT, model_digest, settings], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def encode(key: str, events: Sequence[Event]) -> bytes:
    """Return an answer as bytes that open with a check of themselves and their key."""
    rows: list[list[Any]] = []
    for event in events:
        if isinstance(event, Token):
            rows.append(["t", event.id, event.log_prob, event.top])
        elif isinstance(event, PromptScores):
            rows.append(["p", event.tokens, event.top])
        else:
            rows.append(["f", event.reason])
    body = json.dumps(rows, separators=(",", ":")).encode()
    return _check(key, body) + body


def decode(key: str, value: bytes) -> list[Event]:
    """Return the events of `encode`. Raises: ValueError for any other bytes."""
    body = value[_CHECK_BYTES:]
    if value[:_CHECK_BYTES] != _check(key, body):
        raise ValueError("these bytes are no answer of this key")
    events: list[Event] = []
    for kind, *fields in json.loads(body):
        if kind == "t":
            id, log_prob, top = fields
            events.append(Token(id, log_prob, _scores(top)))
        elif kind == "p":
            tokens, top = fields
            scores = [None if score is None else TokenScore(*score) for score in tokens]
            events.append(PromptScores(scores, [_scores(row) for row in top]))
        else:
            events.append(Finished(*fields))
    return events


def _scores(rows: list[list[Any]]) -> tuple[TokenScore, ...]:
    return tuple(TokenScore(*row) for row in rows)


def _check(key: str, body: bytes) -> bytes:
    return hashlib.sha256(key.encode() + body).digest()[:_CHECK_BYTES]


class MemoryStore:
    """The most recently used values of this process, within a number and a sum of bytes."""

    def __init__(self, entries: int, bytes_limit: int):
        self._entries, self._bytes_limit = entries, bytes_limit
        self._values: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0

    async def get(self, key: str) -> bytes | None:
        """Return a value, which becomes the most recently used one."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    async def put(self, key: str, value: bytes) -> None:
        """Keep a value and forget the least recently used ones beyond the limits."""
        self._bytes += len(value) - len(self._values.pop(key, b""))
        self._values[key] = value
        while len(self._values) > self._entries or self._bytes > self._bytes_limit:
            self._bytes -= len(self._values.popitem(last=False)[1])

    async def close(self) -> None:
        """Free nothing: the process owns the values."""


class RedisStore:
    """Values in Redis, which several replicas share.

    After a failure it leaves Redis alone for some seconds, so that an outage delays one request, not each.
    """

    def __init__(self, url: str, on_error: Callable[[], None], clock: Callable[[], float] = time.monotonic):
        try:
            from redis.asyncio import Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
            from redis.exceptions import ResponseError
        except ImportError as error:
            raise MissingExtra('serve.cache=redis:// needs: pip install "finetune-qlora[redis]"') from error
        try:
            # `_call` bounds the time of all steps together.
            self._client = Redis.from_url(
                url,
                socket_connect_timeout=None,
                socket_timeout=None,
                retry=Retry(NoBackoff(), 0),
                max_connections=_REDIS_CALLS,
            )
        except ValueError as error:
            # The text of redis may repeat the password.
            raise ConfigError("serve.cache: the address is not as redis://HOST:PORT/DB") from error
        self._refusal = ResponseError
        self._refusals: set[str] = set()
        self._on_error, self._clock = on_error, clock
        self._calls = 0
        self._paused_until = -math.inf
        self._reachable = True

    async def get(self, key: str) -> bytes | None:
        """Return the value of a key, never more than an answer's bytes of it; None if Redis fails."""
        # GETRANGE bounds what a wrong value costs. It answers nothing for a missing key.
        value = await self._call("GETRANGE", _name(key), 0, _ANSWER_BYTES + _CHECK_BYTES)
        return value if isinstance(value, bytes) and value else None

    async def put(self, key: str, value: bytes) -> None:
        """Set a value for a day. Redis may refuse it when its memory is full."""
        await self._call("SET", _name(key), value, "EX", _REDIS_LIFETIME_SECONDS)

    async def close(self) -> None:
        """Close the connections."""
        with contextlib.suppress(OSError):
            await self._client.aclose()

    async def _call(self, *command: str | bytes | int) -> Any:
        if self._clock() < self._paused_until or self._calls >= _REDIS_CALLS:
            return None
        self._calls += 1
        try:
            async with asyncio.timeout(_REDIS_SECONDS):
                reply = await self._client.execute_command(*command)
        except self._refusal as error:
            # Redis is alive: it is full, or the key holds something else. Other commands may succeed.
            self._on_error()
            self._log_refusal(type(error).__name__, str(command[0]))
            return None
        except Exception as error:  # noqa: BLE001 - replies that are no Redis protocol break the client in many ways
            self._on_error()
            self._paused_until = self._clock() + _REDIS_PAUSE_SECONDS
            if self._reachable:
                # The class only: a message may hold the address with its password.
                log(f"answer cache: redis=failed, error={type(error).__name__}; answers are computed")
            self._reachable = False
            return None
        finally:
            self._calls -= 1
        if not self._reachable:
            log("answer cache: redis=back")
        self._reachable = True
        return reply

    def _log_refusal(self, error: str, command: str) -> None:
        if command not in self._refusals:
            self._refusals.add(command)
            log(f"answer cache: redis=refused, command={command}, error={error}")


def _name(key: str) -> str:
    return f"finetune:answer:{key}"
