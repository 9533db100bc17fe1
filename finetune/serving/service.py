"""One engine behind every protocol: its models by name, and answers as asynchronous streams of events."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.command_options import ServeSettings
from finetune.models.adapters.folder import CONFIG_FILE, TENSOR_FILE, check_adapter_folder
from finetune.serving.admission import Admission, DeadlineExceeded, Deadlines, Overloaded, Unavailable
from finetune.serving.answer_cache import answer_key, build_answer_cache
from finetune.serving.metrics import Metrics
from finetune.serving.request import Engine, Event, Finished, Request
from finetune.serving.running import RunningAnswer
from finetune.system.errors import FinetuneError, InputError
from finetune.system.manifest import sha256_of

if TYPE_CHECKING:
    from finetune.data.template.chat import ChatTemplate
    from finetune.serving.engine.grammar import GrammarCompiler

_WARM_TOKENS = 4


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A name that requests may ask for.

    digest: of all that decides its answers: weights, how they are stored, the type of the products. Answers are kept
    under it. details: shown in /v1/models.
    """

    name: str
    adapter: str | None
    digest: str
    created: int
    details: dict[str, Any] = field(default_factory=dict)


class Service:
    """Answers requests of all protocols in one event loop.

    ready: whether the warm-up and the comparison with the trained model are over, and no shutdown has begun.
    grammars: of the engine; None: it refuses schemas, or compiles them elsewhere. check: compares a loaded adapter (its
    name and folder) with the trained one, and returns what /v1/models shows of it.
    """

    def __init__(
        self,
        engine: Engine,
        chat: ChatTemplate,
        models: Sequence[ServedModel],
        settings: ServeSettings,
        *,
        grammars: GrammarCompiler | None = None,
        check: Callable[[str, Path], dict[str, Any]] = lambda name, folder: {},
    ):
        self.engine, self.chat, self.settings = engine, chat, settings
        self._grammars, self._check = grammars, check
        self.models = {model.name: model for model in models}
        self.ready = False
        self.metrics = Metrics(engine.load)
        self._admission = Admission(settings)
        self._deadlines = Deadlines(settings)
        self._cache = build_answer_cache(settings, self.metrics.cache_errors.inc)
        # Answers being written that another request may share, by key.
        self._shared: dict[str, RunningAnswer] = {}
        self._keeping: set[asyncio.Task[None]] = set()
        self._consumers = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._changing_adapters = asyncio.Lock()
        self._adapters = {model.adapter: model for model in models if model.adapter is not None}

    def model(self, name: str) -> ServedModel:
        """Return a model by the name of a request. Raises: InputError."""
        if name not in self.models:
            raise InputError(f"the model {name!r} is not served; there are: {', '.join(self.models)}")
        return self.models[name]

    async def answer(self, request: Request, *, seconds: float | None = None) -> AsyncGenerator[Event, None]:
        """Yield the events of an answer. A consumer that stops early cancels it: close the iterator.

        A deadline that passes after the first event ends the answer with Finished("deadline").

        Args:
            seconds: limit of the client, below that of the server.

        Raises:
            InputError: the adapter is not loaded, or the JSON schema cannot be obeyed.
            Overloaded: the queue is full; Unavailable, a kind of it: the service is starting or ending.
            DeadlineExceeded: the time passed before the first event.
        """
        if not self.ready:
            self.metrics.refused.labels("unavailable").inc()
            raise Unavailable()
        self._consumers += 1
        self._idle.clear()
        try:
            if self._grammars is not None and (schema := request.sampling.grammar) is not None:
                await asyncio.to_thread(self._grammars.prepare, schema)
            key = self._key(request)
            if key is not None and (kept := await self._kept(key, request)) is not None:
                for event in kept:
                    yield event
                return
            running = self._running(request, key)
            events = running.join()
            try:
                async for event in self._read(running, events, seconds):
                    yield event
            finally:
                if running.leave(events):
                    # A cancelled answer is joined by nobody.
                    self._unshare(running, key)
        finally:
            self._consumers -= 1
            if not self._consumers:
                self._idle.set()

    async def warm_up(self) -> None:
        """Compute every shape once, so that no client waits for a kernel that is compiled: call it before `ready`.

        One short answer alone, a full batch of all adapters, and a prompt of two chunks.

        Raises:
            FinetuneError: the engine failed.
        """
        adapters = [None, *self._adapters]
        long = min(self.settings.prefill_tokens + 1, self.engine.context_tokens - _WARM_TOKENS)
        batch = [
            Request(ids=(number % 256,) * 8, max_tokens=_WARM_TOKENS, adapter=adapters[number % len(adapters)])
            for number in range(self.settings.max_batch)
        ]
        alone = Request(ids=(0,), max_tokens=_WARM_TOKENS)
        for requests in ([alone], batch, [dataclasses.replace(alone, ids=(0,) * long)]):
            await asyncio.gather(*(self._compute(request) for request in requests))

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait for the running ones, at most `seconds`; return whether all have ended."""
        self.ready = False
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
                await asyncio.gather(*self._keeping)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End what still runs as cancelled, and free the engine and the cache."""
        self.ready = False
        await asyncio.to_thread(self.engine.close)
        if self._cache is not None:
            await self._cache.close()

    async def load_adapter(self, name: str, folder: str) -> ServedModel:
        """Serve an adapter under its name from now on; for it, the engine may forget the least recently used one.

        Raises:
            InputError: the name is served already.
            ConfigError: there is no adapter in the folder, or it does not fit the base.
            IntegrityError: it is corrupt, or does not answer as its trained model did.
        """
        async with self._changing_adapters:
            if name in self.models:
                raise InputError(f"the model {name!r} is served already; unload it first")
            digest = await asyncio.to_thread(adapter_digest, Path(folder))
            await asyncio.to_thread(self.engine.load_adapter, name, folder)
            for forgotten in self._adapters.keys() - self.engine.adapters():
                self._forget(forgotten)
            try:
                details = await asyncio.to_thread(self._check, name, Path(folder))
            except BaseException:
                self.engine.unload_adapter(name)
                raise
            model = ServedModel(name, name, digest, int(time.time()), details)
            self.models[name] = self._adapters[name] = model
            return model

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter after its running answers. Raises: InputError if there is none of this name."""
        async with self._changing_adapters:
            model = self.model(name)
            if model.adapter is None:
                raise InputError(f"the model {name!r} is the base, which stays")
            self.engine.unload_adapter(model.adapter)
            self._forget(model.adapter)

    def _forget(self, adapter: str) -> None:
        del self.models[self._adapters.pop(adapter).name]

    def _key(self, request: Request) -> str | None:
        """Return the key of an answer that may be kept or shared."""
        adapter = None if request.adapter is None else self._adapters.get(request.adapter)
        base = next((model for model in self.models.values() if model.adapter is None), None)
        if self._cache is None or base is None or not request.sampling.deterministic:
            return None
        return answer_key(request, base.digest, "" if adapter is None else adapter.digest)

    async def _kept(self, key: str, request: Request) -> list[Event] | None:
        events = None
        if key not in self._shared and self._cache is not None:
            events = await self._cache.get(key)
        found = "hit" if events else "shared" if key in self._shared else "miss"
        self.metrics.lookups.labels(found).inc()
        if events is None:
            return None
        end = events[-1]
        assert isinstance(end, Finished)
        return [*events[:-1], dataclasses.replace(end, cached_tokens=len(request.ids))]

    def _running(self, request: Request, key: str | None) -> RunningAnswer:
        """Return the answer to read: one that runs already, or a new one."""
        if key is not None and (running := self._shared.get(key)) is not None:
            return running
        try:
            self._admission.enter()
        except Overloaded:
            self.metrics.refused.labels("queue").inc()
            raise
        running = RunningAnswer(request, self.metrics, lambda answer, end: self._ended(answer, end, key))
        try:
            running.start(self.engine)
        except BaseException:
            self._admission.leave()
            raise
        if key is not None:
            self._shared[key] = running
        return running

    async def _read(
        self, running: RunningAnswer, events: asyncio.Queue[Event], seconds: float | None
    ) -> AsyncIterator[Event]:
        """Yield events until the last one or the deadline."""
        loop = asyncio.get_running_loop()
        ours = self._deadlines.seconds(running.request)
        given = ours if seconds is None else min(ours, seconds)
        self.metrics.deadline.set(ours)
        began = loop.time()
        event: Event | None = None
        while not isinstance(event, Finished):
            try:
                async with asyncio.timeout_at(began + given):
                    event = await events.get()
            except TimeoutError as error:
                self.metrics.deadlines_passed.inc()
                if given == ours:
                    self._note(running)
                if event is None:
                    raise DeadlineExceeded(given) from error
                event = Finished("deadline", error=f"the deadline of {given:.1f} s passed")
            yield event

    def _note(self, running: RunningAnswer) -> None:
        now = asyncio.get_running_loop().time()
        first = running.first or now
        self._deadlines.note(running.request, first - running.began, running.tokens, now - first)

    def _ended(self, running: RunningAnswer, end: Finished, key: str | None) -> None:
        """Count an answer that the engine ended, and keep it if it is whole."""
        self._admission.leave()
        self._unshare(running, key)
        self._count(running, end)
        if end.reason not in ("stop", "length"):
            return
        self._note(running)
        if key is not None and self._cache is not None:
            task = asyncio.get_running_loop().create_task(self._cache.put(key, running.events))
            self._keeping.add(task)
            task.add_done_callback(self._keeping.discard)

    def _unshare(self, running: RunningAnswer, key: str | None) -> None:
        if key is not None and self._shared.get(key) is running:
            del self._shared[key]

    def _count(self, running: RunningAnswer, end: Finished) -> None:
        metrics, adapter = self.metrics, running.request.adapter
        # Only a served adapter gets here: its name is a label.
        name = next((model.name for model in self.models.values() if model.adapter == adapter), adapter or "")
        metrics.answers.labels(end.reason).inc()
        metrics.prompt_tokens.labels(name).inc(len(running.request.ids))
        metrics.answer_tokens.labels(name).inc(running.tokens)
        metrics.answer_length.observe(running.tokens)
        metrics.duration.observe(asyncio.get_running_loop().time() - running.began)
        if running.first is not None and running.tokens:
            metrics.first_token.observe(running.first - running.began)

    async def _compute(self, request: Request) -> None:
        """Let the engine write an answer outside of the queue, the deadlines and the metrics."""
        loop = asyncio.get_running_loop()
        last: asyncio.Future[Finished] = loop.create_future()

        def put(event: Event) -> None:
            if isinstance(event, Finished):
                loop.call_soon_threadsafe(last.set_result, event)

        self.engine.submit(request, put)
        if (end := await last).reason == "error":
            raise FinetuneError(f"warm-up: the engine failed: {end.error}")


def adapter_digest(folder: Path) -> str:
    """Return a SHA-256 of an adapter's tensors and settings. Raises: ConfigError if there is none."""
    check_adapter_folder(folder, "adapter")
    sums = [sha256_of(folder / file) for file in (CONFIG_FILE, TENSOR_FILE)]
    return hashlib.sha256("".join(sums).encode()).hexdigest()
