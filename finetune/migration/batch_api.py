"""Join the requests of OpenAI's batch API with their answers, as rows of messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from finetune.config.schema import SourceConfig
from finetune.data.sources.paths import resolve_source
from finetune.data.sources.readers import RawBatch, Row
from finetune.system.errors import DataError


def join_answers(batches: Iterable[RawBatch], path: str) -> Iterator[RawBatch]:
    """Replace each request by a row: its messages, the answer with its custom_id, and its tools.

    path: the file of answers; all of it is held in memory. Each answer is used once.
    Raises: DataError if the answers cannot be read; a request without a whole answer becomes a bad row.
    """
    answers = dict(_answers(path))
    for batch in batches:
        rows = tuple(_joined(row.value, answers, path) for row in batch.rows())
        yield replace(batch, items=rows, format="messages")


def _answers(path: str) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    known = set[str]()
    for batch in resolve_source(SourceConfig(path=path)).batches():
        for row in batch.rows():
            name = _custom_id(row)
            if name in known:
                raise DataError(f"{row.location}: custom_id {name!r} is there twice; keep one answer of each request")
            known.add(name)
            yield name, _message(row)


def _custom_id(row: Row) -> str:
    if isinstance(row.value, DataError):
        raise DataError(f"{row.location}: {row.value}")
    if not isinstance(name := row.value.get("custom_id"), str) or "response" not in row.value:
        raise DataError(f"{row.location}: is no answer of a batch API: it needs custom_id and response")
    return name


def _message(row: Row) -> dict[str, Any] | DataError:
    """Return the answer's only message, or why it has none."""
    match row.value:
        case {"response": {"status_code": 200, "body": {"choices": [choice]}}}:
            match choice:
                case {"finish_reason": "length" | "content_filter" as reason}:
                    return DataError(f"its answer in {row.location} is cut off (finish_reason: {reason})")
                case {"message": dict() as message}:
                    return message
    return DataError(f"its answer in {row.location} failed: it has no single message with status_code 200")


def _joined(request: dict[str, Any] | DataError, answers: dict[str, Any], path: str) -> dict[str, Any] | DataError:
    match request:
        case DataError():
            return request
        case {"custom_id": str() as name, "body": {"messages": list() as messages} as body}:
            answer = answers.pop(name, None) or DataError(f"custom_id {name!r} has no answer in {path}")
            tools = {"tools": body["tools"]} if body.get("tools") else {}
            return answer if isinstance(answer, DataError) else {"messages": [*messages, answer], **tools}
    return DataError("is no request of a chat completion: it needs custom_id and body.messages")
