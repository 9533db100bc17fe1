"""A kept answer is found by the same request only; a store that fails costs a computation, never a request."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.command_options import ServeSettings
from finetune.serving import answer_cache
from finetune.serving.answer_cache import (
    AnswerCache,
    MemoryStore,
    RedisStore,
    answer_key,
    build_answer_cache,
    decode,
    encode,
)
from finetune.serving.request import Event, Finished, PromptScores, Request, Sampling, Token, TokenScore
from finetune.system.errors import ConfigError
from tests.servers import RedisServer

KEY, OTHER = "a" * 64, "b" * 64
ANSWER: list[Event] = [Token(1), Token(2, -0.25, (TokenScore(2, -0.25), TokenScore(7, -3.5))), Finished("stop")]
BASE = Request(ids=(1, 2), max_tokens=3)
CHANGES: list[dict[str, Any]] = [
    {"ids": (1, 3)},
    {"ids": (12,)},
    {"max_tokens": 4},
    {"stop_ids": frozenset({5})},
    {"stop_ids": frozenset({5, 6})},
    {"log_probs": 0},
    {"prompt_log_probs": 0},
    *(
        {"sampling": dataclasses.replace(Sampling(), **changed)}
        for changed in (
            {"temperature": 0.5},
            {"top_p": 0.5},
            {"top_k": 5},
            {"seed": 1},
            {"presence_penalty": 0.5},
            {"frequency_penalty": 0.5},
            {"repetition_penalty": 1.5},
            {"grammar": "{}"},
        )
    ),
]

scores = st.builds(TokenScore, st.integers(0, 2**20), st.floats(max_value=0))
tokens = st.builds(
    Token, st.integers(0, 2**20), st.none() | st.floats(max_value=0), st.lists(scores, max_size=3).map(tuple)
)


def test_every_setting_that_decides_an_answer_changes_its_key(monkeypatch: pytest.MonkeyPatch):
    requests = [BASE, *(dataclasses.replace(BASE, **change) for change in CHANGES)]
    keys = {answer_key(request, "m", "a") for request in requests}
    changed = {field for change in CHANGES for field in change}
    assert changed | {"adapter"} == {field.name for field in dataclasses.fields(Request)}
    base = dataclasses.asdict(BASE.sampling).items()
    changes = [dataclasses.asdict(request.sampling).items() ^ base for request in requests]
    assert {name for change in changes for name, _ in change} == {field.name for field in dataclasses.fields(Sampling)}
    assert len(keys) == len(requests)
    keys |= {answer_key(BASE, "other", "a"), answer_key(BASE, "m", "other")}
    monkeypatch.setattr(answer_cache, "__version__", "0.0.0")
    keys.add(answer_key(BASE, "m", "a"))
    assert len(keys) == len(requests) + 3


def test_the_name_of_an_adapter_does_not_decide_its_answers():
    renamed = dataclasses.replace(BASE, adapter="b")
    assert answer_key(renamed, "m", "d") == answer_key(dataclasses.replace(BASE, adapter="c"), "m", "d")


@given(st.lists(tokens, max_size=5), st.lists(st.none() | scores, max_size=3))
def test_an_answer_is_read_as_it_was_kept(answer: list[Token], prompt: list[TokenScore | None]):
    events = [
        PromptScores(prompt, [() if score is None else (score,) for score in prompt]),
        *answer,
        Finished("length"),
    ]
    assert decode(KEY, encode(KEY, events)) == events


@given(st.binary(max_size=200))
def test_no_other_bytes_are_an_answer(value: bytes):
    with pytest.raises(ValueError):
        decode(KEY, value)


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_changed_byte_or_a_missing_end_is_noticed(place: int, change: int):
    value = bytearray(encode(KEY, ANSWER))
    place %= len(value)
    with pytest.raises(ValueError):
        decode(KEY, bytes(value[:place]))
    value[place] ^= change
    with pytest.raises(ValueError):
        decode(KEY, bytes(value))


def test_an_answer_under_another_key_is_refused():
    with pytest.raises(ValueError):
        decode(OTHER, encode(KEY, ANSWER))


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(0, 40)), max_size=60),
    st.integers(1, 4),
    st.integers(1, 100),
)
def test_memory_keeps_the_most_recently_used_within_its_limits(moves: list[Any], entries: int, limit: int):
    async def check() -> None:
        store, model = MemoryStore(entries, limit), OrderedDict[str, bytes]()
        for puts, key, size in moves:
            name, value = str(key), bytes(size)
            if puts:
                await store.put(name, value)
                model.pop(name, None)
                model[name] = value
                while len(model) > entries or sum(map(len, model.values())) > limit:
                    model.popitem(last=False)
            else:
                if name in model:
                    model.move_to_end(name)
                assert await store.get(name) == model.get(name)
            assert list(store._values.items()) == list(model.items())

    asyncio.run(check())


def test_an_answer_that_is_too_long_is_not_kept():
    async def check() -> None:
        cache = AnswerCache(MemoryStore(10, 1 << 30), lambda: None)
        await cache.put(KEY, [Token(100_000)] * 200_000 + [Finished("length")])
        assert await cache.get(KEY) is None

    asyncio.run(check())


@pytest.mark.parametrize("cache", ["disk", "http://127.0.0.1", "redis://user:secret@127.0.0.1:port/0"])
def test_another_cache_is_refused_without_its_password(cache: str):
    with pytest.raises(ConfigError) as refused:
        build_answer_cache(ServeSettings(cache=cache), lambda: None)
    assert "secret" not in str(refused.value)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A cache over a Redis at `url`. errors: how many there were. calls: commands that were sent."""

    def __init__(self, url: str):
        self.errors, self.calls, self.clock = 0, 0, Clock()
        self.store = RedisStore(url, self._count, self.clock)
        self.cache = AnswerCache(self.store, self._count)
        send = self.store._client.execute_command

        async def counted(*command: Any) -> Any:
            self.calls += 1
            return await send(*command)

        self.store._client.execute_command = counted  # type: ignore[method-assign]

    def _count(self) -> None:
        self.errors += 1


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    yield server
    server.stop()


