"""A service bounds, shares, cancels and ends the answers of an engine, and knows its models."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune.config.command_options import ServeSettings
from finetune.serving.admission import DeadlineExceeded, Overloaded, Unavailable
from finetune.serving.request import Event, Finished, Load, Put, Request, Sampling, Token
from finetune.serving.service import ServedModel, Service, adapter_digest
from finetune.system.errors import ConfigError, FinetuneError, InputError, IntegrityError
from tests.serving_engine import ScriptedEngine


class Held(ScriptedEngine):
    """Answers nothing until `release` is called for a prompt."""

    def __init__(self):
        super().__init__()
        self.puts: list[tuple[Request, Put]] = []

    def submit(self, request: Request, put: Put) -> int:
        self.requests.append(request)
        self.puts.append((request, put))
        return len(self.puts)

    def cancel(self, handle: Any) -> None:
        super().cancel(handle)
        self.puts[handle - 1][1](Finished("cancelled"))

    def release(self, *events: Event, place: int = -1) -> None:
        for event in events:
            self.puts[place][1](event)


@asynccontextmanager
async def running(
    engine: ScriptedEngine, check: Callable[..., dict[str, Any]] = lambda name, folder: {}, **settings: Any
) -> AsyncIterator[Service]:
    models = [ServedModel(name, name, f"digest of {name}", 0) for name in engine.adapters()]
    models.append(ServedModel("base", None, "digest of the base", 0))
    service = Service(engine, None, models, ServeSettings(**settings), check=check)  # type: ignore[arg-type]
    service.ready = True
    yield service
    await service.close()


async def read(service: Service, request: Request, seconds: float | None = None) -> list[Event]:
    async with aclosing(service.answer(request, seconds=seconds)) as events:
        return [event async for event in events]


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail("the condition never held")


def request(*ids: int, max_tokens: int = 8, **settings: Any) -> Request:
    return Request(ids=ids or (1, 2, 3), max_tokens=max_tokens, **settings)


def random_request(*ids: int) -> Request:
    return request(*ids, sampling=Sampling(temperature=1.0))


def value(service: Service, name: str, **labels: str) -> float:
    return service.metrics.registry.get_sample_value(f"finetune_{name}", labels) or 0.0


def test_an_answer_is_what_the_engine_writes():
    async def check() -> None:
        async with running(ScriptedEngine()) as service:
            assert await read(service, request()) == [Token(1), Token(2), Token(3), Finished("length")]
            assert value(service, "answers_total", end="length") == 1
            assert value(service, "answer_tokens_total", model="base") == 3
            assert value(service, "prompt_tokens_total", model="base") == 3

    asyncio.run(check())


def test_before_it_is_ready_and_while_it_drains_nobody_is_answered():
    async def check() -> None:
        async with running(ScriptedEngine()) as service:
            service.ready = False
            with pytest.raises(Unavailable):
                await read(service, request())
            service.ready = True
            assert await service.drain(1)
            with pytest.raises(Unavailable):
                await read(service, request())
            assert value(service, "refused_total", reason="unavailable") == 2

    asyncio.run(check())


def test_beyond_batch_and_queue_a_request_is_refused_and_a_repeat_is_not():
    async def check() -> None:
        engine = Held()
        async with running(engine, max_batch=2, queue=1) as service:
            tasks = [asyncio.create_task(read(service, request(n))) for n in (1, 2, 3)]
            await until(lambda: len(engine.puts) == 3)
            with pytest.raises(Overloaded) as refused:
                await read(service, request(4))
            assert not isinstance(refused.value, Unavailable) and refused.value.retry_after_seconds >= 1
            joined = asyncio.create_task(read(service, request(1)))
            await until(lambda: value(service, "answer_cache_lookups_total", result="shared") == 1)
            for place in range(3):
                engine.release(Finished("stop"), place=place)
            assert await asyncio.gather(*tasks, joined) == [[Finished("stop")]] * 4
            engine.puts.clear()
            accepted = asyncio.create_task(read(service, request(4)))
            await until(lambda: len(engine.puts) == 1)
            engine.release(Finished("stop"))
            await accepted

    asyncio.run(check())


def test_a_consumer_that_stops_early_cancels_also_in_the_queue():
    async def check() -> None:
        engine = Held()
        async with running(engine, max_batch=1, queue=0) as service:
            stream = service.answer(request(1))
            task = asyncio.create_task(anext(stream))
            await until(lambda: len(engine.puts) == 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert engine.cancelled == [1]
            stream = service.answer(request(2))
            first = asyncio.create_task(anext(stream))
            await until(lambda: len(engine.puts) == 2)
            engine.release(Token(5))
            assert await first == Token(5)
            await stream.aclose()
            assert engine.cancelled == [1, 2]
            await until(lambda: value(service, "answers_total", end="cancelled") == 2)

    asyncio.run(check())


def test_identical_requests_share_one_computation_and_the_first_may_leave():
    async def check() -> None:
        engine = Held()
        async with running(engine) as service:
            first = asyncio.create_task(read(service, request()))
            await until(lambda: len(engine.puts) == 1)
            engine.release(Token(1))
            await until(lambda: value(service, "answer_cache_lookups_total", result="miss") == 1)
            second = asyncio.create_task(read(service, request()))
            await until(lambda: value(service, "answer_cache_lookups_total", result="shared") == 1)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            assert engine.cancelled == []
            engine.release(Token(2), Finished("stop"))
            assert await second == [Token(1), Token(2), Finished("stop")]
            assert len(engine.puts) == 1

    asyncio.run(check())


def test_nobody_joins_an_answer_that_was_cancelled():
    async def check() -> None:
        engine = Held()
        async with running(engine) as service:
            engine.cancel = engine.cancelled.append  # type: ignore[method-assign]  # Its last event comes late.
            first = asyncio.create_task(read(service, request()))
            await until(lambda: len(engine.puts) == 1)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            second = asyncio.create_task(read(service, request()))
            await until(lambda: len(engine.puts) == 2)
            engine.release(Finished("cancelled"), place=0)
            engine.release(Token(1), Finished("stop"), place=1)
            assert await second == [Token(1), Finished("stop")]

    asyncio.run(check())


def test_a_repeat_is_answered_without_the_engine_and_random_or_broken_answers_are_not_kept():
    async def check() -> None:
        engine = Held()
        async with running(engine) as service:

            async def ask(asked: Request, *events: Event) -> list[Event]:
                before = len(engine.puts)
                task = asyncio.create_task(read(service, asked))
                await until(lambda: len(engine.puts) > before or task.done())
                if not task.done():
                    engine.release(*events)
                return await task

            for broken in (Finished("error", error="out of memory"), Finished("cancelled")):
                assert await ask(request(), Token(9), broken) == [Token(9), broken]
            for _ in range(2):
                await ask(random_request(), Token(8), Finished("stop"))
            assert len(engine.puts) == 4
            whole = await ask(request(), Token(1), Finished("stop", cached_tokens=1))
            again = await read(service, request())
            assert again == [*whole[:-1], Finished("stop", cached_tokens=3)] and len(engine.puts) == 5
            seeded = request(sampling=Sampling(temperature=1.0, seed=7))
            await ask(seeded, Token(2), Finished("stop"))
            assert (await read(service, seeded))[0] == Token(2) and len(engine.puts) == 6

    asyncio.run(check())


def test_without_a_cache_every_request_is_computed():
    async def check() -> None:
        engine = ScriptedEngine()
        async with running(engine, cache="none") as service:
            await asyncio.gather(*(read(service, request()) for _ in range(3)))
            assert len(engine.requests) == 3

    asyncio.run(check())


def test_a_deadline_raises_before_the_first_event_and_ends_the_stream_after_it():
    async def check() -> None:
        engine = Held()
        async with running(engine) as service:
            with pytest.raises(DeadlineExceeded):
                await read(service, request(1), seconds=0.05)
            assert engine.cancelled == [1]
            stream = asyncio.create_task(read(service, request(2), seconds=0.2))
            await until(lambda: len(engine.puts) == 2)
            engine.release(Token(5))
            first, last = await stream
            assert first == Token(5) and isinstance(last, Finished) and last.reason == "deadline"
            assert engine.cancelled == [1, 2]
            assert value(service, "deadlines_passed_total") == 2
            again = asyncio.create_task(read(service, request(2)))
            await until(lambda: len(engine.puts) == 3)  # The cut answer was not kept.
            engine.release(Finished("stop"))
            await again

    asyncio.run(check())


def test_a_deadline_that_cuts_an_answer_is_longer_afterwards():
    async def check() -> None:
        engine = Held()
        limits = {"deadline_floor_seconds": 0.02, "deadline_factor": 3}
        async with running(engine, **limits, cache="none") as service:
            for _ in range(30):
                task = asyncio.create_task(read(service, request(max_tokens=1)))
                await until(lambda: bool(engine.puts))
                engine.release(Finished("length"))
                await task
                engine.puts.clear()
            given = []
            for _ in range(2):
                with pytest.raises(DeadlineExceeded) as cut:
                    await read(service, request(max_tokens=1))
                given.append(cut.value.seconds)
            assert given[1] >= 3 * given[0]
            known = len(service._deadlines._first)
            with pytest.raises(DeadlineExceeded):  # A client's own limit says nothing about the server.
                await read(service, request(max_tokens=1), seconds=0.001)
            assert len(service._deadlines._first) == known

    asyncio.run(check())


def test_drain_waits_for_running_answers_and_not_longer_than_it_may():
    async def check() -> None:
        engine = Held()
        async with running(engine) as service:
            task = asyncio.create_task(read(service, request()))
            await until(lambda: len(engine.puts) == 1)
            assert not await service.drain(0.05)
            drained = asyncio.create_task(service.drain(60))
            engine.release(Token(1), Finished("stop"))
            assert await task == [Token(1), Finished("stop")] and await drained

    asyncio.run(check())


def test_warm_up_runs_a_full_batch_with_every_adapter_and_a_long_prompt_and_counts_nothing():
    async def check() -> None:
        engine = ScriptedEngine()
        engine.load_adapter("a", "")
        async with running(engine, max_batch=4, prefill_tokens=16) as service:
            await service.warm_up()
            assert [(len(asked.ids), asked.adapter) for asked in engine.requests] == [
                (1, None),
                (8, None),
                (8, "a"),
                (8, None),
                (8, "a"),
                (17, None),
            ]
            assert value(service, "answers_total", end="length") == 0

    asyncio.run(check())


def test_a_failing_engine_stops_the_warm_up():
    class Failing(ScriptedEngine):
        def submit(self, request: Request, put: Put) -> int:
            put(Finished("error", error="no kernel"))
            return 0

    async def check() -> None:
        async with running(Failing()) as service:
            with pytest.raises(FinetuneError, match="no kernel"):
                await service.warm_up()

    asyncio.run(check())


def write_adapter(folder: Path, content: bytes = b"x", settings: str = "{}") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(settings)
    (folder / "adapter_model.safetensors").write_bytes(content)
    return str(folder)


def test_adapters_come_and_go_and_one_that_the_engine_forgets_is_no_model(tmp_path: Path):
    class Small(ScriptedEngine):
        def load_adapter(self, name: str, folder: str) -> None:
            super().load_adapter(name, folder)
            if len(self.folders) > 2:
                del self.folders["b"]

    async def check() -> None:
        engine = Small()
        async with running(engine) as service:
            folders = {name: write_adapter(tmp_path / name, name.encode()) for name in "abc"}
            for name in "ab":
                await service.load_adapter(name, folders[name])
            with pytest.raises(InputError, match="already"):
                await service.load_adapter("a", folders["b"])
            await service.load_adapter("c", folders["c"])
            with pytest.raises(InputError):
                await read(service, request(adapter="b"))
            assert list(service.models) == ["base", "a", "c"] and set(engine.adapters()) == {"a", "c"}
            await service.unload_adapter("a")
            with pytest.raises(InputError, match="stays"):
                await service.unload_adapter("base")
            with pytest.raises(ConfigError):
                await service.load_adapter("d", str(tmp_path))
            assert list(service.models) == ["base", "c"] and set(engine.adapters()) == {"c"}

    asyncio.run(check())


def test_a_loaded_adapter_is_compared_and_one_that_differs_is_not_served(tmp_path: Path):
    def compare(name: str, folder: Path) -> dict[str, Any]:
        if folder.name == "far":
            raise IntegrityError("far: KL=1.2")
        return {"check": {"kl": 0.0}}

    async def check() -> None:
        engine = ScriptedEngine()
        async with running(engine, check=compare) as service:
            for name in ("near", "far"):
                write_adapter(tmp_path / name, name.encode())
            model = await service.load_adapter("near", str(tmp_path / "near"))
            assert model.details == {"check": {"kl": 0.0}}
            with pytest.raises(IntegrityError):
                await service.load_adapter("far", str(tmp_path / "far"))
            assert list(service.models) == ["base", "near"] and engine.adapters() == ["near"]

    asyncio.run(check())


def test_the_loop_goes_on_while_an_adapter_is_read(tmp_path: Path):
    class Slow(ScriptedEngine):
        reading = threading.Event()

        def load_adapter(self, name: str, folder: str) -> None:
            assert self.reading.wait(60)
            super().load_adapter(name, folder)

    async def check() -> None:
        engine = Slow()
        async with running(engine) as service:
            load = asyncio.create_task(service.load_adapter("a", write_adapter(tmp_path / "a")))
            assert await read(service, request())
            assert "a" not in service.models
            engine.reading.set()
            assert (await load).name == "a" and "a" in service.models

    asyncio.run(check())


def test_an_answer_of_an_adapter_that_was_replaced_is_not_found_again(tmp_path: Path):
    async def check() -> None:
        engine = ScriptedEngine()
        async with running(engine) as service:
            for content in (b"old", b"new", b"old"):
                await service.load_adapter("a", write_adapter(tmp_path / "a", content))
                await read(service, request(adapter="a"))
                await service.unload_adapter("a")
            assert len(engine.requests) == 2

    asyncio.run(check())


def test_a_schema_is_compiled_in_a_thread_before_its_request_is_queued():
    class Grammars:
        def prepare(self, schema: str) -> None:
            assert threading.current_thread() is not threading.main_thread()
            if schema != "{}":
                raise InputError(schema)

    async def check() -> None:
        async with running(ScriptedEngine()) as service:
            service._grammars = Grammars()  # type: ignore[assignment]
            with pytest.raises(InputError):
                await read(service, request(sampling=Sampling(grammar="[]")))
            assert service.engine.requests == []  # type: ignore[attr-defined]
            assert len(await read(service, request(sampling=Sampling(grammar="{}")))) == 4

    asyncio.run(check())


def test_a_digest_follows_tensors_and_settings(tmp_path: Path):
    digests = {
        adapter_digest(Path(write_adapter(tmp_path / "a", content, settings)))
        for content in (b"x", b"y")
        for settings in ("{}", '{"r": 8}')
    }
    assert len(digests) == 4


def test_the_registry_shows_the_engine_and_no_name_that_is_not_served():
    class Loaded(ScriptedEngine):
        def load(self) -> Load:
            return Load(running=3, waiting=2, cache_tokens=100, cache_tokens_used=40, counters={"preemptions": 7})

        def submit(self, request: Request, put: Put) -> int:
            raise InputError("the adapter is not loaded")

    async def check() -> None:
        async with running(Loaded(), max_batch=1, queue=0) as service:
            assert value(service, "running") == 3 and value(service, "waiting") == 2
            assert value(service, "kv_tokens") == 100 and value(service, "kv_tokens_used") == 40
            assert value(service, "engine_preemptions_total") == 7
            for _ in range(3):  # A request that the engine refuses leaves its place.
                with pytest.raises(InputError):
                    await read(service, request(adapter="invented"))
            text, media_type = service.metrics.text()
            assert b"invented" not in text and media_type.startswith("text/plain")

    asyncio.run(check())
