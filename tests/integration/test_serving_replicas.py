"""Replicas as processes behind a real nginx, with a real Redis: kills, restarts and outages that no client sees."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from finetune.config.command_options import ServeOptions
from tests.servers import Nginx, RedisServer, free_port
from tests.serving_process import Replica

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "launch" / "nginx" / "finetune.conf.template"
COMPOSE = ROOT / "launch" / "docker" / "compose.yaml"
REQUESTS = int(os.environ.get("FINETUNE_REPLICA_REQUESTS", "300"))
KILLS = 3
CLIENTS = 16


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start_replicas(stack: ExitStack, **options: object) -> list[Replica]:
    replicas = [Replica(free_port(), **options) for _ in range(2)]
    for replica in replicas:
        stack.callback(replica.kill)
    for replica in replicas:
        replica.wait_ready()
    return replicas


def start_nginx(stack: ExitStack, folder: Path, replicas: list[Replica]) -> str:
    """Start nginx with the file that this project ships; return its URL."""
    port, site = free_port(), TEMPLATE.read_text()
    addresses = [replica.url.removeprefix("http://") for replica in replicas]
    for name, value in (("PORT", f"127.0.0.1:{port}"), ("REPLICA_1", addresses[0]), ("REPLICA_2", addresses[1])):
        assert f"${{{name}}}" in site
        site = site.replace(f"${{{name}}}", value)
    stack.callback(Nginx(folder, site, port).stop)
    return f"http://127.0.0.1:{port}"


def text_of(number: int) -> str:
    """The prompt of a request, which the engine repeats."""
    return f"item {number} of a list"


def body(number: int, **settings: Any) -> dict[str, Any]:
    return {"model": "base", "prompt": text_of(number), "max_tokens": 64, "temperature": 0, **settings}


async def ask(client: httpx.AsyncClient, number: int) -> str:
    reply = await client.post("/v1/completions", json=body(number))
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


async def stream(client: httpx.AsyncClient, number: int) -> AsyncIterator[str]:
    """Yield the lines of a streamed answer."""
    async with client.stream("POST", "/v1/completions", json=body(number, stream=True)) as reply:
        assert reply.status_code == 200
        async for line in reply.aiter_lines():
            if line:
                yield line


def client_of(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=100))


async def in_turn(count: int, clients: int, one: Callable[[int], Awaitable[None]]) -> None:
    """Run `one` for every number below `count`, as many at the same time as there are clients."""
    numbers = iter(range(count))

    async def work() -> None:
        for number in numbers:
            await one(number)

    await asyncio.gather(*(work() for _ in range(clients)))


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_a_replica_that_ends_under_load_loses_no_request(tmp_path: Path, stack: ExitStack, end: str):
    """In the middle of each block of requests one of two replicas ends; the next block has both again.

    One that is asked to end (a rolling update) also breaks no stream.
    """
    replicas = start_replicas(stack, seconds=0.002, cache="none")
    url = start_nginx(stack, tmp_path, replicas)
    choose, answered, block_of = random.Random(0), list[int](), REQUESTS // KILLS

    async def check() -> None:
        back = [asyncio.Event() for _ in range(KILLS)]
        tasks = []

        async def restart(block: int) -> None:
            replica = choose.choice(replicas)
            await asyncio.to_thread(getattr(replica, end))
            replica.start()
            await asyncio.to_thread(replica.wait_ready)
            back[block].set()

        async with client_of(url) as client:

            async def one(number: int) -> None:
                block, place = divmod(number, block_of)
                if block:
                    await back[block - 1].wait()
                if place == block_of // 2:
                    tasks.append(asyncio.create_task(restart(block)))
                if end == "stop" and number % 2:
                    assert [line async for line in stream(client, number)][-1] == "data: [DONE]"
                else:
                    assert await ask(client, number) == text_of(number)
                answered.append(number)

            await in_turn(REQUESTS, CLIENTS, one)
            await asyncio.gather(*tasks)

    asyncio.run(check())
    assert sorted(answered) == list(range(REQUESTS))
    # Every replica was reached, so the kills met requests in progress.
    assert "Connection refused" in (tmp_path / "error.log").read_text()


def test_a_stream_is_not_held_back_and_a_broken_one_is_not_continued(tmp_path: Path, stack: ExitStack):
    replicas = start_replicas(stack, seconds=0.2, cache="none")
    url = start_nginx(stack, tmp_path, replicas)

    async def check() -> None:
        async with client_of(url) as client:
            lines = [line async for line in stream(client, 7)]
            assert lines[-1] == "data: [DONE]" and len(lines) > 3
            broken: list[str] = []
            with pytest.raises(httpx.RemoteProtocolError):
                async for line in stream(client, 8):
                    broken.append(line)
                    if len(broken) == 1:  # Only an unbuffered stream has a first line before the last token.
                        for replica in replicas:
                            replica.kill()
            assert broken and "data: [DONE]" not in broken
            lost = await client.post("/v1/completions", json=body(9))
            assert lost.status_code == 503 and lost.headers["retry-after"] and lost.json()["error"]["message"]

    asyncio.run(check())


def test_two_full_replicas_say_when_to_come_back(tmp_path: Path, stack: ExitStack):
    replicas = start_replicas(stack, seconds=0.05, cache="none", max_batch=1, queue=0)
    url = start_nginx(stack, tmp_path, replicas)

    async def check() -> None:
        async with client_of(url) as client:
            replies = await asyncio.gather(*(client.post("/v1/completions", json=body(number)) for number in range(12)))
            assert {reply.status_code for reply in replies} == {200, 429}
            for number, reply in enumerate(replies):
                if reply.status_code == 200:
                    assert reply.json()["choices"][0]["text"] == text_of(number)
                else:
                    assert int(reply.headers["retry-after"]) >= 1 and reply.json()["error"]["code"] == "overloaded"
            # A refusal does not count against a replica.
            assert await ask(client, 1) == text_of(1)

    asyncio.run(check())


def test_nginx_refuses_what_concerns_one_replica_and_what_is_too_large(tmp_path: Path, stack: ExitStack):
    replicas = start_replicas(stack)
    url = start_nginx(stack, tmp_path, replicas)
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "base"
    assert httpx.get(f"{url}/metrics").status_code == 404
    assert httpx.post(f"{url}/v1/adapters", json={"name": "a", "folder": "a"}).status_code == 403
    assert httpx.delete(f"{url}/v1/adapters/a").status_code == 403
    # Only announced: a server may close the connection while a client still sends, which the client sees as an error.
    lines = (
        "POST /v1/completions HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        "Content-Length: 4000001",
        "",
        "",
    )
    for address in map(httpx.URL, (url, replicas[0].url)):
        with socket.create_connection((address.host, address.port), 30) as connection:
            connection.sendall("\r\n".join(lines).encode())
            answer = b""
            while b'"error"' not in answer:
                answer += (piece := connection.recv(4096))
                assert piece, answer
        assert answer.startswith(b"HTTP/1.1 413")


def test_sigterm_in_the_middle_of_32_streams_ends_none(stack: ExitStack):
    replica = Replica(free_port(), seconds=0.05)
    stack.callback(replica.kill)
    replica.wait_ready()

    async def check() -> None:
        async with client_of(replica.url) as client:
            begun = asyncio.Semaphore(0)

            async def read(number: int) -> list[str]:
                lines = []
                async for line in stream(client, number):
                    if not lines:
                        begun.release()
                    lines.append(line)
                return lines

            streams = [asyncio.create_task(read(number)) for number in range(32)]
            for _ in streams:
                await begun.acquire()
            stopped = asyncio.create_task(asyncio.to_thread(replica.stop))
            for lines in await asyncio.gather(*streams):
                assert lines[-1] == "data: [DONE]"
            assert await stopped == 0

    asyncio.run(check())


def test_redis_stopped_and_started_in_the_middle_is_not_seen(tmp_path: Path, stack: ExitStack):
    redis = RedisServer(tmp_path)
    stack.callback(redis.stop)
    replicas = start_replicas(stack, cache=redis.url)

    def hits() -> float:
        text = "".join(httpx.get(f"{replica.url}/metrics").text for replica in replicas)
        return sum(float(line.split()[-1]) for line in text.splitlines() if 'lookups_total{result="hit"}' in line)

    async def check() -> None:
        async with client_of("http://127.0.0.1") as client:

            async def one(number: int) -> None:
                if number == 60:
                    redis.stop()
                if number == 120:
                    redis.start()
                url = replicas[number % 2].url
                reply = await client.post(f"{url}/v1/completions", json=body(number // 2 % 10))
                assert reply.status_code == 200
                assert reply.json()["choices"][0]["text"] == text_of(number // 2 % 10)

            await in_turn(180, 4, one)

    asyncio.run(check())
    assert hits() > 0


def test_the_compose_file_names_services_and_options_that_exist():
    compose = yaml.safe_load(COMPOSE.read_text())
    services = compose["services"]
    assert set(services) == {"replica-1", "replica-2", "nginx", "redis"}
    nginx = services["nginx"]
    assert {name for name in ("PORT", "REPLICA_1", "REPLICA_2") if f"${{{name}}}" in TEMPLATE.read_text()} == set(
        nginx["environment"]
    )
    for number in "12":
        replica = services[f"replica-{number}"]
        host, port = nginx["environment"][f"REPLICA_{number}"].split(":")
        command, *words = replica["command"]
        options = dict(word.split("=", 1) for word in words)
        assert host in services and options.pop("port") == port and command == "serve"
        cache = options.pop("serve.cache")
        ServeOptions.model_validate({**options, "port": int(port), "serve": {"cache": cache}})
        assert cache.split("//")[1].split(":")[0] in services
        assert (COMPOSE.parent / replica["build"]["context"] / replica["build"]["dockerfile"]).is_file()
    mounted = nginx["volumes"][0].split(":")[0]
    assert (COMPOSE.parent / mounted).resolve() == TEMPLATE
    assert str(nginx["environment"]["PORT"]) == nginx["ports"][0].split(":")[-1]