def watch(url: str, check: Callable[[Watched], Awaitable[None]]) -> None:
    async def run() -> None:
        watched = Watched(url)
        await check(watched)
        await watched.cache.close()

    asyncio.run(run())


def test_redis_keeps_answers_for_a_while(redis: RedisServer):
    async def check(watched: Watched) -> None:
        assert await watched.cache.get(KEY) is None
        await watched.cache.put(KEY, ANSWER)
        assert await watched.cache.get(KEY) == ANSWER and await watched.cache.get(OTHER) is None
        assert 0 < await watched.store._client.ttl(answer_cache._name(KEY)) <= 24 * 3600
        assert watched.errors == 0

    watch(redis.url, check)


def test_a_crowd_of_requests_is_no_failure_of_redis(redis: RedisServer):
    async def check(watched: Watched) -> None:
        await watched.cache.put(KEY, ANSWER)
        found = await asyncio.gather(*(watched.cache.get(KEY) for _ in range(300)))
        assert ANSWER in found and watched.errors == 0
        assert await watched.cache.get(KEY) == ANSWER

    watch(redis.url, check)


def test_wrong_values_in_redis_are_no_answers_and_are_replaced(redis: RedisServer):
    async def check(watched: Watched) -> None:
        client, name = watched.store._client, answer_cache._name(KEY)
        wrong = [
            b"",
            b"\xff" * 100,
            encode(OTHER, ANSWER),
            encode(KEY, ANSWER)[:-1],
            b"[]",
            b"0" * 10**7,
        ]
        for value in wrong:
            await client.set(name, value)
            assert await watched.cache.get(KEY) is None
        await client.delete(name)
        await client.lpush(name, "a list")
        assert await watched.cache.get(KEY) is None
        await watched.cache.put(KEY, ANSWER)
        assert await watched.cache.get(KEY) == ANSWER

    watch(redis.url, check)


def test_a_redis_that_stops_is_left_alone_and_found_again(redis: RedisServer, capsys: pytest.CaptureFixture[str]):
    async def check(watched: Watched) -> None:
        await watched.cache.put(KEY, ANSWER)
        redis.stop()
        for _ in range(20):
            assert await watched.cache.get(KEY) is None
            await watched.cache.put(KEY, ANSWER)
        assert watched.errors == 1 and watched.calls == 2  # One put before, one failure.
        watched.clock.now += 60
        assert await watched.cache.get(KEY) is None and watched.errors == 2
        redis.start()
        watched.clock.now += 60
        await watched.cache.put(KEY, ANSWER)
        assert await watched.cache.get(KEY) == ANSWER and watched.errors == 2

    watch(redis.url, check)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("answer cache")]
    assert len(lines) == 2 and "redis=failed" in lines[0] and "redis=back" in lines[1]


def test_a_full_redis_still_answers_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    redis = RedisServer(tmp_path, "--maxmemory-policy", "noeviction")

    async def check(watched: Watched) -> None:
        await watched.cache.put(KEY, ANSWER)
        await watched.store._client.config_set("maxmemory", "1")
        for _ in range(3):
            await watched.cache.put(OTHER, ANSWER)
            assert await watched.cache.get(KEY) == ANSWER and await watched.cache.get(OTHER) is None
        assert watched.errors == 3

    try:
        watch(redis.url, check)
    finally:
        redis.stop()
    assert capsys.readouterr().err.count("redis=refused") == 1


def test_a_redis_that_trickles_is_as_good_as_dead(redis: RedisServer):
    """Each byte comes in time, the whole reply does not."""

    async def check() -> None:
        async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            upstream, to_upstream = await asyncio.open_unix_connection(redis.url.removeprefix("unix://"))

            async def forward() -> None:
                while part := await reader.read(1000):
                    to_upstream.write(part)

            forwarding = asyncio.create_task(forward())
            with contextlib.suppress(ConnectionError):
                while part := await upstream.read(1):
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.01)
            forwarding.cancel()
            to_upstream.close()
            writer.close()

        whole = Watched(redis.url)
        await whole.cache.put(KEY, ANSWER)
        await whole.cache.close()
        server = await asyncio.start_server(trickle, "127.0.0.1", 0)
        watched = Watched(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0")
        assert await watched.cache.get(KEY) is None and watched.errors == 1
        await watched.cache.close()
        server.close()

    asyncio.run(check())


Reply = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(1000):
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")


async def agreeing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(1000):
        writer.write(b"+OK\r\n")


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"$1000000000\r\n")
    while not writer.is_closing():
        writer.write(bytes(1000))
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("reply", [silent, garbage, agreeing, endless])
def test_a_server_that_is_no_redis_costs_one_short_wait(reply: Reply, capsys: pytest.CaptureFixture[str]):
    async def check() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                await reply(reader, writer)
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        watched = Watched(f"redis://user:secret@127.0.0.1:{server.sockets[0].getsockname()[1]}/0")
        for _ in range(10):
            assert await watched.cache.get(KEY) is None
            await watched.cache.put(KEY, ANSWER)
        assert watched.errors == 1 == watched.calls
        await watched.cache.close()
        server.close()

    asyncio.run(check())
    assert "secret" not in capsys.readouterr().err
