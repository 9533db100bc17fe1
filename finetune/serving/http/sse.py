"""Server-sent events: one JSON object an event, then `[DONE]`. A failure within a stream is an event too."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request
from starlette.responses import Response, StreamingResponse

from finetune.serving.http.answers import while_connected
from finetune.serving.http.errors import as_api_error
from finetune.serving.http.json_bodies import as_json
from finetune.system.console import log, printable

# The client went away: nobody reads this.
GONE = 499
_DONE = b"data: [DONE]\n\n"


async def event_stream(http: Request, chunks: AsyncGenerator[dict[str, Any], None]) -> Response:
    """Answer with a stream of chunks. The first is awaited: a request that fails before it gets an error body.

    Raises: what the first chunk raises.
    """
    first = await while_connected(http, _next(chunks))
    if first is None:
        await chunks.aclose()
        return Response(status_code=GONE)
    # nginx would collect a stream before it sends it on.
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_frames(first, chunks), media_type="text/event-stream", headers=headers)


async def _next(chunks: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any]:
    return await anext(chunks)


async def _frames(first: dict[str, Any], chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
    yield _frame(first)
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield _frame(chunk)
    except Exception as error:  # noqa: BLE001 - the status is sent already: the stream says it
        failure = as_api_error(error)
        if failure.code == "internal_error":
            log(printable(f"serve: a stream failed: {error!r}", one_line=True))
        yield _frame(failure.body())
    yield _DONE


def _frame(content: Any) -> bytes:
    return b"data: %b\n\n" % as_json(content)
