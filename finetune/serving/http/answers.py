"""Events of the engine become pieces of text with the tokens that they are made of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from starlette.requests import Request as HttpRequest

from finetune.serving.http.errors import ApiError
from finetune.serving.request import Finished, PromptScores, Request, Token
from finetune.serving.service import Service
from finetune.serving.text import AnswerText

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Asked:
    """An answer to write. stop: texts that end it. seconds: limit of the client."""

    request: Request
    stop: tuple[str, ...] = ()
    seconds: float | None = None


class Piece(NamedTuple):
    """Text that is final, and the tokens since the piece before it (only where log-probabilities are wanted)."""

    text: str
    tokens: Sequence[Token]


class End(NamedTuple):
    """The end of an answer. tokens: written. cached_tokens: of the prompt, not computed again."""

    reason: str
    tokens: int
    cached_tokens: int


@dataclass
class Written:
    """A whole answer."""

    pieces: list[Piece] = field(default_factory=list)
    prompt: PromptScores | None = None
    end: End = field(default_factory=lambda: End("length", 0, 0))

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self) -> list[Token]:
        return [token for piece in self.pieces for token in piece.tokens]


def copies(asked: Asked, count: int) -> list[Asked]:
    """Return `count` answers to one prompt; with a seed, each has another one."""
    sampling = asked.request.sampling
    if count == 1 or sampling.seed is None:
        return [asked] * count
    seeds = [(sampling.seed + i) % 2**63 for i in range(count)]
    return [replace(asked, request=replace(asked.request, sampling=replace(sampling, seed=seed))) for seed in seeds]


async def pieces_of(service: Service, asked: Asked) -> AsyncGenerator[Piece | PromptScores | End, None]:
    """Yield an answer as it is written, and its end. Closing the iterator cancels the answer.

    Raises: ApiError if the engine fails; as `Service.answer`.
    """
    text = AnswerText(service.chat.backend, asked.stop)
    scored, tokens, held = asked.request.log_probs is not None, 0, []
    async with aclosing(service.answer(asked.request, seconds=asked.seconds)) as events:
        async for event in events:
            if isinstance(event, Token):
                tokens += 1
                if scored:
                    held.append(event)
                piece = text.push(event.id)
                if text.stopped:
                    yield Piece(piece, held)
                    yield End("stop", tokens, 0)
                    return
                if piece:
                    yield Piece(piece, held)
                    held = []
            elif isinstance(event, Finished):
                _check_end(event)
                piece = text.finish()
                if piece or held:
                    yield Piece(piece, held)
                yield End(event.reason, tokens, event.cached_tokens)
                return
            else:
                yield event


def _check_end(end: Finished) -> None:
    if end.reason == "cancelled":
        raise ApiError(503, "the server ended the answer because it stops; ask again", code="unavailable")
    if end.reason == "deadline":
        raise ApiError(504, end.error, code="deadline_exceeded")
    if end.reason == "error":
        raise ApiError(500, end.error, code="engine_error")


async def whole(service: Service, asked: Asked) -> Written:
    """Return an answer when it has ended."""
    written = Written()
    async for each in pieces_of(service, asked):
        if isinstance(each, Piece):
            written.pieces.append(each)
        elif isinstance(each, End):
            written.end = each
        else:
            written.prompt = each
    return written


async def all_whole(service: Service, asked: Sequence[Asked]) -> list[Written]:
    """Return answers when all have ended. One that fails cancels the others."""
    if len(asked) == 1:
        return [await whole(service, asked[0])]
    tasks = [asyncio.create_task(whole(service, each)) for each in asked]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await _end(tasks)


async def merged(
    service: Service, asked: Sequence[Asked]
) -> AsyncGenerator[tuple[int, Piece | PromptScores | End], None]:
    """Yield the pieces of several answers as they come, each with its number. One that fails ends all."""
    if len(asked) == 1:
        async with aclosing(pieces_of(service, asked[0])) as pieces:
            async for each in pieces:
                yield 0, each
        return
    queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    async def follow(number: int) -> None:
        try:
            async with aclosing(pieces_of(service, asked[number])) as pieces:
                async for each in pieces:
                    queue.put_nowait((number, each))
        except Exception as error:  # noqa: BLE001 - it is raised where the pieces are read
            queue.put_nowait((number, error))

    tasks = [asyncio.create_task(follow(number)) for number in range(len(asked))]
    try:
        running = len(tasks)
        while running:
            number, each = await queue.get()
            if isinstance(each, Exception):
                raise each
            yield number, each
            running -= isinstance(each, End)
    finally:
        await _end(tasks)


async def while_connected(http: HttpRequest, work: Coroutine[Any, Any, T]) -> T | None:
    """Return the result of the work, or None if the client goes away before it is done; the work is then cancelled."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(http))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        await _end([task, gone])


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
